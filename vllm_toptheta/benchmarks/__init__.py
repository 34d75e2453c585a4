"""Speed, always as a ratio against another backend in the same run on the same machine.

May import `errors`, `limits`, `whole_file`, `reference`, `store`, `selection`, `kernels`, `telemetry`, `calibration`,
`evaluation`.
"""

"""`toptheta soak`: a server under load, disturbed, restarted and killed, and what becomes of every request.

traffic -> client -> (server, memory) -> texts -> report; `run` is the order of things.

May import `errors`.
"""

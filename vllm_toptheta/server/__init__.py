"""`toptheta serve`: check the options and the thresholds in seconds, then become the `vllm serve` that they describe.

config     what a configuration file may say
flags      vLLM's own flags, passed on as they are
preflight  thresholds against the model's config.json
command    the plain command, and how to become it
reference  docs/configuration.md
"""

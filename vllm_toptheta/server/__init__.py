"""`toptheta serve`: check the options and the thresholds in seconds, then become the `vllm serve` that they describe.

config         what a configuration file may say
flags          vLLM's own flags, passed on as they are
engine_flags   what they say of the engine
config_fields  what the fields of config.json may be
model_config   the model's config.json as vLLM will read it
preflight      all of that and the thresholds against each other
command        the plain command, and how to become it
reference      docs/configuration.md

May import `errors`, `settings`, `store`, `support`, `selection`.
"""

"""docs/configuration.md, made from the pydantic models that check the configuration."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from vllm_toptheta.server.config import ServerConfig
from vllm_toptheta.settings import ENV_PREFIX, Settings

_HEAD = """# Configuration

<!-- Written by `toptheta config docs` from vllm_toptheta/settings.py and vllm_toptheta/server; do not edit. -->

An option can be set in four places. The first place that sets it wins:

1. the command line: `toptheta serve MODEL --weight-floor 2`, or, for plain `vllm serve`,
   `--additional-config '{"toptheta": {"weight_floor": 2}}'`;
2. the file given as `toptheta serve --config FILE`;
3. the environment: `TOPTHETA_WEIGHT_FLOOR=2`;
4. the default.

An unknown option or variable is an error that lists the known ones. `toptheta serve --check` reports a mistake in a
second, with exit code 2, without loading vLLM; `toptheta serve` runs the same check before it starts.

## Options of the backend
"""

_FILE = """
## The configuration file

A YAML file has the options above at its root, and these fields:

"""

_EXAMPLE = """
Relative paths of `model` and `thresholds` start at the file's folder. Tags, anchors and repeated keys are refused.
Flags of the command line win over those in `vllm`. For example:

```yaml
model: HuggingFaceTB/SmolLM2-135M-Instruct
weight_floor: 2
min_context: 1024
vllm:
  port: 8000
  max-num-seqs: 64
  enable-prefix-caching: false
  served-model-name: [smollm2, default]
  override-generation-config: {temperature: 0.2}
```

    toptheta serve --config serve.yaml --port 8123

`toptheta serve` checks the file, compares the thresholds with the model's config.json, prints the plain `vllm serve`
command (keys as `***`), and becomes that command. It adds `toptheta` to `VLLM_PLUGINS`; if that is not set, to all
plugins that vLLM finds installed. A hub id is looked up in the local cache of Hugging Face. If its config.json is not
there, vLLM compares after it has downloaded it.

## What the check answers for

The check covers the options, the thresholds, config.json, and these flags of vLLM, in any spelling that vLLM takes:
`--hf-overrides`, `--hf-config-path`, `--revision`, `--dtype`, `--quantization`, `--kv-cache-dtype`, `--block-size`,
`--max-model-len`, `--tensor-parallel-size`, both context parallel sizes, `--runner`, `--convert`,
`--speculative-config`, `--spec-method`, `--spec-model`, `--kv-transfer-config`, `--kv-offloading-size`,
`--kv-offloading-backend`, `--enable-sleep-mode`, `--load-format`, `--limit-mm-per-prompt`, `--language-model-only`,
`--enable-mm-embeds`. A server that it refuses does not start with plain `vllm serve` either.

The check is for the device of the installed vLLM; `--device cpu` and `--device gpu` name another. Without vLLM, it says
so if the model is served on only one of the two.

The check leaves to vLLM: whether it knows the class of the model, all other flags, files of weights and tokenizers, and
memory. `--hf-overrides` that change heads, layers or other sizes need `--load-format dummy`, because weights would not
fit. To change positions, override `rope_parameters` as a whole: vLLM reads nothing else.

## Other variables

| variable | meaning |
| --- | --- |
| `TOPTHETA_ALLOW_UNTESTED_VLLM=1` | allow versions of vLLM that were never run |
| `VLLM_API_KEY` | like `--api-key`: the key for `/v1` and `/toptheta/stats` |
"""

_NAMES = {"object": "mapping", "boolean": "true or false", "integer": "integer", "number": "number", "string": "string"}


def reference() -> str:
    """The Markdown text."""
    options = _table(
        ("option", "variable", "type", "default", "meaning"),
        (
            (f"`{name}`", f"`{ENV_PREFIX}{name.upper()}`", kind, default, meaning)
            for name, kind, default, meaning in _fields(Settings)
        ),
    )
    file = _table(
        ("field", "type", "default", "meaning"),
        ((f"`{name}`", *rest) for name, *rest in _fields(ServerConfig)),
    )
    return f"{_HEAD}\n{options}{_FILE}{file}{_EXAMPLE}"


def _fields(model: type[BaseModel]) -> Iterator[tuple[str, str, str, str]]:
    """Name, type, default and meaning of each field."""
    for name, schema in model.model_json_schema()["properties"].items():
        default = "" if schema.get("default") is None else f"`{json.dumps(schema['default'])}`".replace('"', "")
        yield name, _type(schema), default, schema["description"]


def _type(schema: dict[str, Any]) -> str:
    choices = [choice for choice in schema.get("anyOf", [schema]) if choice.get("type") != "null"]
    return " or ".join(map(_name, choices))


def _name(schema: dict[str, Any]) -> str:
    values = schema.get("enum") or ([schema["const"]] if "const" in schema else [])
    if values:
        return " or ".join(f"`{value}`" for value in values)
    if schema.get("format") == "path":
        return "path"
    if schema["type"] == "array":
        return f"list of {_name(schema['items'])}s"
    minimum = f", at least {schema['minimum']}" if "minimum" in schema else ""
    return _NAMES[schema["type"]] + minimum


def _table(head: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)

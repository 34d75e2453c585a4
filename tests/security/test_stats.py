"""The statistics cannot carry what people ask: their types hold numbers, and strings that the operator chose."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vllm_toptheta.backend.counters import LayerCounters
from vllm_toptheta.telemetry.stats import Stats

OPERATORS_STRINGS = {"mode", "compensation", "thresholds", "target", "guard", "choices", "text", "differences"}


def leaves(schema: dict[str, Any], name: str, definitions: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the name and the JSON type of every value that a schema allows; mappings' keys are strings."""
    if "$ref" in schema:
        schema = definitions[schema["$ref"].rpartition("/")[2]]
    for choice in schema.get("anyOf", []):
        yield from leaves(choice, name, definitions)
    for field, inner in schema.get("properties", {}).items():
        yield from leaves(inner, field, definitions)
    for item in [schema.get("items"), *schema.get("prefixItems", [])]:
        if isinstance(item, dict):
            yield from leaves(item, name, definitions)
    if isinstance(inner := schema.get("additionalProperties"), dict):
        yield f"keys of {name}", "string"
        yield from leaves(inner, name, definitions)
    if schema.get("type") in ("string", "number", "integer", "boolean", "null"):
        yield name, schema["type"]
    elif not schema.keys() & {"anyOf", "properties", "items", "prefixItems", "additionalProperties"}:
        yield name, f"anything: {schema}"


def test_only_the_operators_strings() -> None:
    schema = Stats.model_json_schema(mode="serialization")
    found = set(leaves(schema, "", schema["$defs"]))
    assert {name for name, kind in found if kind not in ("number", "integer", "boolean", "null")} == {
        *OPERATORS_STRINGS,
        "keys of dense_tokens",
        "keys of requests",  # kinds of what can be asked for, of which there are two
    }
    assert {"rows_read", "decode_tokens", "layer", "lost_mass_mean"} <= {name for name, _ in found}


def test_workers_count_in_buffers_of_a_fixed_size() -> None:
    """Nothing grows with what is decoded, so nothing of it can be kept."""
    counters = LayerCounters(1, [0, 1], 2)
    assert max(buffer.numel() for buffer in counters.buffers if buffer is not None) < 100

"""The base of every model of the schema, the bounds that its fields share, and what several sections name."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

MAX_LAYERS = 1024
MAX_HEADS = 1024
MAX_TOKENS = 1 << 24
MAX_COUNT = (1 << 63) - 1
PRINTABLE = r"^[^\x00-\x1f\x7f-\x9f]*$"  # what is shown in a terminal must not steer it

Tokens = Annotated[int, Field(ge=1, le=MAX_TOKENS)]
Count = Annotated[int, Field(ge=1, le=MAX_COUNT)]
ShortText = Annotated[str, Field(min_length=1, max_length=256, pattern=PRINTABLE)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Versions = Annotated[dict[ShortText, ShortText], Field(max_length=64, description="Package to version.")]
Command = Annotated[str, Field(max_length=8192, pattern=PRINTABLE)]
Seed = Annotated[int, Field(ge=0, le=(1 << 64) - 1)]


class StrictModel(BaseModel):
    """Unknown fields, other types and infinite numbers are refused; nothing is changed after it was checked."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class TextSource(StrictModel):
    """A text that was calibrated or measured on; of imported thresholds, the file that they came from."""

    name: ShortText
    sha256: Sha256
    num_characters: Count

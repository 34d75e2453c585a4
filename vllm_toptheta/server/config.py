"""The configuration file of `toptheta serve --config FILE`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from vllm_toptheta.errors import SettingsError
from vllm_toptheta.settings import Settings, Source
from vllm_toptheta.store import strict_yaml
from vllm_toptheta.store.schema import describe

MAX_BYTES = 1 << 20

FlagName = Annotated[str, Field(pattern=r"^[A-Za-z][\w.-]*$")]


class ServerConfig(BaseModel):
    """A model, the backend's options beside it, and vLLM's flags."""

    # options of the backend stand beside these fields; `load` hands them to Settings, which knows them
    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    model: str | None = Field(
        default=None, min_length=1, description="A hub id, or a directory with config.json and weights."
    )
    vllm: dict[FlagName, Any] = Field(
        default_factory=dict,
        description="Flags of `vllm serve` without the leading dashes. `true` gives the bare flag, `false` its `--no-` "
        "form, a list several values, a mapping JSON.",
    )

    @field_validator("vllm")
    @classmethod
    def _check_values(cls, flags: dict[str, Any]) -> dict[str, Any]:
        if empty := [name for name, value in flags.items() if value is None]:
            raise ValueError(f"{empty[0]} has no value; a bare flag is true")
        return flags

    @property
    def options(self) -> dict[str, Any]:
        """The options of the backend that the file sets."""
        return self.model_extra or {}

    @classmethod
    def load(cls, file: Path) -> ServerConfig:
        """Read and check a file; paths in it are relative to its folder.

        Raises:
            SettingsError: It cannot be read, is no such YAML, or has an unknown or malformed field.
        """
        try:
            with file.open("rb") as stream:
                content = stream.read(MAX_BYTES + 1)
        except OSError as error:
            raise SettingsError(
                f"cannot be read: {error.strerror}", file=file, remedy="Name a YAML file with --config"
            ) from None
        if len(content) > MAX_BYTES:
            raise SettingsError(f"larger than {MAX_BYTES} bytes", file=file)
        try:
            config = cls.model_validate(strict_yaml.parse(content.decode("utf-8")))
        except ValidationError as error:
            field, message = describe(error)
            raise SettingsError(message, file=file, field=field, remedy="See docs/configuration.md") from None
        except ValueError as error:
            raise SettingsError(f"not a YAML mapping: {error}", file=file, remedy="See docs/configuration.md") from None
        settings = Settings.load(config.options, source=Source(file, str))
        paths: dict[str, str] = {}
        if "thresholds" in config.options and settings.thresholds is not None:
            paths["thresholds"] = str(file.parent / settings.thresholds)
        if config.model is not None and (file.parent / config.model).is_dir():
            paths["model"] = str(file.parent / config.model)
        return cls.model_validate(config.model_dump() | paths)

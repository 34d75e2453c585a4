"""A report as data: what its page is made of, and what is written beside it."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from vllm_toptheta.report.findings import SurvivorReport
from vllm_toptheta.report.quality import Quality

__all__ = ["Report"]


class Report(BaseModel):
    """A report: what is known of the quality, what was measured with thresholds applied, or both."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[3] = 3
    model: str = Field(description="Name of the model's directory, or its id where only a store was named.")
    quality: tuple[Quality, ...] = Field(description="One for each mode that there is evidence of.")
    survivors: SurvivorReport | None = Field(description="null where no text was given.")

    @model_validator(mode="after")
    def _check_content(self) -> Self:
        if not self.quality and self.survivors is None:
            raise ValueError("a report of nothing")
        return self

    @classmethod
    def read(cls, content: str) -> Self:
        """Return the report of a report.json."""
        return cls.model_validate_json(content)

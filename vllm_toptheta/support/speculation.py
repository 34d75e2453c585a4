"""Drafts: what guesses tokens that the served model then verifies, and which of it is served.

Layers of models that draft are vLLM's own: they have no thresholds, and their pages no tails.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from vllm_toptheta.support.hybrids import hybrid_type
from vllm_toptheta.support.model import mixed_field, model_reasons, sharing_field, sinks_field, text_config
from vllm_toptheta.support.refusal import Reason

MODELLESS = ("ngram", "ngram_gpu", "suffix")  # guess tokens from the text itself
BY_MODELS = ("draft_model", "eagle", "eagle3", "mtp")
PAGE_MULTIPLE = 32  # tokens; of vLLM's own attention for CPUs, which reads the pages of layers that draft
_OURS = "TOPTHETA"
# options of drafts by models that nobody has run beside thresholds, and what vLLM takes for them by itself
_UNTRIED: dict[str, Any] = {
    "disable_eagle_block_drop": False,
    "disable_padded_drafter_batch": False,
    "draft_sample_method": "greedy",
    "enable_adaptive_verification": False,
    "kv_cache_dtype": None,
    "max_model_len": None,
    "num_speculative_tokens_per_batch_size": None,
    "parallel_drafting": False,
    "rejection_sample_method": "standard",
    "use_heterogeneous_vocab": False,
    "use_local_argmax_reduction": False,
}
# by which words in a model's name vLLM tells its method, in this order
_WORDS = {"eagle-": "eagle", "eagle3": "eagle3", "dflash": "dflash", "dspark": "dspark"}
_TYPES = ("medusa", "mlp_speculator")  # methods that vLLM tells by the model_type of what drafts
_WITH_MTP = "MiMoForCausalLM"  # of models whose own layers draft, the one that was run


@dataclass(frozen=True)
class Draft:
    """What is asked for.

    Attributes:
        method: As vLLM names it.
        model: What drafts, a directory or a hub id; None where there is no model, or it is the served one.
        revision: Of the hub's repository; None for its main branch.
        backend: The attention backend that is asked for its layers, in capitals; None where vLLM chooses.
        untried: An option that nobody has run; None where there is none.
        windows: What of the served model's config.json says that some of its layers see part of a sequence; None where
            nothing does.
        unserved: What of a config.json says that its layers are of a kind that nobody has run; None where nothing does.
    """

    method: str
    model: str | None = None
    revision: str | None = None
    backend: str | None = None
    untried: str | None = None
    windows: str | None = None
    unserved: str | None = None

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Draft | None:
        """What flags, or vLLM's configuration, ask for; None if they ask for nothing.

        Args:
            fields: Of vLLM's `SpeculativeConfig`. Of any content.
        """
        if not fields:
            return None
        backend, model = fields.get("attention_backend"), fields.get("model")
        backend = None if backend is None else str(getattr(backend, "name", backend)).upper()
        return cls(
            _method(fields),
            model=None if model is None else str(model),
            revision=None if fields.get("revision") is None else str(fields["revision"]),
            backend=None if backend == "AUTO" else backend,
            untried=next((name for name, usual in _UNTRIED.items() if fields.get(name) not in (None, usual)), None),
        )

    @property
    def is_by_model(self) -> bool:
        """Whether layers draft."""
        return self.method not in MODELLESS

    @property
    def flag(self) -> str:
        """What asks for it."""
        return f"--speculative-config {self.method}"

    def reasons(self, *, on_cpu: bool, runs_on_v2: bool) -> dict[Reason, bool]:
        """Why it is not served, whatever engine it drafts for, and whether that is so.

        Args:
            on_cpu: Whether it runs on CPUs, else on GPUs.
            runs_on_v2: Whether the model runner is vLLM's V2.
        """
        return {
            Reason(
                self.flag,
                f"beside thresholds only {', '.join((*MODELLESS, *BY_MODELS))} were run",
                "Take one of these, or leave it out",
            ): self.method not in BY_MODELS,
            Reason(
                self.flag,
                "vLLM's V2 model runner would have it draft with the served model's thresholds",
                "Leave it out, or set VLLM_USE_V2_MODEL_RUNNER=0",
            ): self.method == "draft_model" and not on_cpu and runs_on_v2,
            Reason(
                f"{self.flag} attention_backend",
                "layers that draft have no thresholds, so their attention has to be vLLM's own",
                "Leave attention_backend out",
            ): self.backend == _OURS,
            Reason(f"{self.flag} {self.untried}", "no model has drafted in that way yet", "Leave it out"): (
                self.untried is not None
            ),
            Reason(
                f"{self.flag}: {self.windows}",
                "vLLM has models draft on pages of its first kind, which may be those of layers with windows",
                "Leave it out, or take ngram or suffix",
            ): self.windows is not None,
            Reason(
                f"{self.flag}: {self.unserved}",
                "no layers of that kind have drafted yet",
                "Leave it out, or take a model whose layers all attend to all tokens",
            ): self.unserved is not None,
        }

    def of_checkpoint(self, config: Mapping[str, Any]) -> Draft:
        """The same, with what the config.json of what drafts says.

        Args:
            config: As a dict, or `PretrainedConfig.to_dict()`. Of any content.
        """
        # as vLLM wraps that of an EAGLE
        inner = config.get("model")
        config = inner if isinstance(inner, Mapping) else config
        model_type = str(config.get("model_type"))
        method = self.method
        if method == "draft_model" and (model_type in _TYPES or model_type.endswith("_mtp")):
            method = model_type if model_type in _TYPES else "mtp"
        return replace(self, method=method, unserved=_unserved(config))

    def of_target(self, config: Mapping[str, Any]) -> Draft:
        """The same, with what the served model's config.json says of layers that draft.

        Args:
            config: Likewise.
        """
        has_layers = self.method != "mtp" or (config.get("architectures") or [None])[0] == _WITH_MTP
        return replace(self, windows=_windows_field(config), unserved=self.unserved if has_layers else "architectures")


def _method(fields: Mapping[str, Any]) -> str:
    """The method, as vLLM finds it by its own and the model's name."""
    method, model = fields.get("method"), str(fields.get("model") or "")
    if method is None:
        parts = model.split(".")
        is_class = len(parts) > 1 and all(part.isidentifier() for part in parts)
        method = "ngram" if model in ("ngram", "[ngram]") else "custom_class" if is_class else "draft_model"
    method = str(method).strip("[]")
    if method.endswith("_mtp"):
        return "mtp"
    if method != "draft_model":
        return method
    return next((found for word, found in _WORDS.items() if word in model.lower()), method)


def _unserved(config: Mapping[str, Any]) -> str | None:
    """What says that layers are of another kind than full attention to keys and values of their own."""
    text = text_config(config)
    # names of what drafts end as those of models that pool
    reasons = model_reasons({**config, "architectures": None})
    fields = [
        *(reason.field for reason in reasons),
        "model_type" if hybrid_type(text) else None,
        sharing_field(config),
        mixed_field(config),
        sinks_field(config),
        _windows_field(config),
        *(name for name in ("vision_config", "audio_config") if config.get(name)),
    ]
    return next((field for field in fields if field is not None), None)


def _windows_field(config: Mapping[str, Any]) -> str | None:
    text = text_config(config)
    kinds = text.get("layer_types")
    if isinstance(kinds, list | tuple):
        return "sliding_window" if "sliding_attention" in kinds else None
    # in these families a model has windows only if it says so
    asks = str(text.get("model_type")).startswith(("qwen", "smollm3"))
    return "sliding_window" if text.get("sliding_window") and text.get("use_sliding_window", not asks) else None

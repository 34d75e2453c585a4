"""The model under evaluation, run by vLLM's engine."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_toptheta.calibration.model import load_tokenizer
from vllm_toptheta.calibration.plausible import MAX_SHARE_OF_GUESSING
from vllm_toptheta.calibration.run import package_versions
from vllm_toptheta.engine.ranks import merge
from vllm_toptheta.errors import CalibrationError, EvaluationError, TopThetaError
from vllm_toptheta.evaluation.measuring import SequenceJob, WindowResult
from vllm_toptheta.evaluation.subject import Setup
from vllm_toptheta.evaluation.window import PREFIX_ROWS
from vllm_toptheta.store import ThresholdStore, read_architecture
from vllm_toptheta.store.quality import UNQUANTIZED

__all__ = ["EngineSubject"]

_WORKER = "vllm_toptheta.engine.worker.MeasuringWorker"
_RPC = "toptheta_measure"  # its method
_FIELD = "engine_args"
# of the pages of one sequence, for what vLLM adds to them; they are allocated, and never written
_PAGES = 1.5


class EngineSubject:
    """A model as vLLM serves it: its kernels, its quantisation, its GPUs; only attention is the evaluated one.

    The engine starts when it is first needed. It runs on our backend, so that what is not served is refused here too.

    Args:
        model_dir: a Hugging Face model directory, with its tokenizer.
        max_length: tokens of the longest sequence to measure.
        window: tokens of a window.
        engine_args: further flags of `vllm serve` that say how the model is run, as one would type them.

    Raises:
        EvaluationError: a flag is none of vLLM's engine, or one that is set here.
        ModelConfigError: the model directory has no usable config.json.
    """

    def __init__(self, model_dir: Path, *, max_length: int, window: int, engine_args: str = "") -> None:
        self.architecture = read_architecture(model_dir)
        self.model_dir = model_dir
        self.stores: Mapping[str, ThresholdStore] = {}
        # in this process, so that what is measured need not be plain values; vLLM reads it when the engine starts
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        self._arguments = _parse(
            model_dir,
            engine_args,
            attention_backend="TOPTHETA",
            # a floor of its own: evidence of another run decides nothing here
            additional_config={"toptheta": {"weight_floor": 1.0}},
            worker_extension_cls=_WORKER,
            enforce_eager=True,
            enable_prefix_caching=False,
            enable_chunked_prefill=True,
            max_model_len=max_length,
            max_num_seqs=1,
            max_num_batched_tokens=max(PREFIX_ROWS, window),
            disable_log_stats=True,
            use_tqdm_on_load=False,
        )

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return load_tokenizer(self.model_dir)

    @property
    def device(self) -> torch.device:
        """The kind of device that vLLM runs on."""
        from vllm.platforms import current_platform

        return torch.device(current_platform.device_type)

    @property
    def max_length(self) -> int | None:
        """None: vLLM itself refuses sequences that are too long for the model, when the engine starts."""
        return None

    @property
    def quantization(self) -> str:
        """Of the weights, as vLLM names it without its choice of kernel; `none` without."""
        return str(self._config.model_config.quantization or UNQUANTIZED).removesuffix("_marlin")

    def setup(self) -> Setup:
        """Returns what a report says of the subject."""
        from vllm.platforms import current_platform

        name = current_platform.get_device_name() if current_platform.is_cuda() else str(self.device)
        num_gpus = self._config.parallel_config.world_size
        return Setup(
            model=self.model_dir.absolute().name,
            stores=(),
            dtype=str(self._config.model_config.dtype).removeprefix("torch."),
            device=name if num_gpus == 1 else f"{num_gpus} x {name}",
            versions={**package_versions(), "vllm": _vllm_version()},
        )

    def check(self, sequences: Sequence[Tensor]) -> None:
        """Nothing before a window was measured: then its loss is compared with that of a guess, in `measure`."""

    def measure(self, job: SequenceJob, *, advance: Callable[[int], object] = lambda rows: None) -> list[WindowResult]:
        """Measures one sequence on all ranks, see `measuring.measure_sequence`.

        Raises:
            CalibrationError: the model predicts the text no better than a guess.
            EvaluationError: rows are to be compared with an exact top-k that several ranks would have to find together.
        """
        is_alone = self._config.parallel_config.world_size == 1
        if not is_alone and any(None in of_length.values() for of_length in job.equal_rows.values()):
            raise EvaluationError(
                "an exact top-k that reads as many rows can be found on one GPU only",
                field="equal_rows",
                remedy="Leave it out, or measure without tensor parallelism",
            )
        # other processes cannot be told what to call
        ranks = self._engine.collective_rpc(_RPC, args=(job, advance if is_alone else None))
        if not is_alone:
            advance(job.num_rows)
        found = [merge(of_window) for of_window in zip(*ranks, strict=True)]
        guess = math.log(self._config.model_config.get_vocab_size())
        for loss in (result.losses[0].dense for result in found if result.losses):
            if not loss <= MAX_SHARE_OF_GUESSING * guess:
                raise CalibrationError(
                    f"the model does not understand the text: its loss is {loss:.2f} nats per token, and a guess among "
                    f"all tokens has {guess:.2f}",
                    file=self.model_dir,
                    remedy="Check that weights and tokenizer belong together, and that the text is in its language",
                )
        return found

    @cached_property
    def _config(self) -> Any:
        with _named_errors():
            config = self._arguments.create_engine_config()
        if config.model_config.is_hybrid:
            raise EvaluationError(
                "decoding is not evaluated where layers keep states that every token changes",
                field=f"model_type {config.model_config.hf_text_config.model_type}",
                remedy="Measure its perplexity instead (toptheta eval perplexity)",
            )
        return config

    @cached_property
    def _engine(self) -> Any:
        from vllm.v1.engine.llm_engine import LLMEngine

        shape = self.architecture
        element_bytes = self._config.model_config.dtype.itemsize
        token_bytes = 2 * shape.num_layers * shape.num_kv_heads * shape.head_size * element_bytes
        pages = int(_PAGES * token_bytes * (self._arguments.max_model_len + PREFIX_ROWS))
        arguments = dataclasses.replace(
            self._arguments, kv_cache_memory_bytes=self._arguments.kv_cache_memory_bytes or pages
        )
        with _named_errors():
            return LLMEngine.from_engine_args(arguments)


def _parse(model_dir: Path, flags: str, **fixed: Any) -> Any:
    """vLLM's engine arguments of some flags.

    Raises:
        EvaluationError: a flag is unknown, or has another value than the one it is set to here.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser(prog="--engine-args", add_help=False))
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            # the model comes last, and wins
            given = EngineArgs.from_cli_args(parser.parse_args([*shlex.split(flags), "--model", str(model_dir)]))
    except (SystemExit, ValueError) as error:
        reason = said.getvalue().strip().splitlines()[-1:] or [str(error)]
        raise EvaluationError(
            reason[0].removeprefix("--engine-args: error: "), field=_FIELD, remedy="Give flags of vllm serve"
        ) from error
    default = EngineArgs(model=str(model_dir))
    for name, value in fixed.items():
        if getattr(given, name) not in (getattr(default, name), value):
            raise EvaluationError(
                f"--{name.replace('_', '-')} is set by this command", field=_FIELD, remedy="Leave it out"
            )
    for name in ("pipeline_parallel_size", "data_parallel_size"):
        if getattr(given, name) > 1:
            raise EvaluationError(
                f"--{name.replace('_', '-')} is not supported here",
                field=_FIELD,
                remedy="Spread the model with --tensor-parallel-size",
            )
    return dataclasses.replace(given, **fixed)


@contextlib.contextmanager
def _named_errors() -> Iterator[None]:
    """Says what vLLM refuses in one line."""
    try:
        yield
    except TopThetaError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        raise EvaluationError(
            f"vLLM cannot start the engine: {reason[:600] or type(error).__name__}",
            field="engine",
            remedy="Mend what is named with --engine-args, or measure with --engine transformers",
        ) from error


def _vllm_version() -> str:
    import vllm

    return str(vllm.__version__)

"""What sparse attention changes where a server uses it: in the tokens that follow a prompt, which was read densely.

For each sequence, one dense pass over all tokens but the last ones, the window; then the window, densely and with every
variant, behind that prefix. Its tokens are given, so all see the same ones, and every figure is paired.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from vllm_toptheta.calibration.data import Text, different_texts, load_sequences
from vllm_toptheta.calibration.model import max_positions
from vllm_toptheta.calibration.plausible import check_understanding
from vllm_toptheta.calibration.progress import progress_bar
from vllm_toptheta.calibration.route import AttentionCall
from vllm_toptheta.errors import EvaluationError
from vllm_toptheta.evaluation.decode_report import DecodeReport, WindowResult, length_report
from vllm_toptheta.evaluation.decode_state import DecodeArguments, DecodeState, model_files
from vllm_toptheta.evaluation.losses import compare_predictions
from vllm_toptheta.evaluation.sparse import SparseAttention
from vllm_toptheta.evaluation.subject import Subject
from vllm_toptheta.evaluation.variants import Variant, floor_label, store_of
from vllm_toptheta.evaluation.window import read_prefix, read_window
from vllm_toptheta.evaluation.window_reads import EqualRows, WindowRecorder
from vllm_toptheta.reference import AttentionResult

__all__ = ["DecodeOptions", "check_options", "evaluate_decode"]


@dataclass(frozen=True)
class DecodeOptions:
    """What to measure.

    Attributes:
        lengths: tokens of the sequences, each with results of its own.
        num_sequences: sequences of each length.
        window: tokens at the end of a sequence that are decoded, at least 2.
        equal_rows: weight floors to which exact top-k is compared that reads as many value rows; its k is found for
            each length on the first sequence, see `window_reads.EqualRows`.
        seed: the same seed and texts give the same sequences.
        skip: sequences of each length to leave out before the first, because something was chosen on them.
    """

    lengths: tuple[int, ...]
    num_sequences: int = 4
    window: int = 128
    equal_rows: tuple[float, ...] = ()
    seed: int = 0
    skip: int = 0


def evaluate_decode(
    subject: Subject,
    texts: Sequence[Text],
    variants: Sequence[Variant],
    options: DecodeOptions,
    *,
    folder: Path | None = None,
    progress: bool = True,
    title: str = "evaluating",
) -> DecodeReport:
    """Compares variants of sparse attention with dense attention on the last tokens of sequences.

    Args:
        subject: the model, and the stores that the variants name.
        texts: held-out texts; sequences are cut from them, of one length without overlap.
        variants: what to compare, as `variants.expand_variants` returns them.
        options: what to measure.
        folder: keeps the results of each sequence, so that an evaluation that was interrupted goes on there; None to
            keep nothing.
        progress: show a progress bar on stderr.
        title: what it says is being done.

    Raises:
        CalibrationError: the model is not supported, or the texts are too short.
        EvaluationError: the options do not fit each other or the model, or `folder` holds another evaluation.
        StoreError: a store lacks what a variant needs.
    """
    if not variants and not options.equal_rows:
        raise EvaluationError("nothing to compare", field="weight_floor", remedy="Give at least one")
    texts = different_texts(texts)
    check_options(subject, options)
    for length in options.lengths:
        matched = [Variant(target=floor_label(floor, field="equal_rows")) for floor in options.equal_rows]
        for variant in (*variants, *matched):
            _ready(subject, variant, length=length, window=options.window)
    sequences = {
        length: load_sequences(
            texts,
            subject.tokenizer,
            num_sequences=options.skip + options.num_sequences,
            max_length=length,
            seed=options.seed,
        )[options.skip :]
        for length in options.lengths
    }
    for of_length in sequences.values():
        check_understanding(subject.model, of_length, model_dir=subject.model_dir)
    arguments = DecodeArguments(
        setup=subject.setup(),
        model_files=model_files(subject.model_dir),
        text=tuple(text.source for text in texts),
        variants=tuple(variants),
        lengths=options.lengths,
        num_sequences=options.num_sequences,
        window=options.window,
        equal_rows=options.equal_rows,
        seed=options.seed,
        skip=options.skip,
    )
    state = DecodeState(folder, arguments)
    with progress_bar("tokens", enabled=progress) as bar:
        num_windows = 1 + len(variants) + len(options.equal_rows)
        tokens = {length: length + (num_windows - 1) * options.window for length in options.lengths}
        task = bar.add_task(title, total=options.num_sequences * sum(tokens.values()))
        reports = []
        for length, of_length in sequences.items():
            results: list[WindowResult] = []
            for index, token_ids in enumerate(of_length):
                result = state.load(length, index)
                if result is None:
                    result = _measure(
                        subject,
                        token_ids,
                        variants,
                        options,
                        chosen=results[0].equal_rows if results else None,
                        advance=lambda rows: bar.advance(task, rows),
                    )
                    state.save(length, index, result)
                else:
                    bar.advance(task, tokens[length])
                results.append(result)
            reports.append(length_report(length, variants, results, head_size=subject.architecture.head_size))
    report = DecodeReport(
        setup=arguments.setup, text=arguments.text, window=options.window, seed=options.seed, lengths=tuple(reports)
    )
    state.finish(report)
    return report


def check_options(subject: Subject, options: DecodeOptions) -> None:
    """Refuses what cannot be measured.

    Args:
        subject: the model.
        options: what to measure.

    Raises:
        EvaluationError: a number cannot be, or a sequence is longer than the model's positions.
    """
    longest = max_positions(subject.model)
    if options.num_sequences < 1:
        raise EvaluationError(f"no number of sequences: {options.num_sequences}", field="sequences")
    if options.window < 2:
        raise EvaluationError(f"a window has at least 2 tokens, got {options.window}", field="window")
    if not options.lengths or len(set(options.lengths)) < len(options.lengths):
        raise EvaluationError(f"lengths have to differ, got {list(options.lengths)}", field="lengths")
    for length in options.lengths:
        if length <= options.window:
            raise EvaluationError(
                f"no prompt is left of {length} tokens with a window of {options.window}",
                field="lengths",
                remedy="Ask for longer sequences or a smaller window",
            )
        if longest is not None and length > longest:
            raise EvaluationError(
                f"{length} tokens are more than the {longest} positions of the model (max_position_embeddings)",
                field="lengths",
                remedy="Ask for shorter sequences",
            )


def _ready(subject: Subject, variant: Variant, *, length: int, window: int) -> SparseAttention:
    """The attention of a variant, which has to decide on every row of the window."""
    attention = SparseAttention(variant, store_of(variant, subject.stores), max_length=length, device=subject.device)
    if attention.dense_length > length - window:
        raise EvaluationError(
            f"{variant.name} keeps every key of rows of up to {attention.dense_length}, and the window of a sequence "
            f"of {length} begins after {length - window}",
            field="lengths",
            remedy="Ask for longer sequences, a smaller window or a smaller target",
        )
    return attention


def _measure(
    subject: Subject,
    token_ids: Tensor,
    variants: Sequence[Variant],
    options: DecodeOptions,
    *,
    chosen: Mapping[str, Variant] | None,
    advance: Callable[[int], object],
) -> WindowResult:
    """Measures one sequence; `chosen` is what an earlier one found for `equal_rows`, by the floor's label."""
    model, length = subject.model, len(token_ids)
    prefix, window = token_ids[: -options.window], token_ids[-options.window :]
    finders = {}
    for floor in options.equal_rows if chosen is None else ():
        label = floor_label(floor, field="equal_rows")
        attention = _ready(subject, Variant(target=label), length=length, window=options.window)
        finders[label] = EqualRows(attention, max_length=length)

    def observe(call: AttentionCall, result: AttentionResult | None) -> None:
        for finder in finders.values():
            finder(call, result)

    cache = read_prefix(model, prefix, on_rows=advance)
    dense = read_window(model, cache, window, observe=observe)
    advance(len(window))
    if chosen is None:
        chosen = {
            label: Variant(method="top_k", target=f"k:{finder.target_k}", dense_layers=())
            for label, finder in finders.items()
        }
    states, reads = [], []
    for variant in (*variants, *chosen.values()):
        recorder = WindowRecorder()
        attention = _ready(subject, variant, length=length, window=options.window)
        states.append(read_window(model, cache, window, attention, observe=recorder))
        reads.append(recorder.reads(range(len(prefix) + 1, length + 1)))
        advance(len(window))
    losses = compare_predictions(model, window, dense, states)
    return WindowResult(equal_rows=chosen, losses=tuple(losses), reads=tuple(reads))

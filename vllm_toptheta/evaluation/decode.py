"""What sparse attention changes where a server uses it: in the tokens that follow a prompt, which was read densely.

For each sequence and length, one dense pass over all tokens but the last ones, the window; then the window, densely and
with every variant, behind that prefix. Its tokens are given, so all see the same ones, and every figure is paired.
Windows of several lengths lie in one sequence, that of the longest, whose prefix is read once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vllm_toptheta.calibration.data import Text, different_texts, load_sequences
from vllm_toptheta.calibration.progress import progress_bar
from vllm_toptheta.errors import EvaluationError
from vllm_toptheta.evaluation.decode_report import DecodeReport, length_report
from vllm_toptheta.evaluation.decode_state import DecodeArguments, DecodeState
from vllm_toptheta.evaluation.measuring import SequenceJob, WindowResult, check_variant
from vllm_toptheta.evaluation.state_folder import model_files
from vllm_toptheta.evaluation.subject import DecodedSubject
from vllm_toptheta.evaluation.variants import Variant, floor_label

__all__ = ["DecodeOptions", "check_options", "evaluate_decode"]


@dataclass(frozen=True)
class DecodeOptions:
    """What to measure.

    Attributes:
        lengths: tokens up to the end of a window, each with results of its own.
        num_sequences: sequences of the longest length.
        window: tokens that are decoded, at least 2.
        equal_rows: weight floors to which exact top-k is compared that reads as many value rows; its k is found for
            each length on the first sequence, see `window_reads.EqualRows`.
        seed: the same seed and texts give the same sequences.
        skip: sequences to leave out before the first, because something was chosen on them.
    """

    lengths: tuple[int, ...]
    num_sequences: int = 4
    window: int = 128
    equal_rows: tuple[float, ...] = ()
    seed: int = 0
    skip: int = 0


def evaluate_decode(
    subject: DecodedSubject,
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
        texts: held-out texts; sequences are cut from them, without overlap.
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
    matched = [floor_label(floor, field="equal_rows") for floor in options.equal_rows]
    for length in options.lengths:
        for variant in (*variants, *(Variant(target=label) for label in matched)):
            check_variant(variant, subject.stores, length=length, window=options.window, device=subject.device)
    sequences = load_sequences(
        texts,
        subject.tokenizer,
        num_sequences=options.skip + options.num_sequences,
        max_length=max(options.lengths),
        seed=options.seed,
    )[options.skip :]
    subject.check(sequences)
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
        whole = SequenceJob(
            sequences[0],
            options.window,
            tuple(variants),
            dict.fromkeys(sorted(options.lengths), dict.fromkeys(matched)),
        )
        task = bar.add_task(title, total=options.num_sequences * whole.num_rows)
        results: dict[int, list[WindowResult]] = {length: [] for length in options.lengths}
        for index, token_ids in enumerate(sequences):
            found = {length: state.load(length, index) for length in options.lengths}
            missing = {
                length: results[length][0].equal_rows if results[length] else of_length
                for length, of_length in whole.equal_rows.items()
                if found[length] is None
            }
            if missing:
                job = replace(whole, token_ids=token_ids, equal_rows=missing)
                measured = subject.measure(job, advance=lambda rows: bar.advance(task, rows))
                for length, result in zip(missing, measured, strict=True):
                    state.save(length, index, result)
                    found[length] = result
            for length, of_window in results.items():
                done = found[length]
                assert done is not None  # noqa: S101 - it was found or measured
                of_window.append(done)
            bar.update(task, completed=(index + 1) * whole.num_rows)
    reports = [
        length_report(length, variants, of_length, head_size=subject.architecture.head_size)
        for length, of_length in results.items()
    ]
    report = DecodeReport(
        setup=arguments.setup, text=arguments.text, window=options.window, seed=options.seed, lengths=tuple(reports)
    )
    state.finish(report)
    return report


def check_options(subject: DecodedSubject, options: DecodeOptions) -> None:
    """Refuses what cannot be measured.

    Args:
        subject: the model.
        options: what to measure.

    Raises:
        EvaluationError: a number cannot be, or a sequence is longer than the model's positions.
    """
    longest = subject.max_length
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

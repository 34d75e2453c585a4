"""What is known of the quality, in plain words: what is promised, by which figures, how near, and what is not known."""

from typing import NamedTuple

from vllm_toptheta.evaluation import Goal
from vllm_toptheta.report.quality import Quality
from vllm_toptheta.store import MeasuredLength, Promise, floor_label

__all__ = ["QualityVerdict", "quality_verdict"]

_NAMED_TEXTS = 3


class QualityVerdict(NamedTuple):
    """Five paragraphs.

    Attributes:
        promised: how much may be lost, up to which length, with which floor; also by presets.
        figures: what was measured of it.
        where: how far the promise is, what is read there, what the next larger floor and exact top-k lose.
        tasks: what the floor that is served solves of tasks, which promises nothing.
        unknown: what the evidence does not say.
    """

    promised: str
    figures: str
    where: str
    tasks: str
    unknown: str


def quality_verdict(quality: Quality) -> QualityVerdict:
    """Returns what is known of one mode.

    Args:
        quality: of the mode.
    """
    return QualityVerdict(*(" ".join(part(quality)) for part in (_promised, _figures, _where, _tasks, _unknown)))


def _promised(quality: Quality) -> list[str]:
    evidence = quality.evidence
    sentences = []
    for promise in evidence.promises:
        name = "" if promise.preset is None else f" ({promise.preset})"
        if promise.weight_floor is None:
            sentences.append(f"Not kept by any floor that was tried: {promise.text}{name}.")
            continue
        beginning = f"Floor {promise.weight_floor:g} keeps {promise.text} of dense attention{name}"
        if promise.max_loss is None:
            beginning = f"Floor {promise.weight_floor:g} keeps {promise.text}{name}"
        if promise is evidence.served:
            copies = "" if evidence.heavy is None else f" by copies with heavy {evidence.heavy:g}"
            sentences.append(
                f"{beginning}, in sequences of up to {promise.max_length:,} tokens: that is what a server in mode "
                f"{evidence.mode}{copies} promises and reads by."
            )
        else:
            sentences.append(f"{beginning}, for requests that name it.")
    return sentences


def _figures(quality: Quality) -> list[str]:
    evidence, promise = quality.evidence, quality.evidence.served
    texts = ", ".join(text.name for text in evidence.text[:_NAMED_TEXTS])
    if len(evidence.text) > _NAMED_TEXTS:
        texts += f" and {len(evidence.text) - _NAMED_TEXTS} more"
    return [
        f"Floor {promise.weight_floor:g} was measured on the last {evidence.window} tokens of sequences that its "
        f"choice did not see, cut from {texts}.",
        *(
            f"At {one.length:,} tokens {_lost(promise, one)}, with {evidence.confidence:.0%} confidence "
            f"({one.num_sequences} sequences, {one.num_tokens:,} predicted tokens)."
            for one in promise.measured
        ),
    ]


def _lost(promise: Promise, one: MeasuredLength) -> str:
    parts = []
    if promise.max_loss is not None:
        parts.append(
            f"perplexity changes by {one.change_percent:+.2f} +- {one.change_error:.2f} % and by less than "
            f"{one.change_bound:+.2f} %"
        )
    if promise.max_kl is not None:
        parts.append(
            f"KL to dense attention is {one.kl_divergence:.5f} +- {one.kl_error:.5f} and less than {one.kl_bound:.5f}"
        )
    return " and ".join(parts)


def _where(quality: Quality) -> list[str]:
    promise = quality.evidence.served
    sentences = []
    if promise.max_loss is not None:
        one = max(promise.measured, key=lambda one: one.change_bound)
        sentences.append(
            f"Nearest to the promise of {promise.max_loss:g} % is {one.change_bound:+.2f} % at {one.length:,} tokens."
        )
    if promise.max_kl is not None:
        one = max(promise.measured, key=lambda one: one.kl_bound)
        sentences.append(
            f"Nearest to the promise of {promise.max_kl:g} is a KL of {one.kl_bound:.5f} at {one.length:,} tokens."
        )
    reads = [
        f"{100 * one.value_rows_share:.1f} % of the value rows and {100 * one.bytes_share:.1f} % of the bytes at "
        f"{one.length:,} tokens"
        for one in promise.measured
    ]
    sentences.append(f"Of what dense attention reads, floor {promise.weight_floor:g} reads {', '.join(reads)}.")
    return sentences + _next_floor(quality) + _top_k(quality)


def _next_floor(quality: Quality) -> list[str]:
    """What the next larger floor lost; nothing without a ladder."""
    promise = quality.evidence.served
    larger = [floor for floor in quality.floors if floor > (promise.weight_floor or 0.0)]
    if not quality.floors:
        return []
    if not larger:
        return ["No larger floor was tried: one may keep the promise too."]
    label, goal = floor_label(larger[0]), Goal(promise.max_loss, promise.max_kl)
    confirmed = quality.confirmed_at(larger[0])
    if confirmed and not goal.is_kept(confirmed):
        return [f"The next larger one, {label}, was chosen and not confirmed: {goal.shortfall(label, confirmed)}."]
    measured = quality.at_floor(larger[0])
    if goal.is_kept(measured):
        return [f"The next larger one, {label}, kept it on the sequences of the choice, and was not tried further."]
    return [f"The next larger one does not keep it: {goal.shortfall(label, measured)}."]


def _top_k(quality: Quality) -> list[str]:
    """What exact top-k lost that reads as many rows as the floor that is served, if it was measured."""
    served = quality.evidence.served.weight_floor or 0.0
    of_length = {one.length: one for one in quality.at_floor(served)}
    parts = []
    for rung in quality.rungs:
        if rung.equal_rows != floor_label(served) or rung.measured.length not in of_length:
            continue
        top_k, floor = rung.measured, of_length[rung.measured.length]
        parts.append(
            f"{top_k.change_percent:+.2f} +- {top_k.change_error:.2f} % in place of {floor.change_percent:+.2f} +- "
            f"{floor.change_error:.2f} % (KL {top_k.kl_divergence:.5f} in place of {floor.kl_divergence:.5f}) at "
            f"{top_k.length:,} tokens"
        )
    if not parts:
        return []
    return [
        "Exact top-k that reads about as many value rows changes perplexity, on the sequences of the choice, by "
        f"{', '.join(parts)}."
    ]


def _tasks(quality: Quality) -> list[str]:
    served = quality.evidence.served
    if served.probes is None:
        return ["No task was tried (toptheta tune --tasks needle,key-value)."]
    sentences = ["What follows was tried with the same floor, and is shown, not promised."]
    for probe in served.probes:
        of_questions = f"of {probe.num_questions} questions"
        if probe.tells_nothing:
            sentences.append(
                f"At {probe.length:,} tokens, {probe.task} {probe.remark}, {probe.num_solved_dense} {of_questions}."
            )
            continue
        sentences.append(
            f"At {probe.length:,} tokens, {of_questions} of {probe.task}, dense attention solves "
            f"{probe.num_solved_dense} and floor {served.weight_floor:g} {probe.num_solved_sparse} "
            f"({probe.num_gained} gained, {probe.num_lost} lost), {100 * probe.difference:+.1f} points, with 95 % "
            f"confidence {100 * probe.difference_low:+.1f} to {100 * probe.difference_high:+.1f}."
        )
    return sentences


def _unknown(quality: Quality) -> list[str]:
    evidence, served = quality.evidence, quality.evidence.served
    sentences = [
        f"Nothing was measured of sequences of up to {evidence.dense_length:,} tokens, which a server leaves dense "
        f"unless min_context is set, nor of ones longer than {served.max_length:,}.",
        f"The promise is a mean over text like that measured, with the reference attention on {evidence.device} in "
        f"{evidence.dtype}: it says nothing of other texts, of single answers, or of kernels.",
    ]
    if quality.other_weights:
        sentences.insert(0, "The model that was named has other weights than those measured.")
    if quality.ladder is None:
        sentences.append(
            "The store says nothing of other floors and of layers: the record of toptheta tune does, beside the store "
            "or with --from."
        )
    elif evidence.mode == "values" and not any(rung.equal_rows for rung in quality.rungs):
        sentences.append(
            f"Exact top-k was not measured (toptheta tune --equal-rows {served.weight_floor:g}), so what thresholds "
            "lose beside it is not known."
        )
    return sentences

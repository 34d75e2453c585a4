"""What was counted in plain words: what to expect of the thresholds, and whether they are worth serving."""

from vllm_toptheta.report.findings import SurvivorReport, TargetFindings, TextFindings

__all__ = ["WORTHLESS_SPEEDUP", "verdict"]

# a kernel reaches about nine tenths of its bound, so that less than this is nothing
WORTHLESS_SPEEDUP = 1.1
# held-out text that keeps this many times the target is of another kind than what was calibrated on
_DRIFT = 1.5
_MUCH_LOST = 0.1


def verdict(report: SurvivorReport, target: TargetFindings) -> tuple[bool, str]:
    """Returns whether the thresholds may help, and a paragraph that says what to expect.

    Args:
        report: the report.
        target: one of its targets.
    """
    found = target.held_out
    longest = found.longest
    expectation = longest.expectation
    helps = expectation.attention_speedup >= WORTHLESS_SPEEDUP
    times = f"{expectation.attention_speedup:.2f}"
    if target.weight_floor is not None:
        kind = "on this text"
    else:
        kind = f"on text that it was {'in part' if report.not_held_out else 'not'} calibrated on"
    sentences = [
        f"The target {target.label} may help: attention can become at most {times} times as fast."
        if helps
        else f"The target {target.label} would not help: attention could become at most {times} times as fast, and a "
        "kernel never reaches its bound in full.",
        *_guarantee(target),
        f"A query head keeps {found.mean_survivors:.0f} keys of a row on average {kind}, and more than "
        f"{found.p95_survivors} in one row out of twenty.",
        f"The heads of a group read one cache together, so with {_length(longest.min_length, longest.max_length)} of "
        f"context {_percent(expectation.value_rows_share)} of the value rows are read"
        + (f", the {_count(len(target.dense_layers), 'dense layer')} in full." if target.dense_layers else "."),
        f"Every key is still read, so attention moves {_percent(expectation.bytes_share)} of the bytes of dense "
        f"attention. If attention takes {_percent(report.attention_share)} of a decode step, the step can become at "
        f"most {expectation.step_speedup:.2f} times as fast.",
        _lost(found),
        *_drift(target),
        *_trend(found, helps=helps),
    ]
    return helps, " ".join(sentences)


def _guarantee(target: TargetFindings) -> list[str]:
    if target.weight_floor is None:
        return []
    return [f"No key is skipped whose weight reaches {target.weight_floor:g} times the average of its row."]


def _lost(found: TextFindings) -> str:
    layer, lost = found.worst_layer
    sentence = (
        f"What is skipped holds {_percent(found.mean_lost_mass, digits=1)} of the softmax on average, and "
        f"{_percent(lost, digits=1)} in the layer that loses most (layer {layer}); it is given to the mean of the "
        "values. "
    )
    if lost > _MUCH_LOST:
        sentence += "That is a lot: consider serving that layer dense. "
    return sentence + "What it does to answers is not measured here; toptheta eval measures it."


def _drift(target: TargetFindings) -> list[str]:
    """What differs between the text calibrated on, or the k aimed at, and held-out text; nothing without a store."""
    kept = target.held_out.mean_survivors
    if target.calibration is not None:
        reference, name = target.calibration.mean_survivors, "on the calibration text"
    elif target.label == f"k:{target.dense_length}":
        reference, name = float(target.dense_length), "aimed at"
    else:
        return []
    ratio = kept / max(reference, 1e-9)
    if 1 / _DRIFT <= ratio <= _DRIFT:
        return []
    more = "more" if ratio > 1 else "fewer"
    return [
        f"Held-out text keeps {more} keys than expected ({kept:.0f} instead of the {reference:.0f} {name}): calibrate "
        "on text of the kind that you serve."
    ]


def _trend(found: TextFindings, *, helps: bool) -> list[str]:
    first, last = found.by_length[0].expectation, found.longest.expectation
    if helps or len(found.by_length) < 2 or last.value_rows_share >= first.value_rows_share:
        return []
    return ["The share that is read falls as contexts grow, so measure again with the longest that you serve."]


def _percent(share: float, *, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f} %"


def _length(least: int, most: int) -> str:
    return f"{most:,} tokens" if least == most else f"{least:,} to {most:,} tokens"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"

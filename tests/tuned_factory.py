"""Records of tune, made up, for every test that needs one."""

from __future__ import annotations

from tests.quality_factory import make_evidence
from vllm_toptheta.evaluation import DecodeReport, Tuned, Variant
from vllm_toptheta.evaluation.decode_report import DecodeComparison, LayerReads, LengthReport, LostMass, Survivors
from vllm_toptheta.evaluation.subject import Setup
from vllm_toptheta.store import Evidence, TextSource


def make_tuned(
    evidence: Evidence | None = None,
    *,
    floors: tuple[float, ...] = (0.5, 1.5, 3.0),
    lengths: tuple[int, ...] = (2048,),
    equal_rows: tuple[float, ...] = (),
    model: str = "tiny",
) -> Tuned:
    """Return a record of evidence; its floors lose a tenth of a percent each times themselves, top-k twice as much."""
    evidence = make_evidence() if evidence is None else evidence

    def report(floors: tuple[float, ...], equal_rows: tuple[float, ...] = ()) -> DecodeReport:
        return DecodeReport(
            setup=Setup(model=model, stores=(), dtype="float32", device="cpu", versions={"numpy": "2.0"}),
            text=tuple(TextSource(**text.model_dump(exclude={"num_tokens"})) for text in evidence.text),
            window=evidence.window,
            seed=0,
            lengths=tuple(
                LengthReport(
                    length=length,
                    num_sequences=8,
                    num_predicted_tokens=2040,
                    perplexity_dense=15.0,
                    comparisons=(
                        *(make_comparison(floor, length) for floor in floors),
                        *(make_comparison(floor, length, top_k=100) for floor in equal_rows),
                    ),
                )
                for length in lengths
            ),
        )

    served = evidence.served.weight_floor or 0.0
    return Tuned(evidence=evidence, ladder=report(floors, equal_rows), confirmations=(report((served,)),))


def make_comparison(floor: float, length: int, *, top_k: int | None = None) -> DecodeComparison:
    """Return what a floor cost on a ladder, or exact top-k that reads as many rows."""
    loss = 0.1 * floor * (1 if top_k is None else 2)
    label = f"floor:{floor:g}"
    survivors, lost = (
        Survivors(p50=20, p99=90, max=300),
        LostMass(mean=0.05, p99=0.2, above_half=0, above_nine_tenths=0),
    )
    return DecodeComparison(
        variant=Variant(target=label) if top_k is None else Variant(method="top_k", target=f"k:{top_k}"),
        equal_rows=None if top_k is None else label,
        change_percent=loss,
        change_standard_error=0.04,
        kl_divergence=loss / 100,
        kl_standard_error=0.0001,
        top1_agreement=0.98,
        acceptance=0.97,
        value_rows_share=0.2 / floor + 100 / length,
        keys_read_share=1.0,
        bytes_share=0.5 + 0.1 / floor + 50 / length,
        survivors=survivors,
        lost_mass=lost,
        layers=(
            LayerReads(layer=0, value_rows_share=1.0, survivors=None, lost_mass=None),
            LayerReads(layer=1, value_rows_share=0.2, survivors=survivors, lost_mass=lost),
        ),
        nll_changes=(0.001,) * 8,
    )

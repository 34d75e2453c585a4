"""Results of ranks put together."""

import numpy as np
import torch

from tests.calibration.tiny_model import random_tokens, tiny_model
from vllm_toptheta.engine.ranks import merge
from vllm_toptheta.evaluation import Variant
from vllm_toptheta.evaluation.measuring import SequenceJob, TransformersDecoder, WindowResult, measure_sequence
from vllm_toptheta.evaluation.window_reads import WindowReads

OF_KV_HEADS = ("keys", "value_rows", "copies")
OF_HEADS = ("survivors", "lost_mass")


def rank_of(whole: WindowResult, rank: int) -> WindowResult:
    """What one of two ranks would have, of a model with 4 heads and 2 kv heads."""

    def of_rank(reads: WindowReads) -> WindowReads:
        kv = {name: getattr(reads, name)[..., rank : rank + 1] for name in OF_KV_HEADS}
        heads = {name: getattr(reads, name)[..., 2 * rank : 2 * rank + 2] for name in OF_HEADS}
        return WindowReads(reads.layers, reads.sparse_layers, reads.row_lengths, **kv, **heads)

    return WindowResult(whole.equal_rows, whole.losses, tuple(of_rank(reads) for reads in whole.reads))


def test_ranks_together_are_the_whole_model() -> None:
    variants = (Variant(target="floor:1"), Variant(method="tiers", target="floor:1", heavy=0.02))
    job = SequenceJob(random_tokens(220), 16, variants, {220: {"floor:3": None}})
    (whole,) = measure_sequence(TransformersDecoder(tiny_model()), job, {})
    merged = merge([rank_of(whole, 0), rank_of(whole, 1)])
    assert (merged.equal_rows, merged.losses) == (whole.equal_rows, whole.losses)
    for found, expected in zip(merged.reads, whole.reads, strict=True):
        for name, array in vars(expected).items():
            np.testing.assert_array_equal(getattr(found, name), array, err_msg=name)
    assert merge([whole]).losses == whole.losses
    assert torch.equal(torch.from_numpy(merge([whole]).reads[0].keys), torch.from_numpy(whole.reads[0].keys))

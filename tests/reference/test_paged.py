import pytest
import torch
from torch import Tensor

from tests.reference.oracle import make_inputs
from vllm_toptheta.reference import (
    Compensation,
    dense_attention,
    gather_sequence,
    paged_top_theta_attention,
    top_theta_attention,
)

NUM_KV_HEADS, HEAD_SIZE = 2, 8
# (tokens in the cache, query tokens): decode, prefill, a chunk, padding, a single token, nothing scheduled
SEQUENCES = [(37, 1), (19, 19), (50, 7), (0, 0), (0, 2), (1, 1), (16, 0), (48, 1)]


def make_batch(
    block_size: int, layout: str, num_queries_per_kv: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, list[tuple[Tensor, Tensor, Tensor]]]:
    """A cache of permuted pages with NaN wherever nothing was written, and the sequences it holds."""
    max_blocks = -(-50 // block_size)
    num_blocks = max_blocks * len(SEQUENCES)
    if layout == "HND":
        kv_cache = torch.full((num_blocks, NUM_KV_HEADS, block_size, 2 * HEAD_SIZE), torch.nan)
    else:
        kv_cache = torch.full((num_blocks, block_size, NUM_KV_HEADS, 2 * HEAD_SIZE + 3), torch.nan)
        kv_cache = kv_cache[..., : 2 * HEAD_SIZE].transpose(1, 2)
    pages = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(7))
    block_table = torch.full((len(SEQUENCES), max_blocks), -1, dtype=torch.int32)
    sequences, next_page = [], 0
    for index, (seq_len, num_queries) in enumerate(SEQUENCES):
        query, key, value = make_inputs(
            index,
            num_queries=num_queries,
            seq_len=seq_len,
            num_kv_heads=NUM_KV_HEADS,
            num_queries_per_kv=num_queries_per_kv,
            head_size=HEAD_SIZE,
            dtype=torch.float32,
        )
        sequences.append((query, key, value))
        for block in range(-(-seq_len // block_size)):
            page = int(pages[next_page])
            next_page += 1
            block_table[index, block] = page
            tokens = torch.cat([key, value], dim=-1)[block * block_size : (block + 1) * block_size]
            kv_cache[page, :, : len(tokens)] = tokens.transpose(0, 1)
    seq_lens = torch.tensor([seq_len for seq_len, _ in SEQUENCES], dtype=torch.int32)
    starts = torch.tensor([0, *[num_queries for _, num_queries in SEQUENCES]], dtype=torch.int32).cumsum(0)
    query = torch.cat([*[query for query, _, _ in sequences], torch.full_like(sequences[1][0][:3], torch.nan)])
    return query, kv_cache, block_table, seq_lens, starts, sequences


@pytest.mark.parametrize("block_size", [5, 16])
@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("num_queries_per_kv", [1, 3, 8])
@pytest.mark.parametrize("placement", ["pre_softmax", "post_softmax"])
def test_paged_equals_contiguous(block_size: int, layout: str, num_queries_per_kv: int, placement: str) -> None:
    query, kv_cache, block_table, seq_lens, starts, sequences = make_batch(block_size, layout, num_queries_per_kv)
    num_tokens, num_heads, _ = query.shape
    threshold = torch.linspace(0.01, 0.1, num_tokens * num_heads).view(num_tokens, num_heads)
    compensation = Compensation("offline", offline_sum=threshold * 10)
    prompts = [30, 10, 46, 0, 0, 0, 3, 48]
    sinks = torch.linspace(-1.0, 1.0, num_heads)
    paged = paged_top_theta_attention(
        query,
        kv_cache,
        block_table,
        seq_lens,
        starts,
        threshold=threshold,
        target_k=6,
        softmax_scale=0.3,
        placement=placement,
        compensation=compensation,
        cap_k=20,
        logits_soft_cap=3.0,
        phase="decode",
        num_prompt_tokens=torch.tensor(prompts),
        sinks=sinks,
    )
    assert paged.survivors is None
    written = torch.zeros(num_tokens, dtype=torch.bool)
    for start, prompt, (sequence_query, key, value) in zip(starts.tolist()[:-1], prompts, sequences, strict=True):
        tokens = slice(start, start + len(sequence_query))
        if len(key) == 0 or len(sequence_query) == 0:
            continue
        written[tokens] = True
        contiguous = top_theta_attention(
            sequence_query,
            key,
            value,
            threshold=threshold[tokens],
            target_k=6,
            softmax_scale=0.3,
            placement=placement,
            compensation=Compensation("offline", offline_sum=threshold[tokens] * 10),
            cap_k=20,
            logits_soft_cap=3.0,
            phase="decode",
            num_prompt_tokens=prompt,
            sinks=sinks,
        )
        assert torch.equal(paged.thresholded[tokens], contiguous.thresholded)
        assert torch.equal(paged.num_survivors[tokens], contiguous.num_survivors)
        assert torch.equal(paged.value_rows_read[tokens], contiguous.value_rows_read)
        # the strides of what was gathered may change the order of sums, nothing else
        torch.testing.assert_close(paged.output[tokens], contiguous.output, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(paged.lost_mass[tokens], contiguous.lost_mass, rtol=1e-5, atol=1e-6)
    assert 0 < paged.thresholded.sum() < written.sum()
    for padded in (paged.output, paged.num_survivors, paged.value_rows_read, paged.lost_mass, paged.thresholded):
        assert torch.all(padded[~written] == 0)


def test_threshold_of_minus_infinity_is_dense() -> None:
    query, kv_cache, block_table, seq_lens, starts, sequences = make_batch(16, "HND", 3)
    paged = paged_top_theta_attention(
        query, kv_cache, block_table, seq_lens, starts, threshold=-torch.inf, target_k=6, softmax_scale=0.3
    )
    prefill = dense_attention(*sequences[1], softmax_scale=0.3)
    torch.testing.assert_close(paged.output[1:20], prefill.output, rtol=1e-5, atol=1e-6)
    assert torch.all(paged.lost_mass == 0)


def test_gathering_gives_back_what_was_written() -> None:
    _, kv_cache, block_table, _, _, sequences = make_batch(16, "NHD", 1)
    for block_row, (seq_len, _), (_, key, value) in zip(block_table, SEQUENCES, sequences, strict=True):
        gathered_key, gathered_value = gather_sequence(kv_cache, block_row, seq_len)
        assert torch.equal(gathered_key, key)
        assert torch.equal(gathered_value, value)


def test_what_does_not_fit_is_named() -> None:
    query, kv_cache, block_table, seq_lens, starts, _ = make_batch(16, "HND", 1)
    arguments = {"threshold": 0.5, "target_k": 6, "softmax_scale": 0.3}
    with pytest.raises(ValueError, match="^seq_lens: 50 tokens need 4 blocks, the table has 3"):
        paged_top_theta_attention(query, kv_cache, block_table[:, :3], seq_lens, starts, **arguments)
    with pytest.raises(ValueError, match="^kv_cache: "):
        paged_top_theta_attention(query[..., :4], kv_cache, block_table, seq_lens, starts, **arguments)
    arguments["threshold"] = torch.zeros(4)
    with pytest.raises(ValueError, match="^threshold: "):
        paged_top_theta_attention(query, kv_cache, block_table, seq_lens, starts, **arguments)

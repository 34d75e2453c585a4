from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma2Config

from tests.calibration.tiny_model import random_tokens, tiny_model
from tests.evaluation.tiny_store import tiny_store
from vllm_toptheta.calibration.model import hidden_states, overriding_attention
from vllm_toptheta.calibration.override import DenseOverride
from vllm_toptheta.errors import EvaluationError
from vllm_toptheta.evaluation import Variant, decoding
from vllm_toptheta.evaluation.decoding import Lane, decode_greedily, read_prompt
from vllm_toptheta.evaluation.losses import next_token_logits
from vllm_toptheta.evaluation.sparse import SparseAttention
from vllm_toptheta.evaluation.sparse_override import ReadCounts, SparseOverride
from vllm_toptheta.reference import Phase
from vllm_toptheta.store import ThresholdStore

PROMPT, NEW = 60, 40
LONG_PROMPT = 150  # longer than there are anchors


def sliding_model() -> Any:
    """Every other layer sees 16 tokens, scores are capped, and the head caps its logits."""
    config = Gemma2Config(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=16,
        query_pre_attn_scalar=16,
        initializer_range=0.2,
        pad_token_id=0,
        eos_token_id=None,
        bos_token_id=None,
    )
    return tiny_model(config)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The logits of every step that is decoded, the prompt's first."""
    recorded: list[Tensor] = []
    next_logits = decoding._next_logits

    def record(*arguments: Any) -> Tensor:
        logits = next_logits(*arguments)
        recorded.append(logits[-1])  # of the last lane
        return logits

    monkeypatch.setattr(decoding, "_next_logits", record)
    return recorded


def check(
    model: Any, attention: SparseAttention, steps: list[Tensor], *, prompt: int = PROMPT, largest_change: float | None
) -> None:
    """Decodes greedily, then reads prompt and continuation at once: both give the same logits."""
    steps.clear()
    prompt_ids = random_tokens(prompt)
    read = read_prompt(model, prompt_ids, attention)
    (tokens,) = decode_greedily(model, [Lane(read, attention)], max_new_tokens=NEW)
    decoded = torch.stack(steps)
    assert tokens == decoded.argmax(dim=-1).tolist()
    again = decode_greedily(model, [Lane(read, attention)], max_new_tokens=NEW)
    assert again == [tokens], "a prompt is used up by decoding"

    whole = torch.cat([prompt_ids, torch.tensor(tokens)])
    override = SparseOverride(attention, num_prompt_tokens=prompt, counts=ReadCounts(len(whole)))
    logits = {}
    for name, chosen in (("sparse", override), ("dense", DenseOverride())):
        with overriding_attention(model, chosen):
            logits[name] = next_token_logits(model, hidden_states(model, whole)[prompt - 1 : -1])
    torch.testing.assert_close(decoded, logits["sparse"], rtol=1e-3, atol=1e-3)
    change = float((logits["sparse"] - logits["dense"]).abs().max())
    assert change == 0 if largest_change is None else change > largest_change


@pytest.mark.parametrize("phase", ["decode", "both", "prefill"])
@pytest.mark.parametrize(
    "variant",
    [
        Variant(target="k:8"),
        Variant(target="k:8", compensation="scaled_exp_threshold+vmc"),
        Variant(target="k:8", compensation="offline"),
        Variant(method="top_k", target="k:8", compensation="none"),
        Variant(target="k:8", cap_k=4),
        Variant(target="floor:3", dense_layers=()),
        Variant(method="shadow", target="floor:3", compensation="candidates+vmc"),
        Variant(method="shadow", target="floor:3", compensation="shadow+vmc"),
    ],
    ids=["exact", "scaled", "offline", "top-k", "capped", "relative", "shadow", "shadow scores"],
)
def test_decoding_equals_the_rows_of_a_whole_text(
    model: Any, store: ThresholdStore, steps: list[Tensor], variant: Variant, phase: Phase
) -> None:
    is_relative = variant.weight_floor is not None
    needs_store = not is_relative or variant.method == "shadow"
    prompt = LONG_PROMPT if is_relative else PROMPT
    attention = SparseAttention(variant, store if needs_store else None, max_length=prompt + NEW, phase=phase)
    check(model, attention, steps, prompt=prompt, largest_change=0.01 if is_relative else 0.1)


def test_decoding_knows_sliding_windows(steps: list[Tensor], tmp_path: Path) -> None:
    model = sliding_model()
    everything = tiny_store(tmp_path / "dense", model, only_layers=(1, 3), keep_everything=True)
    check(model, SparseAttention(Variant(target="k:8"), everything, max_length=100), steps, largest_change=None)
    sparse = tiny_store(tmp_path / "sparse", model, only_layers=(1, 3))
    check(model, SparseAttention(Variant(target="k:8"), sparse, max_length=100), steps, largest_change=0.01)


def test_dense_decoding_is_the_models_own(model: Any) -> None:
    prompt_ids = random_tokens(PROMPT)
    (tokens,) = decode_greedily(model, [Lane(read_prompt(model, prompt_ids))], max_new_tokens=NEW)
    with torch.inference_mode():
        generated = model.generate(
            prompt_ids[None],
            attention_mask=torch.ones(1, PROMPT),
            do_sample=False,
            max_new_tokens=NEW,
            pad_token_id=0,
        )
    assert generated[0, PROMPT:].tolist() == tokens


def test_lanes_do_not_know_of_each_other(model: Any, store: ThresholdStore) -> None:
    prompt_ids = random_tokens(PROMPT)
    lanes = [Lane(read_prompt(model, prompt_ids))]
    for phase in ("decode", "both"):
        for compensation in ("none", "sdc+vmc"):
            variant = Variant(target="k:8", compensation=compensation)
            attention = SparseAttention(variant, store, max_length=PROMPT + NEW, phase=phase)
            lanes.append(Lane(read_prompt(model, prompt_ids, attention), attention))
    together = decode_greedily(model, lanes, max_new_tokens=NEW)
    alone = [decode_greedily(model, [lane], max_new_tokens=NEW)[0] for lane in lanes]
    assert together == alone
    assert len({tuple(tokens) for tokens in together}) > 2


def test_lanes_stop_where_they_are_told(model: Any) -> None:
    lanes = [Lane(read_prompt(model, random_tokens(PROMPT, seed))) for seed in range(2)]
    first, second = decode_greedily(model, lanes, max_new_tokens=10)
    assert decode_greedily(model, lanes, max_new_tokens=1) == [first[:1], second[:1]]

    def is_complete(tokens: list[int]) -> bool:
        return len(tokens) == 3 and tokens[0] == first[0]

    assert first[0] != second[0]
    assert decode_greedily(model, lanes, max_new_tokens=10, is_complete=is_complete) == [first[:3], second]


def test_a_row_longer_than_the_attention_is_made_for_is_refused(model: Any, store: ThresholdStore) -> None:
    attention = SparseAttention(Variant(target="k:8"), store, max_length=PROMPT)
    prompt = read_prompt(model, random_tokens(PROMPT), attention)
    with pytest.raises(EvaluationError, match="a row of 61 keys, made for 60"):
        decode_greedily(model, [Lane(prompt, attention)], max_new_tokens=2)

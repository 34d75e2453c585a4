"""What the V2 runner's drafts are made of, step by step; the model, the pages and the graphs are stood in for."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import CUDAGraphMode

pytest.importorskip("vllm.v1.worker.gpu.spec_decode.target_dependent_ar", reason="vLLM has it since 0.32")

from vllm.v1.worker.gpu.input_batch import InputBuffers

from vllm_toptheta.backend.drafts import v2_runner
from vllm_toptheta.backend.drafts.v2_runner import NOBODY, SelfSpeculator

VOCABULARY, LONGEST, ROWS, DRAFTS = 97, 64, 6, 4


def follower(token: int, position: int) -> int:
    """What the model says next."""
    return (31 * token + 7 * position + 5) % VOCABULARY


class Model:
    def __call__(self, *, input_ids: Any, positions: Any, inputs_embeds: None, intermediate_tensors: None) -> Any:
        return torch.stack((input_ids.long(), positions), dim=1)

    def compute_logits(self, states: torch.Tensor) -> torch.Tensor:
        best = [follower(token, position) for token, position in states.tolist()]
        return torch.nn.functional.one_hot(torch.tensor(best), VOCABULARY).float()


class Subject(SelfSpeculator):
    """Without an engine; keeps what each step is told."""

    def __init__(self) -> None:
        self.vllm_config = SimpleNamespace(model_config=SimpleNamespace(max_model_len=LONGEST))
        # in 0.32 an attribute, and a property later
        if not isinstance(getattr(SelfSpeculator, "max_model_len", None), property):
            self.max_model_len = LONGEST
        self.device = torch.device("cpu")
        self.max_num_reqs, self.num_speculative_steps = ROWS, DRAFTS
        self.input_buffers = InputBuffers(ROWS, 128, self.device)
        self.idx_mapping = torch.zeros(ROWS, dtype=torch.int64)
        self.temperature, self.seeds = torch.zeros(ROWS), torch.zeros(ROWS, dtype=torch.int64)
        self.draft_tokens = torch.zeros(ROWS, DRAFTS, dtype=torch.int64)
        self.sample_positions = torch.zeros(ROWS, dtype=torch.int64)
        self.draft_step = torch.zeros((), dtype=torch.int64)
        self.draft_logits = self.acceptance_estimator = self.graphs = None
        self.use_local_argmax_reduction = False
        self.model = Model()
        self.kv_cache_config = SimpleNamespace(kv_cache_groups=[SimpleNamespace(layer_names=["layer"])])
        self.block_tables = SimpleNamespace(compute_slot_mappings=self.slots_of)
        self.steps: list[dict[str, Any]] = []

    def slots_of(self, rows: torch.Tensor, starts: torch.Tensor, positions: torch.Tensor, num_tokens: int) -> Any:
        assert starts.tolist() == list(range(len(rows) + 1))
        written = [(row, position) for row, position in zip(rows.tolist(), positions.tolist(), strict=True)]
        lengths = self.input_buffers.seq_lens.tolist()
        self.steps.append({"written": [one for one in written if one[0] != NOBODY], "lengths": lengths})
        return torch.zeros(1, num_tokens, dtype=torch.int64)

    def _build_uniform_attn_metadata(self, **of_step: Any) -> dict[str, Any]:
        self.steps[-1] |= of_step
        return {"layer": "sparse"}


@pytest.fixture
def subject(monkeypatch: pytest.MonkeyPatch) -> Subject:
    made = Subject()

    def context(metadata: Any, config: Any, **named: Any) -> Any:
        if metadata is not None:
            made.steps[-1]["context"] = (metadata, named["slot_mapping"].keys(), named["cudagraph_runtime_mode"])
        return nullcontext()

    monkeypatch.setattr(v2_runner, "set_forward_context", context)
    return made


def batch(lengths: list[int], rows: list[int]) -> Any:
    return SimpleNamespace(
        num_reqs=len(rows),
        idx_mapping=torch.tensor(rows),
        seq_lens=torch.tensor(lengths + [0] * (ROWS - len(rows)), dtype=torch.int32),
        seq_lens_cpu_upper_bound=torch.tensor(lengths, dtype=torch.int32),
        has_structured_output_reqs=False,
    )


def propose(subject: Subject, step: Any, sampled: list[int], rejected: list[int], **named: Any) -> list[list[int]]:
    last = torch.tensor([[11 * (row + 1)] for row in range(ROWS)])
    found = subject.propose(
        step,
        {},
        {},
        torch.empty(0),
        None,
        torch.tensor(sampled, dtype=torch.int32),
        torch.tensor(rejected, dtype=torch.int32),
        last,
        torch.empty(0),
        torch.zeros(ROWS),
        torch.zeros(ROWS, dtype=torch.int64),
        **named,
    )
    drafts: list[list[int]] = found.tolist()
    return drafts


def chain(row: int, position: int, count: int) -> list[int]:
    tokens = [11 * (row + 1)]
    for step in range(count):
        tokens.append(follower(tokens[-1], position + step))
    return tokens[1:]


def test_drafts_follow_what_is_confirmed(subject: Subject) -> None:
    # requests stand in rows of their own; of nine and thirty tokens, three and none were rejected
    drafts = propose(subject, batch([9, 30], [4, 1]), [2, 5], [3, 0])
    assert drafts == [chain(4, 6, DRAFTS), chain(1, 30, DRAFTS)]
    assert [step["written"] for step in subject.steps] == [[(4, 6 + i), (1, 30 + i)] for i in range(DRAFTS)]
    # those behind are of nobody, in graphs of more rows too
    assert [step["lengths"] for step in subject.steps] == [[7 + i, 31 + i, 0, 0, 0, 0] for i in range(DRAFTS)]
    for index, step in enumerate(subject.steps):
        assert step["context"] == ({"layer": "sparse"}, {"layer"}, CUDAGraphMode.NONE)
        assert (step["num_reqs"], step["num_query_per_req"], step["step"]) == (2, 1, index + 1)


def test_prompts_that_are_not_done_draft_nothing(subject: Subject) -> None:
    propose(subject, batch([9, 30], [4, 1]), [0, 1], [0, 0])
    assert [step["written"] for step in subject.steps] == [[(1, 30 + i)] for i in range(DRAFTS)]
    assert [step["lengths"][0] for step in subject.steps] == [0] * DRAFTS


def test_nothing_is_written_behind_the_longest_sequence(subject: Subject) -> None:
    drafts = propose(subject, batch([62, 30, 64], [4, 1, 0]), [1, 1, 1], [0, 0, 0])
    assert [step["written"] for step in subject.steps] == [
        [(4, 62), (1, 30)],
        [(4, 63), (1, 31)],
        [(1, 32)],
        [(1, 33)],
    ]
    assert [step["lengths"][0] for step in subject.steps] == [63, 64, 0, 0]
    assert drafts[0][:2] == chain(4, 62, 2)
    assert drafts[1] == chain(1, 30, DRAFTS)
    # the next batch has all of its rows again
    subject.steps.clear()
    assert propose(subject, batch([30], [4]), [1], [0]) == [chain(4, 30, DRAFTS)]


@pytest.mark.parametrize("count", [0, 2])
def test_fewer_drafts(subject: Subject, count: int) -> None:
    drafts = propose(subject, batch([9], [4]), [1], [0], num_speculative_tokens=count)
    assert len(subject.steps) == count
    assert drafts[0][:count] == chain(4, 9, count)


def test_drafts_that_a_grammar_may_cut_are_taken_as_given(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    subject.draft_logits = torch.full((ROWS, DRAFTS, VOCABULARY), 0.5, dtype=torch.float16)
    monkeypatch.setattr(
        SelfSpeculator, "sample_draft", lambda self, states, *_: self.model.compute_logits(states).argmax(1)
    )
    step = batch([9, 30], [4, 1])
    propose(subject, step, [1, 1], [0, 0], num_speculative_tokens=3)
    assert (subject.draft_logits == 0.5).all()
    step.has_structured_output_reqs = True
    drafts = propose(subject, step, [1, 1], [0, 0], num_speculative_tokens=3)
    for row, drafted in zip((4, 1), drafts, strict=True):
        probabilities = (subject.draft_logits[row, :3].float() / 0.01).softmax(dim=1)
        assert torch.equal(probabilities, torch.nn.functional.one_hot(torch.tensor(drafted[:3]), VOCABULARY).float())
    others = torch.ones(ROWS, DRAFTS, dtype=torch.bool)
    others[[4, 1], :3] = False
    assert (subject.draft_logits[others] == 0.5).all()


def test_profiling_has_no_pages(subject: Subject) -> None:
    del subject.block_tables
    drafts = propose(
        subject, batch([9, 8], [0, 1]), [1, 1], [0, 0], dummy_run=True, skip_attn_for_dummy_run=True, is_profile=True
    )
    assert len(drafts) == 2
    assert subject.steps == []


def test_a_step_is_replayed_where_there_is_a_graph(subject: Subject) -> None:
    shape, replayed = SimpleNamespace(cg_mode=CUDAGraphMode.FULL, num_tokens=4, num_reqs=4), []

    def dispatch(num_reqs: int, num_tokens: int, *, uniform_token_count: int, num_active_loras: int) -> Any:
        assert (num_reqs, num_tokens, uniform_token_count, num_active_loras) == (3, 3, 1, 0)
        return shape

    def replay(desc: Any) -> None:
        assert desc is shape
        replayed.append(int(subject.draft_step))
        subject._draft(4, 4, None, None, None, CUDAGraphMode.NONE)  # what was captured, of four rows

    subject.graphs = SimpleNamespace(dispatch=dispatch, run_fullgraph=replay)  # type: ignore[assignment]
    drafts = propose(subject, batch([9, 30, 12], [4, 1, 2]), [1, 1, 1], [0, 0, 0])
    assert replayed == list(range(DRAFTS))
    assert drafts == [chain(4, 9, DRAFTS), chain(1, 30, DRAFTS), chain(2, 12, DRAFTS)]
    assert all(step["batch_desc"] is shape for step in subject.steps)


@pytest.mark.parametrize(
    ("sizes", "max_num_seqs", "mode", "planned"),
    [
        ([7, 14, 84], 12, CUDAGraphMode.FULL_AND_PIECEWISE, [1, 2, 4, 8, 12]),
        ([7, 14, 504], 256, CUDAGraphMode.FULL, [1, 2, 4, *range(8, 257, 8)]),
        ([5], 8, CUDAGraphMode.FULL_DECODE_ONLY, [1, 2, 4, 5]),
        ([7, 84], 12, CUDAGraphMode.PIECEWISE, None),
        ([], 12, CUDAGraphMode.FULL, []),
    ],
)
def test_graphs_are_planned_by_numbers_of_sequences(
    monkeypatch: pytest.MonkeyPatch,
    subject: Subject,
    sizes: list[int],
    max_num_seqs: int,
    mode: CUDAGraphMode,
    planned: list[int] | None,
) -> None:
    made: list[Any] = []
    monkeypatch.setattr(
        v2_runner,
        "SpeculatorCudaGraphManager",
        lambda config, device, mode, *, decode_query_len: made.append((config, mode, decode_query_len)),
    )
    subject.max_num_reqs = max_num_seqs
    compilation = SimpleNamespace(cudagraph_capture_sizes=sizes, max_cudagraph_capture_size=1)
    subject.vllm_config.compilation_config = compilation
    subject.init_cudagraph_manager(mode)
    ((config, own_mode, tokens),) = made
    assert tokens == 1
    assert own_mode == (CUDAGraphMode.NONE if planned is None else CUDAGraphMode.FULL_DECODE_ONLY)
    if planned is not None:
        assert config.compilation_config.cudagraph_capture_sizes == planned
    # the engine's own are left as they are
    assert compilation.cudagraph_capture_sizes is sizes

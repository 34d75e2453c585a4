from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vllm_toptheta.calibration.data import tokenise
from vllm_toptheta.errors import TargetOutOfRange
from vllm_toptheta.evaluation import Subject, Variant
from vllm_toptheta.evaluation.decoding import Lane, decode_greedily, read_prompt
from vllm_toptheta.evaluation.sparse import SparseAttention
from vllm_toptheta.evaluation.tasks import LocalAnswers, Question
from vllm_toptheta.reference import Phase
from vllm_toptheta.store import ThresholdStore

VARIANTS = [Variant(target="k:8"), Variant(target="k:8", compensation="none"), Variant(target="k:32")]
QUESTION = Question("q", "a rather long prompt, of more than eight and of more than thirty-two letters", 12, ())


@pytest.fixture(scope="module")
def subject(folder: Path, store: ThresholdStore) -> Subject:
    return Subject(folder / "tiny", {"": store}, device="cpu")


@pytest.mark.parametrize("phase", ["decode", "both"])
def test_answers_are_what_decoding_gives(subject: Subject, store: ThresholdStore, phase: Phase) -> None:
    answers = LocalAnswers(subject, VARIANTS, phase=phase)(QUESTION)
    token_ids = torch.tensor(tokenise(subject.tokenizer, QUESTION.prompt))
    assert answers.num_prompt_tokens == len(token_ids)
    expected = []
    for variant in (None, *VARIANTS):
        attention = variant and SparseAttention(variant, store, max_length=200, phase=phase)
        prompt = read_prompt(subject.model, token_ids, attention)
        (tokens,) = decode_greedily(subject.model, [Lane(prompt, attention)], max_new_tokens=12)
        expected.append(subject.tokenizer.decode(tokens))
    assert [answers.dense, *answers.sparse] == expected
    assert len(set(expected)) > 1


def test_copies_answer_behind_dense_prompts(subject: Subject) -> None:
    variant = Variant(method="tiers", target="floor:100", heavy=0.5)
    question = replace(QUESTION, prompt=QUESTION.prompt * 3)
    answers = LocalAnswers(subject, [variant])(question)
    prompt = read_prompt(subject.model, torch.tensor(tokenise(subject.tokenizer, question.prompt)))
    lane = Lane(prompt, SparseAttention(variant, max_length=300))
    (tokens,) = decode_greedily(subject.model, [lane], max_new_tokens=12)
    assert answers.sparse == (subject.tokenizer.decode(tokens),)
    assert answers.sparse != (answers.dense,)


def test_an_answer_ends_at_a_stop_text(subject: Subject) -> None:
    answer = LocalAnswers(subject, VARIANTS[:1])
    whole = answer(QUESTION).dense
    stop = whole[5]
    stopped = answer(replace(QUESTION, stop=(stop,))).dense
    assert stopped == whole[: whole.index(stop)]


def test_a_target_that_was_not_calibrated_is_refused_before_anything_is_asked(subject: Subject) -> None:
    with pytest.raises(TargetOutOfRange):
        LocalAnswers(subject, [Variant(target="k:4")])


def test_longer_questions_follow_shorter_ones(subject: Subject) -> None:
    answer = LocalAnswers(subject, VARIANTS[:1])
    first = answer(QUESTION)
    longer = answer(replace(QUESTION, prompt=QUESTION.prompt * 5))
    assert longer.num_prompt_tokens == 5 * first.num_prompt_tokens
    assert answer(QUESTION) == first

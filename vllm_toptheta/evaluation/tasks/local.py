"""Answers by the model at hand: decoded token by token through transformers, dense and with every variant."""

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from vllm_toptheta.calibration.data import prompt_prefix, tokenise
from vllm_toptheta.calibration.model_input import check_input
from vllm_toptheta.calibration.plausible import check_understanding
from vllm_toptheta.evaluation.decoding import Lane, decode_greedily, read_prompt
from vllm_toptheta.evaluation.sparse import SparseAttention
from vllm_toptheta.evaluation.subject import Subject
from vllm_toptheta.evaluation.tasks.task import Answers, Question, cut_at_stop
from vllm_toptheta.evaluation.variants import Variant, store_of
from vllm_toptheta.reference import Phase

__all__ = ["LocalAnswers"]

_ANCHOR_TOKENS = 4


class LocalAnswers:
    """Answers questions greedily.

    Where prompts are dense, a prompt is read once for all variants.

    Args:
        subject: the model, and the stores that the variants name.
        variants: what to compare with dense attention.
        phase: which rows are thresholded.

    Raises:
        StoreError: a store lacks what a variant needs.
    """

    def __init__(self, subject: Subject, variants: Sequence[Variant], *, phase: Phase = "decode") -> None:
        self._subject = subject
        self._variants = variants
        self._phase = phase
        self._max_length = 1
        self._is_checked = False
        self._attentions = self._make_attentions()

    def __call__(self, question: Question) -> Answers:
        """Returns the answers to a question, one of each variant.

        Raises:
            CalibrationError: the question is longer than the model reads, or the model does not understand it.
        """
        tokenizer = self._subject.tokenizer
        token_ids = torch.tensor([*prompt_prefix(tokenizer), *tokenise(tokenizer, question.prompt)])
        if len(token_ids) + question.max_new_tokens > self._max_length:
            # with some room, so that a slightly longer question needs nothing new
            self._max_length = 2 * (len(token_ids) + question.max_new_tokens)
            self._attentions = self._make_attentions()
        model = self._subject.model
        # as long as the row gets; what is generated are tokens that the model knows
        check_input(model, torch.cat([token_ids, token_ids.new_zeros(question.max_new_tokens)]))
        if not self._is_checked:
            check_understanding(model, [token_ids], model_dir=self._subject.model_dir)
            self._is_checked = True
        dense_prompt = read_prompt(model, token_ids)
        lanes = [Lane(dense_prompt)]
        for attention in self._attentions:
            prompt = dense_prompt if self._phase == "decode" else read_prompt(model, token_ids, attention)
            lanes.append(Lane(prompt, attention))
        decoded = decode_greedily(
            model,
            lanes,
            max_new_tokens=question.max_new_tokens,
            is_complete=lambda tokens: (
                tokens[-1] in self._end_ids
                or (text := self._text(token_ids, tokens)) != cut_at_stop(text, question.stop)
            ),
        )
        dense, *sparse = (cut_at_stop(self._text(token_ids, tokens), question.stop) for tokens in decoded)
        return Answers(len(token_ids), dense, tuple(sparse))

    def token_counter(self, sample: str) -> Callable[[str], float]:
        """Returns what counts the tokens of a text."""
        return lambda text: len(tokenise(self._subject.tokenizer, text))

    def _make_attentions(self) -> list[SparseAttention]:
        # dense prompts are read without these, and tiers are of every row
        phase: Phase = "both" if self._phase == "decode" else self._phase
        return [
            SparseAttention(
                variant,
                store_of(variant, self._subject.stores),
                max_length=self._max_length,
                phase=phase,
                device=self._subject.model.device,
            )
            for variant in self._variants
        ]

    @cached_property
    def _end_ids(self) -> set[int]:
        configured = getattr(self._subject.model.generation_config, "eos_token_id", None)
        ids = configured if isinstance(configured, list) else [configured]
        return {token for token in (*ids, self._subject.tokenizer.eos_token_id) if token is not None}

    def _text(self, prompt_ids: Tensor, tokens: list[int]) -> str:
        # some tokenizers drop the space that a text starts with, and indentation with it
        anchor = prompt_ids[-_ANCHOR_TOKENS:].tolist()
        return self._decode(anchor + tokens)[len(self._decode(anchor)) :]

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._subject.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

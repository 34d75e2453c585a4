"""Drafts in vLLM's V1 runner, which is that of CPUs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from vllm.config import CUDAGraphMode
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p
from vllm.v1.spec_decode.draft_model import DraftModelProposer
from vllm.v1.spec_decode.utils import PADDING_SLOT_ID

GREEDY = 1e-5  # temperature below which vLLM takes the most likely token


def as_certain(probabilities: torch.Tensor, drafted: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """Probabilities for verification, in which some sequences' drafts are what could not have been drawn otherwise.

    A grammar cuts drafts that it does not allow before they are verified, and what is sampled in their place comes from
    the model alone. That is right only if it does not matter how likely drafts were: compared by their probabilities,
    tokens that are drafted often would be sampled too often. A draft that is certain is accepted with the model's own
    probability.

    Args:
        probabilities: [num_reqs, num_drafts, vocab_size] float32, written in place.
        drafted: [num_reqs, num_drafts] integers.
        rows: The sequences that a grammar may cut.
    """
    if rows:
        probabilities[rows] = 0.0
        probabilities[rows] = probabilities[rows].scatter(2, drafted[rows].long()[:, :, None], 1.0)
    return probabilities


class SelfDrafts(DraftModelProposer):
    """What the V1 runner makes, by the name of its base class, for an engine whose draft model is the served one."""

    def __init__(self, vllm_config: Any, device: torch.device, runner: Any = None) -> None:
        super().__init__(vllm_config, device, runner)
        self._runner = runner
        self._idle: torch.Tensor | None = None

    def load_model(self, target_model: torch.nn.Module) -> None:
        """Takes the served model; there are no weights of its own."""
        self.model = target_model
        self.supports_mm_inputs = False
        self._draft_attn_layer_names: set[str] = set()

    def validate_same_kv_cache_group(self, kv_cache_config: Any) -> None:
        """Nothing: layers may have pages of several kinds."""

    def initialize_attn_backend(self, kv_cache_config: Any, kernel_block_sizes: list[int] | None = None) -> None:
        """Takes the runner's own metadata builders and pages."""
        self.kv_cache_gid = 0
        self._block_sizes = [group.kv_cache_spec.block_size for group in kv_cache_config.kv_cache_groups]

    def dummy_run(self, *arguments: Any, **named: Any) -> None:
        """Nothing: the served model's own is the same."""

    def prepare_next_token_ids_padded(
        self, sampled_token_ids: torch.Tensor, requests: Any, gpu_input_batch: Any, discard_request_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # the runner says here, and nowhere else, whose prompts are not done
        self._idle = discard_request_mask[: len(sampled_token_ids)]
        return super().prepare_next_token_ids_padded(sampled_token_ids, requests, gpu_input_batch, discard_request_mask)

    def propose(
        self,
        num_speculative_tokens: int,
        target_token_ids: torch.Tensor,
        target_positions: torch.Tensor,
        target_hidden_states: torch.Tensor,
        next_token_ids: torch.Tensor,
        token_indices_to_sample: torch.Tensor | None,
        common_attn_metadata: CommonAttentionMetadata,
        sampling_metadata: Any,
        mm_embed_inputs: Any = None,
        num_rejected_tokens_gpu: torch.Tensor | None = None,
        slot_mappings: Any = None,
    ) -> torch.Tensor:
        """Drafts for every sequence of a step.

        Args:
            num_speculative_tokens: Tokens to draft.
            target_token_ids, target_positions, target_hidden_states: Unused; of the step before.
            next_token_ids: [num_reqs], sampled last.
            token_indices_to_sample: Unused.
            common_attn_metadata: Of the step before, whose lengths hold rejected tokens.
            sampling_metadata: Says how to sample.
            mm_embed_inputs, slot_mappings: Unused.
            num_rejected_tokens_gpu: [num_reqs]; None if nothing was verified.

        Returns:
            [num_reqs, num_speculative_tokens].
        """
        self.num_speculative_tokens, self._last_draft_probs = num_speculative_tokens, None
        num_reqs = common_attn_metadata.num_reqs
        lengths = common_attn_metadata.seq_lens[:num_reqs].clone()
        if num_rejected_tokens_gpu is not None:
            lengths -= num_rejected_tokens_gpu[:num_reqs]
        drafts = [next_token_ids[:num_reqs].to(torch.int32)]
        probabilities = []
        for _ in range(num_speculative_tokens):
            positions = lengths.long()
            lengths = lengths + 1
            hidden_states = self._run(drafts[-1], positions, self._step(common_attn_metadata, lengths))
            token_ids, of_step = self._sample_draft_tokens(hidden_states, sampling_metadata)
            drafts.append(token_ids.to(torch.int32))
            if of_step is not None:
                probabilities.append(of_step)
        drafted = torch.stack(drafts[1:], dim=1) if len(drafts) > 1 else next_token_ids.new_empty(num_reqs, 0)
        if probabilities:
            self._last_draft_probs = as_certain(torch.stack(probabilities, dim=1), drafted, self._structured_rows())
        return drafted

    def _structured_rows(self) -> list[int]:
        """Where requests stand whose texts have to follow a grammar."""
        requests, names = self._runner.requests, self._runner.input_batch.req_ids
        return [row for row, name in enumerate(names) if requests[name].sampling_params.structured_outputs]

    def _sample_from_logits(
        self, logits: torch.Tensor, sampling_metadata: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Tokens by temperature, top-k and top-p, as verification has them; vLLM's own knows the temperature only.

        Args:
            logits: [num_reqs, vocab_size], may be written.
            sampling_metadata: The batch's.

        Returns:
            [num_reqs], and [num_reqs, vocab_size] float32, the probabilities by which they were drawn.
        """
        top_k, top_p = sampling_metadata.top_k, sampling_metadata.top_p
        if not sampling_metadata.all_greedy and (top_k is not None or top_p is not None):
            is_greedy = sampling_metadata.temperature < GREEDY
            temperature = sampling_metadata.temperature.masked_fill(is_greedy, 1.0)
            logits = apply_top_k_top_p(logits.float() / temperature[:, None], top_k, top_p)
            # which is then done, except for those that take the most likely token
            sampling_metadata = replace(sampling_metadata, temperature=(~is_greedy).float())
        return super()._sample_from_logits(logits, sampling_metadata)

    def _step(self, common: CommonAttentionMetadata, lengths: torch.Tensor) -> CommonAttentionMetadata:
        """Metadata of a step of one token per sequence; those that are idle have no token in it."""
        num_reqs = common.num_reqs
        if self._idle is not None:
            lengths = lengths.masked_fill(self._idle, 0)
        return replace(
            common,
            query_start_loc=self.arange[: num_reqs + 1],
            query_start_loc_cpu=torch.arange(num_reqs + 1, dtype=torch.int32),
            seq_lens=lengths,
            num_actual_tokens=num_reqs,
            max_query_len=1,
            max_seq_len=min(common.max_seq_len + self.num_speculative_tokens, self.max_model_len),
        )

    def _run(self, token_ids: torch.Tensor, positions: torch.Tensor, common: CommonAttentionMetadata) -> torch.Tensor:
        """Hidden states of one token per sequence."""
        metadata: dict[str, Any] = {}
        slots: dict[str, torch.Tensor] = {}
        # layers with windows have pages of another kind
        for index, (groups, size) in enumerate(zip(self._runner.attn_groups, self._block_sizes, strict=True)):
            table = self._runner.input_batch.block_table[index].get_device_tensor(len(positions))
            written = table.gather(1, positions[:, None] // size).flatten().long() * size + positions % size
            if self._idle is not None:
                written = written.masked_fill(self._idle, PADDING_SLOT_ID)
            step = replace(common, block_table_tensor=table, slot_mapping=written)
            for group in groups:
                built = group.build_metadata_for_drafting(step, draft_index=0)
                metadata |= dict.fromkeys(group.layer_names, built)
                slots |= dict.fromkeys(group.layer_names, written)
        with set_forward_context(
            metadata,
            self.vllm_config,
            num_tokens=len(token_ids),
            cudagraph_runtime_mode=CUDAGraphMode.NONE,
            slot_mapping=slots,
        ):
            states = self.model(input_ids=token_ids, positions=positions, inputs_embeds=None)
        return states if isinstance(states, torch.Tensor) else states[0]

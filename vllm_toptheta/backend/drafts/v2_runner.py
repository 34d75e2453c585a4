"""Drafts in vLLM's V2 runner (0.32 and 0.33), which is that of GPUs: nothing here waits for the device.

The runner's own metadata builders make dense steps; a second set, for the same layers and pages, makes those of drafts.
A step of drafts is one token per sequence whatever was verified before, so each batch size has one captured graph.
"""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from vllm.config import CUDAGraphMode
from vllm.forward_context import BatchDescriptor, set_forward_context
from vllm.v1.worker.gpu.attn_utils import build_slot_mappings_by_layer
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator
from vllm.v1.worker.gpu.spec_decode.target_dependent_ar.cudagraph_utils import SpeculatorCudaGraphManager

from vllm_toptheta.backend.gpu import GpuMetadataBuilder
from vllm_toptheta.backend.layers import our_impls

NOBODY = -1  # of a row: vLLM writes no keys and values for it, and draws no token
NEVER = -3e4  # logit of what is not drawn at any temperature in use; float16 holds it


class SelfSpeculator(DraftModelSpeculator):
    """What the V2 runner drafts with, in an engine whose draft model is the served one.

    Attributes:
        sample_positions: [max_num_seqs] int64, by which a draw's noise is keyed.
        draft_step: int64, the step that runs.
        graphs: Those of a step; None until the KV cache is there.
    """

    draft_attn_layer_names: set[str]

    def __init__(self, vllm_config: Any, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        self.sample_positions = torch.zeros(self.max_num_reqs, dtype=torch.int64, device=device)
        self.draft_step = torch.zeros((), dtype=torch.int64, device=device)
        self.graphs: SpeculatorCudaGraphManager | None = None

    def load_draft_model(self, target_model: torch.nn.Module, target_attn_layer_names: set[str]) -> torch.nn.Module:
        """The served model; there are no weights of its own, nor layers that need pages."""
        return target_model

    def set_attn(self, model_state: Any, kv_cache_config: Any, *others: Any, **named: Any) -> None:
        """Makes metadata builders for all layers, that divide steps as drafts need it."""
        none = self.draft_attn_layer_names
        self.draft_attn_layer_names = {name for group in kv_cache_config.kv_cache_groups for name in group.layer_names}
        super().set_attn(model_state, kv_cache_config, *others, **named)
        self.draft_attn_layer_names = none
        for groups in self.attn_groups:
            for builder in (one for group in groups for one in group.metadata_builders):
                if isinstance(builder, GpuMetadataBuilder):
                    builder.is_verifying = False

    def _configure_decode_metadata_update(self) -> None:
        # FlashAttention's schedule of dense layers is made anew for each step
        self.supports_decode_metadata_update = False

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        """Plans a graph for numbers of sequences up to the largest batch that the engine has graphs for."""
        is_full = cudagraph_mode.decode_mode() == CUDAGraphMode.FULL
        config = copy(self.vllm_config)
        config.compilation_config = compilation = copy(config.compilation_config)
        # the engine's own sizes are of tokens, and may leave out the largest number of sequences
        largest = min(self.max_num_reqs, max(compilation.cudagraph_capture_sizes or [0]))
        compilation.cudagraph_capture_sizes = sorted(
            size for size in {1, 2, 4, *range(8, largest, 8), largest} if 0 < size <= largest
        )
        compilation.max_cudagraph_capture_size = largest
        mode = CUDAGraphMode.FULL_DECODE_ONLY if is_full else CUDAGraphMode.NONE
        self.graphs = SpeculatorCudaGraphManager(config, self.device, mode, decode_query_len=1)

    def capture(self) -> None:
        """Captures them. What they draw belongs to nobody."""
        self.reserve()
        self.idx_mapping.fill_(NOBODY)
        self.draft_step.zero_()
        if self.graphs is not None:
            self.graphs.capture(
                self._draft,
                self.model_state,
                self.input_buffers,
                self.block_tables,
                self.attn_groups,
                self.kv_cache_config,
                progress_bar_desc="Capturing CUDA graphs of drafts",
            )

    def reserve(self) -> None:
        """Has the scratch memory of drafts, which is not that of verifying, grow to what the largest batch needs."""
        for impl in our_impls(self.vllm_config):
            impl.reserve(self.max_num_reqs, self.device)

    @torch.inference_mode()
    def propose(
        self,
        input_batch: Any,
        attn_metadata: dict[str, Any],
        slot_mappings: dict[str, torch.Tensor],
        last_hidden_states: torch.Tensor,
        aux_hidden_states: list[torch.Tensor] | None,
        num_sampled: torch.Tensor,
        num_rejected: torch.Tensor,
        last_sampled: torch.Tensor,
        next_prefill_tokens: torch.Tensor,
        temperature: torch.Tensor,
        seeds: torch.Tensor,
        dp_sync_state: Any = None,
        dummy_run: bool = False,
        skip_attn_for_dummy_run: bool = False,
        mm_inputs: Any = None,
        is_profile: bool = False,
        num_speculative_tokens: int | None = None,
    ) -> torch.Tensor:
        """Drafts for every sequence of a step.

        Args:
            input_batch: The step before, whose lengths hold rejected tokens.
            attn_metadata, slot_mappings, last_hidden_states, aux_hidden_states, next_prefill_tokens, mm_inputs: Unused;
                of the step before.
            num_sampled: [num_reqs] int32; 0 of a sequence whose prompt is not done, which drafts nothing.
            num_rejected: [num_reqs] int32.
            last_sampled: [max_num_seqs], by the requests' rows.
            temperature, seeds: [max_num_seqs], likewise.
            dp_sync_state: Unused, refused.
            dummy_run: Whether nobody made the requests.
            skip_attn_for_dummy_run: Whether there are no pages yet.
            is_profile: Whether memory is measured, without graphs.
            num_speculative_tokens: Tokens to draft; None for as many as there may be.

        Returns:
            [num_reqs, draft tokens of the configuration] int64, a buffer of which `num_speculative_tokens` are drafts.
        """
        num_reqs = input_batch.num_reqs
        num_steps = self.num_speculative_steps if num_speculative_tokens is None else num_speculative_tokens
        if num_steps:
            self._copy_request_inputs(num_reqs, input_batch.idx_mapping, temperature, seeds, dummy_run=dummy_run)
            self._start(input_batch, num_sampled, num_rejected, last_sampled)
        if self.graphs is None or is_profile:
            shape = BatchExecutionDescriptor(cg_mode=CUDAGraphMode.NONE, num_tokens=num_reqs, num_reqs=num_reqs)
        else:
            shape = self.graphs.dispatch(num_reqs, num_reqs, uniform_token_count=1, num_active_loras=0)
        longest = int(input_batch.seq_lens_cpu_upper_bound[:num_reqs].max())
        self.draft_max_seq_len = min(longest + num_steps, self.max_model_len)
        for step in range(num_steps):
            metadata, slots = None, None
            if not (dummy_run and skip_attn_for_dummy_run):
                slots = build_slot_mappings_by_layer(self._slots(num_reqs, shape.num_tokens), self.kv_cache_config)
                metadata = self._build_uniform_attn_metadata(
                    batch_desc=shape,
                    num_reqs=num_reqs,
                    num_query_per_req=1,
                    seq_lens_cpu_upper_bound=input_batch.seq_lens_cpu_upper_bound,
                    step=step + 1,
                )
            self.draft_step.fill_(step)
            if self.graphs is not None and shape.cg_mode == CUDAGraphMode.FULL:
                self.graphs.run_fullgraph(shape)
            else:
                self._draft(num_reqs, shape.num_tokens, metadata, slots, None, shape.cg_mode)
        if self.draft_logits is not None and input_batch.has_structured_output_reqs:
            # a grammar cuts drafts before they are verified (`v1_runner.as_certain`); which sequences have one is not
            # known here
            rows, drafted = input_batch.idx_mapping.long(), self.draft_tokens[:num_reqs, :num_steps]
            self.draft_logits[rows, :num_steps] = NEVER
            self.draft_logits[rows[:, None], torch.arange(num_steps, device=rows.device), drafted] = 0.0
        return self.draft_tokens[:num_reqs]

    def _start(
        self, input_batch: Any, num_sampled: torch.Tensor, num_rejected: torch.Tensor, last_sampled: torch.Tensor
    ) -> None:
        """Write the inputs of the first step: the tokens sampled last, behind what is confirmed."""
        num_reqs, buffers = input_batch.num_reqs, self.input_buffers
        confirmed = input_batch.seq_lens[:num_reqs] - num_rejected
        rows = self.idx_mapping[:num_reqs]
        rows.masked_fill_((num_sampled == 0) | (confirmed >= self.max_model_len), NOBODY)
        buffers.input_ids[:num_reqs].copy_(last_sampled[input_batch.idx_mapping].view(-1))
        buffers.positions[:num_reqs].copy_(confirmed.clamp(max=self.max_model_len - 1))
        self.sample_positions[:num_reqs].copy_(confirmed)
        buffers.seq_lens[:num_reqs].copy_((confirmed + 1).masked_fill(rows == NOBODY, 0))
        # graphs are of more rows
        buffers.seq_lens[num_reqs:].zero_()
        buffers.query_start_loc.copy_(torch.arange(self.max_num_reqs + 1, device=rows.device).clamp_(max=num_reqs))

    def _slots(self, num_reqs: int, num_tokens: int) -> torch.Tensor:
        """[num_groups, num_tokens]: where the step's keys and values go, nowhere for rows of nobody."""
        return self.block_tables.compute_slot_mappings(
            self.idx_mapping[:num_reqs],
            self.input_buffers.query_start_loc[: num_reqs + 1],
            self.input_buffers.positions[:num_reqs],
            num_tokens,
        )

    def _draft(
        self,
        num_reqs: int,
        num_tokens: int,
        attn_metadata: dict[str, Any] | None,
        slot_mappings: dict[str, torch.Tensor] | None,
        num_tokens_across_dp: torch.Tensor | None,
        cudagraph_runtime_mode: CUDAGraphMode,
        num_speculative_steps: int | None = None,
    ) -> None:
        """One step, and the inputs of the next; what a graph captures.

        Args:
            num_reqs: Sequences, padding included where a graph is captured.
            num_tokens: As many, or more in padding.
            attn_metadata, slot_mappings: By the names of layers; None while memory is measured.
            num_tokens_across_dp: Unused, refused.
            cudagraph_runtime_mode: NONE, within a graph too.
            num_speculative_steps: Unused, one by one.
        """
        buffers, rows = self.input_buffers, self.idx_mapping[:num_reqs]
        with set_forward_context(
            attn_metadata,
            self.vllm_config,
            num_tokens=num_tokens,
            cudagraph_runtime_mode=cudagraph_runtime_mode,
            slot_mapping=slot_mappings,
            batch_descriptor=BatchDescriptor(num_tokens=num_tokens),
        ):
            # as the runner calls it, or what is compiled would not fit
            states = self.model(
                input_ids=buffers.input_ids[:num_tokens],
                positions=buffers.positions[:num_tokens],
                inputs_embeds=None,
                intermediate_tensors=None,
            )
        drawn = self.sample_draft(
            states[:num_reqs],
            self.sample_positions[:num_reqs],
            rows,
            self.temperature,
            self.seeds,
            self.draft_step,
            self.draft_logits,
        ).masked_fill(rows == NOBODY, 0)
        self.draft_tokens[:num_reqs].index_copy_(1, self.draft_step.view(1), drawn[:, None])
        buffers.input_ids[:num_reqs].copy_(drawn)
        buffers.positions[:num_reqs].add_(1)
        self.sample_positions[:num_reqs].add_(1)
        lengths = buffers.seq_lens[:num_reqs]
        lengths.add_(lengths > 0)
        # a sequence that is as long as it may be has no more slots, and what it would draw is not asked for
        ended = buffers.positions[:num_reqs] >= self.max_model_len
        rows.masked_fill_(ended, NOBODY)
        lengths.masked_fill_(ended, 0)
        buffers.positions[:num_reqs].clamp_(max=self.max_model_len - 1)

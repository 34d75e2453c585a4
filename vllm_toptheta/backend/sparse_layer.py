"""What the attention implementations of all platforms know of their layer, and how they get to know it."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from vllm_toptheta.backend.hooks import page_tails
from vllm_toptheta.backend.plan import LayerPlan, Plan
from vllm_toptheta.backend.requests import RequestOffsets
from vllm_toptheta.errors import UnsupportedError
from vllm_toptheta.kernels.contract import Layer


class SparseLayer:
    """One layer on one rank; the other base of an implementation is vLLM's, which sets the sizes.

    Attributes:
        num_heads, num_kv_heads: Of the layer on this rank.
        scale: Factor on q . k.
        logits_soft_cap: Cap of the scores; 0 or None without.
        sinks: [num_heads] float, the model's parameter; None without.
        plan: The model's; None before `bind`.
        layer_plan: This layer's share of it; None in a dense layer.
        layer: What kernels are told of the layer; None before `bind`.
        requests: What the rank's requests ask for.
        writes_tails: Whether no layer before it has written the tails of its pages.
    """

    num_heads: int
    num_kv_heads: int
    scale: float
    logits_soft_cap: float | None
    sinks: torch.Tensor | None = None
    plan: Plan | None = None
    layer_plan: LayerPlan | None = None
    layer: Layer | None = None
    requests: RequestOffsets | None = None
    writes_tails: bool = True

    def prepare(self, unsupported: Mapping[str, bool]) -> None:
        """See that the layer is one that can be served, and have its pages padded; called when it is built.

        Args:
            unsupported: What is not supported, and whether the layer has it.

        Raises:
            UnsupportedError: Names what it has.
        """
        if reasons := [feature for feature, applies in unsupported.items() if applies]:
            raise UnsupportedError(
                f"attention backend toptheta does not support {', '.join(reasons)}",
                remedy="Serve this model without --attention-backend toptheta",
            )
        page_tails.install()

    def bind(
        self,
        plan: Plan,
        layer_idx: int,
        requests: RequestOffsets,
        *,
        rank: int,
        sliding_window: int | None,
        device: torch.device | str = "cpu",
    ) -> None:
        """Take this layer's share of the plan; vLLM may build its metadata builders more than once.

        Args:
            plan: The model's plan.
            layer_idx: This layer's index in the model.
            requests: What this rank's requests ask for.
            rank: Tensor-parallel rank.
            sliding_window: Keys that the layer sees, or None for all; layers with a window are dense.
            device: Where the thresholds go.
        """
        if self.plan is not None:
            return
        self.plan, self.requests = plan, requests
        softmax_scale, soft_cap = float(self.scale), self.logits_soft_cap or None
        if sliding_window is None:
            self.layer_plan = plan.for_layer(
                layer_idx,
                num_heads=self.num_heads,
                num_kv_heads=self.num_kv_heads,
                rank=rank,
                device=device,
            )
        if self.layer_plan is None:
            self.layer = Layer(softmax_scale, soft_cap, sliding_window, sinks=self.sinks)
        else:
            layer = self.layer_plan.layer(softmax_scale=softmax_scale, logits_soft_cap=soft_cap)
            self.layer = layer._replace(sinks=self.sinks)

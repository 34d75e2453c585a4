"""Random steps with shadow keys, what is calibrated on them, and whether the kernels answer them as the reference does.

So that a projection has something to project on, the variances of the keys' channels fall off as those of real keys do
in the directions that matter to scores (docs/shadow.md); margins and r are calibrated on the very scores that are
measured, for 99 % of the survivors' softmax mass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from vllm_toptheta.benchmarks.kernels import KernelWorkload, step_shape
from vllm_toptheta.benchmarks.specs import parse_spec
from vllm_toptheta.kernels.gpu.tuning import ShadowConfig
from vllm_toptheta.limits import NUM_ANCHORS, NUM_FIRST_ANCHORS, NUM_LAST_ANCHORS

if TYPE_CHECKING:
    import torch

    from vllm_toptheta.benchmarks.inputs import Inputs
    from vllm_toptheta.kernels.contract import ShadowLayer
    from vllm_toptheta.kernels.gpu.scratch import ShadowScratch
    from vllm_toptheta.reference import KeyProjection

CHECKED_SPEC = "q1s8k_q1s3001_q1s48"
DECAY = 8.0  # the variance of a key's channel i is that of channel 0 times exp(-DECAY * i / head_size)
KEPT_MASS = 0.99
CALIBRATION_SEQUENCES = 2
MAX_ERROR = 0.01  # of an output, whose values are about 0.1 to 3


@dataclass(frozen=True)
class ShadowInputs:
    """A step with shadow keys, and what was calibrated on it."""

    inputs: Inputs
    shadow: ShadowLayer
    margin: torch.Tensor
    ratio: torch.Tensor

    @classmethod
    def build(cls, inputs: Inputs, num_channels: int) -> ShadowInputs:
        """Write the shadow keys of a step whose pages have room for them, and calibrate on its first sequences."""
        import torch

        from vllm_toptheta.kernels.codec import ShadowCodec
        from vllm_toptheta.kernels.contract import ShadowLayer
        from vllm_toptheta.reference import fit_projection

        _, num_kv_heads, _, width = inputs.kv_cache.shape
        head_size = width // 2
        scales = _key_scales(head_size)
        identity = torch.eye(head_size, device="cuda").expand(num_kv_heads, -1, -1)
        fitted = fit_projection(
            torch.zeros(num_kv_heads, head_size, device="cuda"),
            identity * scales**2,
            identity,
            num_channels=num_channels,
        )
        margin, ratio = _calibrate(inputs, fitted)
        log_ratio = torch.stack([ratio.log(), torch.zeros_like(ratio)], dim=1)
        codec = ShadowCodec.build(fitted.encoder, fitted.decoder, fitted.key_mean)
        shadow = ShadowLayer(codec, margin, log_ratio)
        inputs.write_tails(shadow)
        return cls(inputs, shadow, margin, ratio)

    def call(self, scratch: ShadowScratch, **changes: Any) -> Callable[[], None]:
        """The kernels on this step, as they are served: every sequence has an offset, although all are 0.

        Args:
            scratch: Made by `scratch`.
            changes: Other fields of the layer, or `output`.
        """
        import torch

        from vllm_toptheta.kernels.contract import Layer, LayerCache, LayerCall
        from vllm_toptheta.kernels.gpu.shadow import decode

        inputs = self.inputs
        output = changes.pop("output", None)
        layer = Layer(inputs.softmax_scale, thresholds=inputs.thresholds(), shadow=self.shadow)._replace(**changes)
        output = torch.empty_like(inputs.query) if output is None else output
        call = LayerCall(inputs.query, output, LayerCache.of(inputs.kv_cache, layer), layer)
        step = inputs.step()
        return lambda: decode(step, call, scratch)

    def scratch(self, config: ShadowConfig) -> ShadowScratch:
        """For this step."""
        import torch

        from vllm_toptheta.kernels.gpu.scratch import ShadowScratch, Sizes

        num_seqs, num_heads, head_size = self.inputs.query.shape
        num_kv_heads = self.inputs.kv_cache.shape[1]
        sizes = Sizes(num_seqs, num_heads, num_kv_heads, head_size, self.shadow.codec.code_bytes)
        return ShadowScratch.allocate(sizes, kv_dtype=torch.bfloat16, device="cuda", config=config)


def wrong(num_channels: int, config: ShadowConfig, block_size: int) -> str | None:
    """What is wrong with the kernels' answers against the fp32 reference, or None."""
    import torch

    from vllm_toptheta.kernels.contract import Counters

    try:
        shadow = ShadowInputs.build(random_inputs(parse_spec(CHECKED_SPEC), block_size, num_channels), num_channels)
        num_heads, num_kv_heads = shadow.inputs.query.shape[1], shadow.inputs.kv_cache.shape[1]
        output = torch.full_like(shadow.inputs.query, torch.nan)
        counters = Counters.allocate(num_heads, num_kv_heads, "cuda", counts_keys=True)
        shadow.call(shadow.scratch(config.scanning), output=output, counters=counters)()
        keys_read = torch.zeros(0) if counters.keys_read is None else counters.keys_read
        expected, candidates = _expected(shadow)
        error = float((output.float() - expected).abs().max())
        off = abs(int(keys_read.sum()) - candidates) / candidates
    except Exception as error_of_run:  # whatever a compiler or a launch may raise
        return message(error_of_run)
    # floors near an integer may fall to either side
    if not error <= MAX_ERROR or off > 1e-3:
        return f"wrong: outputs differ by {error:.4f}, keys read by {off:.2%}"
    return None


def _expected(shadow: ShadowInputs) -> tuple[torch.Tensor, int]:
    """The reference's outputs, and the number of candidates."""
    import torch

    from vllm_toptheta.reference import Compensation, KeyProjection, top_theta_attention

    inputs = shadow.inputs
    num_heads, num_kv_heads = inputs.query.shape[1], inputs.kv_cache.shape[1]
    codec = shadow.shadow.codec
    fitted = KeyProjection(codec.encoder, codec.decoder, codec.key_mean)
    outputs, num_candidates = [], 0
    for row, query in enumerate(inputs.query.split(1)):
        key, value = inputs.sequence(row)
        candidates = _candidates(inputs, row, fitted, shadow.margin)
        num_candidates += int(candidates.sum())
        result = top_theta_attention(
            query.float(),
            key,
            value,
            threshold=inputs.threshold(row),
            target_k=NUM_ANCHORS,
            softmax_scale=inputs.softmax_scale,
            compensation=Compensation("candidates", exp_threshold_scale=shadow.ratio),
            candidates=candidates.repeat_interleave(num_heads // num_kv_heads, dim=0)[None],
        )
        outputs.append(result.output)
    return torch.cat(outputs), num_candidates


def _calibrate(inputs: Inputs, projection: KeyProjection) -> tuple[torch.Tensor, torch.Tensor]:
    """Margins and r of every head, [num_heads] float32 each, from the first sequences."""
    import torch

    rows = range(min(CALIBRATION_SEQUENCES, len(inputs.seq_lens)))
    exact = [(inputs.scores(row), inputs.threshold(row)[:, None]) for row in rows]
    margins, ratios = [], []
    for row, (scores, threshold) in zip(rows, exact, strict=True):
        survives = scores >= threshold
        shortfall = threshold - _shadow_scores(inputs, row, projection)
        mass = (scores - scores.amax(dim=1, keepdim=True)).exp() * survives
        ordered, order = shortfall.masked_fill(~survives, -torch.inf).sort(dim=1)
        kept = mass.gather(1, order).cumsum(dim=1) / mass.sum(dim=1, keepdim=True)
        index = (kept < KEPT_MASS).sum(dim=1, keepdim=True).clamp(max=kept.shape[1] - 1)
        margins.append(ordered.gather(1, index)[:, 0].clamp(min=0))
    margin = torch.stack(margins).mean(0)
    for row, (scores, threshold) in zip(rows, exact, strict=True):
        unread = ~_candidates(inputs, row, projection, margin)
        unread = unread.repeat_interleave(len(scores) // len(unread), dim=0)
        ratios.append(((scores - threshold).exp() * unread).sum(dim=1) / unread.sum(dim=1).clamp(min=1))
    return margin, torch.stack(ratios).mean(0)


def _shadow_scores(inputs: Inputs, row: int, projection: KeyProjection) -> torch.Tensor:
    """Of the keys of a sequence, [num_heads, seq_len] float32, scaled logits."""
    from vllm_toptheta.reference import encode_keys, quantize_query, shadow_scores

    key, _ = inputs.sequence(row)
    scaled = quantize_query(inputs.query[row : row + 1], projection, softmax_scale=inputs.softmax_scale)
    return shadow_scores(scaled, encode_keys(key, projection))[0]


def _candidates(inputs: Inputs, row: int, projection: KeyProjection, margin: torch.Tensor) -> torch.Tensor:
    """Keys of a sequence that are read, [num_kv_heads, seq_len] bool."""
    from vllm_toptheta.reference import candidate_keys

    return candidate_keys(
        _shadow_scores(inputs, row, projection),
        inputs.threshold(row) - margin,
        num_kv_heads=inputs.kv_cache.shape[1],
        num_sink=NUM_FIRST_ANCHORS,
        num_recent=NUM_LAST_ANCHORS,
        block_size=inputs.kv_cache.shape[2],
    )


def random_inputs(lens: list[int], block_size: int, num_channels: int) -> Inputs:
    """A random step whose pages have room for shadow keys."""

    from vllm_toptheta.benchmarks.inputs import Inputs

    workload = KernelWorkload(specs=[], block_size=block_size)
    scales = _key_scales(workload.head_size)
    return Inputs.random(lens, step_shape(workload), code_bytes=num_channels // 2, key_scales=scales)


def _key_scales(head_size: int) -> torch.Tensor:
    """Standard deviation of every channel of the keys, 1 in the mean square."""
    import torch

    variances = torch.exp(-DECAY * torch.arange(head_size, device="cuda") / head_size)
    return (variances / variances.mean()).sqrt()


def moved(inputs: Inputs) -> Inputs:
    """The same step in other memory."""
    import torch

    cache = inputs.kv_cache
    memory = torch.empty(len(cache) * cache.stride(0), dtype=cache.dtype, device="cuda")
    memory.copy_(torch.as_strided(cache, (len(memory),), (1,)))
    return replace(inputs, kv_cache=memory.as_strided(cache.shape, cache.stride()), query=inputs.query.clone())


def message(error: BaseException) -> str:
    """The last lines of an error, in one."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' | '.join(lines[-3:])}"[:400]

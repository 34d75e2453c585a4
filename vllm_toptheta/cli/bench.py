"""The commands `toptheta bench ...`: speed against other backends, and what belongs to it."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from vllm_toptheta.cli.eval_options import JsonOption
from vllm_toptheta.cli.stores import ThresholdsOption, load_store
from vllm_toptheta.cli.terminal import TEXT_FILES, check_file, print_table, words, write_json


class KernelDevice(StrEnum):
    """What kernels are timed on."""

    CUDA = "cuda"
    CPU = "cpu"


bench_app = typer.Typer(help="Measure speed against other backends.", no_args_is_help=True)


@bench_app.command("kernels")
def bench_kernels(
    specs: Annotated[
        str | None, typer.Option(help="Batches in vLLM's grammar, separated by commas: 32q1s32k is 32 requests of 32K.")
    ] = None,
    k: Annotated[int, typer.Option(help="Survivors of a head, on average, where they are not recorded.")] = 128,
    pattern: Annotated[
        str,
        typer.Option(
            help="Also where survivors are, by commas: even, clustered, skewed-by-sequence, skewed-by-head, or files "
            "of `bench record`; each beside as many value rows evenly spread."
        ),
    ] = "",
    layers: Annotated[
        int | None, typer.Option(min=1, help="Layers of a pattern to time, evenly spread over them; all without.")
    ] = None,
    heavy_share: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Also mode shadow with copies on patterns, where this share of survivors is heavy.",
        ),
    ] = None,
    shape: Annotated[str, typer.Option(help="Query heads, kv heads and head size of a layer.")] = "32,8,128",
    block_size: Annotated[int, typer.Option(help="Tokens of a page.")] = 16,
    device: Annotated[
        KernelDevice, typer.Option(help="cuda: on an NVIDIA GPU; cpu: beside vLLM's own attention for CPUs.")
    ] = KernelDevice.CUDA,
    json: JsonOption = None,
) -> None:
    """Time of the decode kernel beside FlashAttention and others on a GPU, or beside vLLM's own on a CPU."""
    from vllm_toptheta.benchmarks import cpu_kernels, kernels
    from vllm_toptheta.benchmarks.kernels import CPU_SPECS, DEFAULT_SPECS, KernelWorkload, kernel_table, parse_shape

    on_gpu = device is KernelDevice.CUDA
    num_heads, num_kv_heads, head_size = parse_shape(shape, on_gpu=on_gpu)
    workload = KernelWorkload(
        specs=list(DEFAULT_SPECS if on_gpu else CPU_SPECS) if specs is None else specs.split(","),
        block_size=block_size,
        target_k=k,
        patterns=words(pattern),
        max_layers=layers,
        heavy_share=heavy_share,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
    )
    compare = kernels.compare if on_gpu else cpu_kernels.compare
    report = compare(workload, report_progress=lambda line: typer.echo(line, err=True))
    print_table(kernel_table(report))
    write_json(json, report)


@bench_app.command("record", context_settings=TEXT_FILES)
def bench_record(
    context: typer.Context,
    model: Annotated[Path, typer.Argument(metavar="MODEL_DIR", help="A Hugging Face model directory.")],
    text: Annotated[list[Path], typer.Option(metavar="FILE...", help="UTF-8 text or JSON Lines (.jsonl).")],
    length: Annotated[int, typer.Option(help="Tokens of the context.")],
    out: Annotated[Path, typer.Option(callback=check_file, help="The pattern, a .safetensors file.")],
    rows: Annotated[int, typer.Option(help="Rows to record of each layer, among the last tokens.")] = 2,
    weight_floor: Annotated[float | None, typer.Option(help="As for serve; default: the backend's.")] = None,
    seed: Annotated[int, typer.Option(help="Chooses the sequence out of the texts.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1...; auto is a GPU where there is one.")] = "auto",
    dtype: Annotated[str, typer.Option(help="Of weights and activations; attention is float32.")] = "float32",
) -> None:
    """Record which keys a real model keeps at the end of a long context, for `bench kernels --pattern`."""
    from vllm_toptheta.benchmarks.record import record, summary
    from vllm_toptheta.evaluation import Subject
    from vllm_toptheta.limits import DEFAULT_WEIGHT_FLOOR

    pattern = record(
        Subject(model, {}, device=device, dtype=dtype),
        [*text, *map(Path, context.args)],
        length=length,
        num_rows=rows,
        weight_floor=DEFAULT_WEIGHT_FLOOR if weight_floor is None else weight_floor,
        seed=seed,
    )
    pattern.save(out)
    typer.echo(summary(pattern))


@bench_app.command("tune")
def bench_tune(
    head_size: Annotated[int, typer.Option(help="Channels of a head.")] = 128,
    kv_dtype: Annotated[str, typer.Option(help="bfloat16 or float8_e4m3fn.")] = "bfloat16",
    specs: Annotated[str, typer.Option(help="Batches to be fast on, as for `bench kernels`.")] = "16q1s16k,1q1s32k",
    pattern: Annotated[
        str | None, typer.Option(help="Where survivors are, to find out which steps are dense by themselves.")
    ] = None,
    write: Annotated[bool, typer.Option(help="Write the best into the table that serving uses.")] = False,
) -> None:
    """Search launch parameters of the decode kernel for one head size and cache dtype; needs an NVIDIA GPU."""
    from vllm_toptheta.benchmarks.kernels import KernelWorkload
    from vllm_toptheta.benchmarks.tune import tune
    from vllm_toptheta.kernels.gpu.tuning import save_entry

    patterns = [pattern] if pattern else []
    workload = KernelWorkload(specs=specs.split(","), head_size=head_size, kv_dtype=kv_dtype, patterns=patterns)
    card, best = tune(workload, report_progress=lambda line: typer.echo(line, err=True))
    typer.echo(best)
    if write:
        save_entry(head_size, 1 if kv_dtype.startswith("float8") else 2, card, best)


@bench_app.command("shadow")
def bench_shadow(
    specs: Annotated[str | None, typer.Option(help="Batches, as for `bench kernels`.")] = None,
    block_sizes: Annotated[str, typer.Option(help="Tokens of a page; several by commas.")] = "16,32",
    variants: Annotated[str | None, typer.Option(help="Variants by semicolons; default: all.")] = None,
    processes: Annotated[int, typer.Option(help="Processes that compile and check; 0 does it in this one.")] = 12,
    json: Annotated[Path | None, typer.Option(help="Append every row to this file, as a line of JSON.")] = None,
) -> None:
    """Check and time the variants of the decode kernel with shadow keys, on random data; needs an NVIDIA GPU."""
    from vllm_toptheta.benchmarks.shadow import DEFAULT_SPECS, VARIANTS, compare, summary

    rows = compare(
        list(DEFAULT_SPECS) if specs is None else words(specs),
        [int(size) for size in words(block_sizes)],
        list(VARIANTS) if variants is None else [name.strip() for name in variants.split(";")],
        processes=processes,
        rows_file=json,
        report_progress=lambda line: typer.echo(line, err=True),
    )
    typer.echo(summary(rows))


@bench_app.command("quality", context_settings=TEXT_FILES)
def bench_quality(
    context: typer.Context,
    model: Annotated[Path, typer.Argument(metavar="MODEL_DIR", help="A Hugging Face model directory.")],
    text: Annotated[
        list[Path], typer.Option(metavar="FILE...", help="UTF-8 text or JSON Lines (.jsonl), not calibrated on.")
    ],
    k: Annotated[
        str | None,
        typer.Option(
            "--k",
            "--targets",
            help="By commas: floor:2, which needs no store, or keys per query head. Default: the floor that is served "
            "if nothing is said.",
        ),
    ] = None,
    sequences: Annotated[int, typer.Option(help="Sequences to evaluate on.")] = 8,
    length: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 2048,
    seed: Annotated[int, typer.Option(help="Chooses the sequences out of the texts.")] = 0,
    thresholds: ThresholdsOption = None,
    json: JsonOption = None,
) -> None:
    """Perplexity of a real model on the decode kernel, beside the reference's and dense; needs an NVIDIA GPU."""
    from vllm_toptheta.benchmarks.quality import kernel_quality_table, measure

    targets = words(k or "")
    report = measure(
        model,
        [*text, *map(Path, context.args)],
        load_store(model, thresholds, targets=targets),
        targets=targets,
        length=length,
        num_sequences=sequences,
        seed=seed,
    )
    print_table(kernel_quality_table(report))
    write_json(json, report)


@bench_app.command("serving")
def bench_serving(
    model: Annotated[str, typer.Argument(help="A model that vLLM can load.")],
    context: Annotated[int, typer.Option(help="Prompt tokens of a request.")] = 3900,
    output_tokens: Annotated[int, typer.Option(help="Tokens generated per request.")] = 64,
    batch_size: Annotated[int, typer.Option(help="Requests at a time.")] = 1,
    repeats: Annotated[int, typer.Option(help="Measured batches per engine.")] = 3,
    rounds: Annotated[int, typer.Option(help="Engines per backend, alternating.")] = 2,
    backends: Annotated[
        str,
        typer.Option(
            help="Backends; the others are measured against the first. A mode follows behind a colon: TOPTHETA:values, "
            "TOPTHETA:shadow (calibrated shadow keys) or TOPTHETA:tiers (copies); TOPTHETA:lossless and "
            "TOPTHETA:lossless-tiers draft by thresholds or copies."
        ),
    ] = "CPU_ATTN,TOPTHETA",
    dtype: Annotated[str, typer.Option(help="As vLLM's --dtype.")] = "auto",
    compile: Annotated[bool, typer.Option(help="Let vLLM compile the model.")] = False,
    weight_floor: Annotated[float | None, typer.Option(help="As for serve; default: the backend's.")] = None,
    random_rows: Annotated[
        int | None,
        typer.Option(help="Random weights of Llama-3.1-8B's shape instead of MODEL; value rows that a kv head reads."),
    ] = None,
    draft_tokens: Annotated[
        str | None, typer.Option(metavar="INTEGER|auto", help="As for serve, in lossless modes.")
    ] = None,
    acceptance: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="With random weights, the probability by which each draft is accepted."),
    ] = None,
    random_keys: Annotated[
        int | None, typer.Option(help="With random weights, keys that a kv head reads with TOPTHETA:shadow.")
    ] = None,
    json: JsonOption = None,
) -> None:
    """Time per output token of whole engines, one backend against the other in one run."""
    import os
    import tempfile
    from contextlib import ExitStack

    from vllm_toptheta.benchmarks.dummy import write_model
    from vllm_toptheta.benchmarks.serving import ServingWorkload, compare, serving_table

    shadow_keys = None
    with ExitStack() as stack:
        if random_rows is not None:
            scratch = stack.enter_context(tempfile.TemporaryDirectory())
            # a name for the report: what lies there, if anything, is not looked at
            folder, thresholds = write_model(Path(scratch), name=Path(model).name)
            model, shadow_keys = str(folder), str(thresholds)
            # the thresholds are set on the running engine, by functions sent to its workers
            os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
        workload = ServingWorkload(
            random_rows=random_rows,
            random_keys=random_keys,
            model=model,
            context=context,
            output_tokens=output_tokens,
            batch_size=batch_size,
            repeats=repeats,
            dtype=dtype,
            enforce_eager=not compile,
            options={} if weight_floor is None else {"weight_floor": weight_floor},
            shadow_keys=shadow_keys,
            draft_tokens=draft_tokens,
            acceptance=acceptance,
        )
        report = compare(workload, backends.split(","), rounds)
    print_table(serving_table(report))
    write_json(json, report)

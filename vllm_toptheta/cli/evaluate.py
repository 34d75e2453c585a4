"""The commands `toptheta eval ...`: what sparse attention does to predictions and answers, paired against dense."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vllm_toptheta.cli import eval_options as options
from vllm_toptheta.cli.eval_options import drawing, task_options, text_files
from vllm_toptheta.cli.stores import needs_store
from vllm_toptheta.cli.terminal import TEXT_FILES, integers, numbers, print_table, words, write_json
from vllm_toptheta.errors import EvaluationError

if TYPE_CHECKING:
    from vllm_toptheta.evaluation import Domain, Subject

eval_app = typer.Typer(
    help="What sparse attention does to a model's predictions and answers, paired against dense attention.",
    no_args_is_help=True,
)


@eval_app.command("perplexity", context_settings=TEXT_FILES)
def evaluate_perplexities(
    context: typer.Context,
    model: options.ModelArgument,
    text: options.TextOption = None,
    human_eval: Annotated[
        bool, typer.Option("--human-eval", help="Also HumanEval's solutions, given what they solve.")
    ] = False,
    k: options.TargetsOption = None,
    sequences: Annotated[int, typer.Option(help="Sequences of each domain.")] = 8,
    length: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 2048,
    mode: options.ModeOption = "values",
    compensations: options.CompensationsOption = "",
    top_k: options.TopKOption = "",
    cap_k: Annotated[int | None, typer.Option(help="Survivors to keep at most, the last ones.")] = None,
    dense_layers: options.DenseLayersOption = None,
    phase: options.PhaseOption = "both",
    prompt_tokens: Annotated[
        int | None, typer.Option(help="Tokens of a sequence that are its prompt; default: 0 for both, else half.")
    ] = None,
    limit: options.LimitOption = None,
    shots: options.ShotsOption = 0,
    seed: options.SeedOption = 0,
    thresholds: options.ThresholdsOption = None,
    device: options.DeviceOption = "auto",
    dtype: options.DtypeOption = "float32",
    json: options.JsonOption = None,
    plots: options.PlotsOption = None,
) -> None:
    """Perplexity, KL and top-1 agreement with dense attention on texts, with paired standard errors."""
    from vllm_toptheta.evaluation import evaluate_perplexity, expand_variants, perplexity_tables

    draw = drawing("draw_trade_offs", plots)
    targets = _targets(k, thresholds)
    subject = _subject(model, thresholds, device, dtype, targets=targets)
    variants = expand_variants(
        subject.stores,
        targets=targets,
        compensations=words(compensations),
        modes=words(mode),
        top_k=integers("--top-k", top_k),
        cap_k=cap_k,
        dense_layers=[_layers(layers, subject.architecture.num_layers) for layers in dense_layers or ["store"]],
    )
    if prompt_tokens is None:
        prompt_tokens = 0 if phase == "both" else length // 2
    domains = _text_domains(
        subject, [*(text or []), *context.args], sequences=sequences, length=length, prompt=prompt_tokens, seed=seed
    )
    if human_eval:
        from vllm_toptheta.evaluation.tasks import solutions_domain

        domains.append(solutions_domain(subject.tokenizer, limit=limit, shots=shots))
    report = evaluate_perplexity(subject, domains, variants, phase=phase, seed=seed)
    for table in perplexity_tables(report):
        print_table(table)
    write_json(json, report)
    draw(report)


@eval_app.command("tasks", context_settings=TEXT_FILES)
def evaluate_tasks(
    context: typer.Context,
    model: options.ModelArgument,
    text: options.TextOption = None,
    tasks: options.TasksOption = "needle,key-value",
    k: options.TargetsOption = None,
    lengths: options.LengthsOption = "1024,2048",
    depths: options.DepthsOption = "0,25,50,75,100",
    samples: options.SamplesOption = 4,
    limit: options.LimitOption = None,
    shots: options.ShotsOption = 0,
    allow_code_execution: options.AllowOption = False,
    mode: options.ModeOption = "values",
    compensations: options.CompensationsOption = "",
    top_k: options.TopKOption = "",
    phase: options.PhaseOption = "decode",
    seed: options.SeedOption = 0,
    thresholds: options.ThresholdsOption = None,
    device: options.DeviceOption = "auto",
    dtype: options.DtypeOption = "float32",
    json: options.JsonOption = None,
    plots: options.PlotsOption = None,
) -> None:
    """Needle in a haystack, key-value recall and HumanEval, decoded token by token, dense and sparse."""
    from vllm_toptheta.evaluation import expand_variants
    from vllm_toptheta.evaluation.tasks import (
        LocalAnswers,
        TasksReport,
        compare_answers,
        make_tasks,
        task_tables,
    )

    draw = drawing("draw_recall", plots)
    targets = _targets(k, thresholds)
    subject = _subject(model, thresholds, device, dtype, targets=targets)
    variants = expand_variants(
        subject.stores,
        targets=targets,
        compensations=words(compensations),
        modes=words(mode),
        top_k=integers("--top-k", top_k),
    )
    answer = LocalAnswers(subject, variants, phase=phase)
    allowed = {"limit": limit, "shots": shots, "allow_code_execution": allow_code_execution}
    chosen = task_options(tasks, lengths, depths, samples=samples, seed=seed, **allowed)
    asked = make_tasks(chosen, answer.token_counter, text_files([*(text or []), *context.args]))
    report = TasksReport(
        setup=subject.setup(),
        phase=phase,
        seed=seed,
        tasks=tuple(compare_answers(asked, [variant.name for variant in variants], answer)),
    )
    for table in task_tables(report):
        print_table(table)
    write_json(json, report)
    draw(report)


@eval_app.command("decode", context_settings=TEXT_FILES)
def evaluate_decoding(
    context: typer.Context,
    model: options.ModelArgument,
    text: options.TextOption = None,
    lengths: Annotated[str, typer.Option(help="Tokens of the sequences, by commas.")] = "2048,4096,8192",
    window: Annotated[
        int, typer.Option(help="Tokens at the end of each that are decoded; the others are read densely.")
    ] = 128,
    sequences: Annotated[int, typer.Option(help="Sequences of each length.")] = 4,
    weight_floor: Annotated[
        str | None,
        typer.Option(
            help="Thresholds relative to the row, by commas: keys of so many times the average weight survive. "
            "Default: 2."
        ),
    ] = None,
    heavy: Annotated[
        str,
        typer.Option(
            help="Also tiers at each weight floor, by commas: keys of so many times the weight of their row's anchors "
            "are read exactly, lighter ones as copies."
        ),
    ] = "",
    top_k: options.TopKOption = "",
    equal_rows: Annotated[
        str,
        typer.Option(
            help="Weight floors by commas: also exact top-k with the least k, found for each length on its first "
            "sequence, that reads as many value rows."
        ),
    ] = "",
    k: Annotated[str, typer.Option("--k", "--targets", help="Calibrated targets of the store, by commas.")] = "",
    compensations: options.CompensationsOption = "",
    seed: options.SeedOption = 0,
    thresholds: options.ThresholdsOption = None,
    device: options.DeviceOption = "auto",
    dtype: options.DtypeOption = "float32",
    output: Annotated[
        Path | None,
        typer.Option(help="Folder for the report and the results of each sequence: the same command goes on there."),
    ] = None,
) -> None:
    """What sparse attention changes where a server uses it: in the tokens that follow a dense prompt."""
    from vllm_toptheta.calibration.data import read_text
    from vllm_toptheta.evaluation import DecodeOptions, decode_table, evaluate_decode, expand_variants, floor_label
    from vllm_toptheta.limits import DEFAULT_WEIGHT_FLOOR

    floors = [DEFAULT_WEIGHT_FLOOR] if weight_floor is None else numbers("--weight-floor", weight_floor)
    subject = _subject(model, thresholds, device, dtype, targets=words(k))
    variants = expand_variants(
        subject.stores,
        targets=[*(floor_label(floor, field="--weight-floor") for floor in floors), *words(k)],
        compensations=words(compensations),
        heavy=numbers("--heavy", heavy),
    )
    variants += expand_variants(
        {},
        targets=[],
        compensations=words(compensations),
        top_k=integers("--top-k", top_k),
        dense_layers=[()],
    )
    report = evaluate_decode(
        subject,
        [read_text(file) for file in text_files([*(text or []), *context.args])],
        variants,
        DecodeOptions(
            lengths=tuple(integers("--lengths", lengths)),
            num_sequences=sequences,
            window=window,
            equal_rows=tuple(numbers("--equal-rows", equal_rows)),
            seed=seed,
        ),
        folder=output,
    )
    print_table(decode_table(report))


def _layers(option: str, num_layers: int) -> tuple[int, ...] | None:
    """The layers of --dense-layers; None for those of the store."""
    if option in ("store", "none"):
        return None if option == "store" else ()
    layers = tuple(sorted(set(integers("--dense-layers", option))))
    for layer in layers:
        if not 0 <= layer < num_layers:
            raise EvaluationError(f"no layer {layer} in a model of {num_layers}", field="--dense-layers")
    return layers


def _targets(option: str | None, thresholds: list[str] | None) -> list[str]:
    """The targets of --targets; by default what a server takes, or what a store that was named is likely to have."""
    if option is not None:
        return words(option)
    from vllm_toptheta.limits import DEFAULT_WEIGHT_FLOOR
    from vllm_toptheta.store import floor_label

    return ["k:64", "k:128"] if thresholds else [floor_label(DEFAULT_WEIGHT_FLOOR)]


def _subject(model: Path, thresholds: list[str] | None, device: str, dtype: str, *, targets: list[str]) -> Subject:
    """Load the stores, those named or the one that a target needs, and check that they fit the model."""
    from vllm_toptheta import store
    from vllm_toptheta.evaluation import Subject, named_paths

    stores = {}
    for name, paths in named_paths(thresholds or [], field="--thresholds", default="").items():
        if len(paths) > 1:
            raise EvaluationError(
                f"{len(paths)} stores with one name", field="--thresholds", remedy="Write NAME=PATH, with other NAMEs"
            )
        stores[name] = store.load(store.resolve(str(model), thresholds=paths[0]))
    if not stores and needs_store(targets):
        stores = {"": store.load(store.resolve(str(model)))}
    return Subject(model, stores, device=device, dtype=dtype)


def _text_domains(
    subject: Subject, values: list[str], *, sequences: int, length: int, prompt: int, seed: int
) -> list[Domain]:
    from vllm_toptheta.evaluation import named_paths, text_domain

    return [
        text_domain(
            name,
            files,
            subject.tokenizer,
            num_sequences=sequences,
            length=length,
            num_prompt_tokens=prompt,
            seed=seed,
        )
        for name, files in named_paths(values, field="--text", default="text").items()
    ]

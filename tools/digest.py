"""Fingerprints of what kernels and calibration compute, for changes that must not move a bit.

    TRITON_INTERPRET=1 python -m tools.digest run before.json    # Triton's interpreter, the CPU kernels, a calibration
    python -m tools.digest run before.json                       # on a GPU: the Triton kernels as they are served
    python -m tools.digest compile before.json                   # for sm_90, without a GPU: code, registers, spills
    python -m tools.digest compare before.json after.json

Inputs are those of the kernels' tests, drawn with fixed seeds. A fingerprint is a SHA-256 of the output, of what was
counted, and of the page tails. Between two machines, or two versions of torch or Triton, they differ.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import typer

from tests.kernels import test_decode, test_shadow, test_value_sums
from tests.kernels.decode_case import INTERPRETED, Case, Shape, make_case
from tests.kernels.shadow_case import SCANNING, ShadowCase, make_shadow_case

app = typer.Typer(add_completion=False, help=__doc__)
Digests = dict[str, Any]


def fingerprint(output: torch.Tensor, *others: Any) -> str:
    """Of an output and of any tensors beside it, whatever records they stand in and in whatever order."""
    found = {(tensor.data_ptr(), tensor.shape): tensor for tensor in _tensors(others)}  # each of them once
    return _sha([output]) + ":" + _sha(sorted(found.values(), key=lambda tensor: _sha([tensor])))


def _tensors(found: Any) -> Iterator[torch.Tensor]:
    if isinstance(found, torch.Tensor):
        yield found
    elif isinstance(found, (tuple, list)):
        for part in found:
            yield from _tensors(part)


def _sha(tensors: Iterable[torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        dense = tensor.detach().cpu().contiguous()
        digest.update(str((dense.dtype, tuple(dense.shape))).encode())
        digest.update(dense.view(-1).view(torch.uint8).numpy().tobytes() if dense.numel() else b"")
    return digest.hexdigest()[:16]


def _dtypes(shape: Shape) -> Iterator[tuple[str, Shape]]:
    yield "float16", shape
    if not INTERPRETED:  # the interpreter multiplies the bits of bfloat16 as integers
        yield "bfloat16", replace(shape, dtype=torch.bfloat16)


def _offsets(case: Case) -> dict[str, Any]:
    """Options of a step whose sequences ask for one thing or another."""
    rows = [(0.0, -torch.inf, 0.3)[row % 3] for row in range(len(case.shape.lens))]
    return {"threshold_offset": torch.tensor(rows, device=case.query.device)}


def values() -> Iterator[tuple[str, Callable[[], str]]]:
    """The GPU's kernels of mode `values`."""
    few = test_decode.FEW if INTERPRETED else None

    def decoded(shape: Shape, with_offsets: bool) -> str:
        case = make_case(shape)
        output, counters = case.run(few, **(_offsets(case) if with_offsets else {}))
        return fingerprint(output, counters, case.value_sum)

    for name, plain in test_decode.SHAPES.items():
        for dtype, shape in _dtypes(plain):
            yield f"{name}, {dtype}", lambda shape=shape: decoded(shape, False)  # type: ignore[misc]
            yield f"{name}, {dtype}, offsets", lambda shape=shape: decoded(shape, True)  # type: ignore[misc]
    for name, shape in test_value_sums.SHAPES.items():
        yield f"tails, {name}", lambda shape=shape: _tails(shape)  # type: ignore[misc]


def _tails(shape: Shape) -> str:
    case = make_case(shape)
    case.value_sum.fill_(torch.nan)
    test_value_sums.step(case, [0] * len(shape.lens), list(shape.lens))
    return fingerprint(case.value_sum)


def shadow() -> Iterator[tuple[str, Callable[[], str]]]:
    """The GPU's kernels of mode `shadow`, and the same where they read all keys."""
    scanning = test_shadow.FEW if INTERPRETED else SCANNING

    def decoded(shape: Shape, with_offsets: bool, reads_all: bool) -> str:
        step: ShadowCase = make_shadow_case(shape)
        options = _offsets(step.case) if with_offsets else {}
        config = replace(scanning, few_tokens=2**20 if reads_all else 0)
        ran = step.run(config, **options)
        return fingerprint(ran[0], ran[1:], step.case.value_sum, step.codes)

    for name, plain in test_shadow.SHAPES.items():
        for dtype, shape in _dtypes(plain):
            yield f"{name}, {dtype}", lambda shape=shape: decoded(shape, False, False)  # type: ignore[misc]
            yield f"{name}, {dtype}, offsets", lambda shape=shape: decoded(shape, True, False)  # type: ignore[misc]
        yield f"{name}, all keys", lambda plain=plain: decoded(plain, True, True)  # type: ignore[misc]
    for name, shape in test_shadow.CODE_SHAPES.items():
        yield f"tails, {name}", lambda shape=shape: _codes(shape)  # type: ignore[misc]


def _codes(shape: Shape) -> str:
    step = make_shadow_case(shape)
    test_shadow.step(step, [0] * len(shape.lens), list(shape.lens))
    return fingerprint(step.codes)


def cpu() -> Iterator[tuple[str, Callable[[], str]]]:
    """The CPU backend's layers, step by step: prompts, decoding, tails, counters."""
    from tools.digest_cpu import MODES, layers

    for name in MODES:
        yield name, lambda name=name: fingerprint(*layers(name))  # type: ignore[misc]


def calibration() -> Iterator[tuple[str, Callable[[], str]]]:
    """The tensors of a store calibrated on a tiny model, in both modes."""
    from tests.calibration.tiny_model import save_model_dir, tiny_config, tiny_model, write_text
    from vllm_toptheta import store
    from vllm_toptheta.calibration import CalibrationOptions, calibrate, plausible
    from vllm_toptheta.calibration.data import read_text
    from vllm_toptheta.calibration.options import ShadowOptions

    def calibrated(mode: str, head_size: int) -> str:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            model = save_model_dir(folder / "tiny", tiny_model(tiny_config(head_dim=head_size)))
            text = write_text(folder / "words.txt", num_words=600)
            chosen = ShadowOptions() if mode == "shadow" else None
            options = CalibrationOptions.create((16, 8), max_length=300, num_sequences=2, shadow=chosen)
            # a random model understands nothing
            with patch.object(plausible, "MAX_SHARE_OF_GUESSING", math.inf):
                made = calibrate(model, [read_text(text)], out=folder / "stores", options=options, progress=False)
            return json.dumps(store.load(made).manifest.model_dump(mode="json")["tensors"], sort_keys=True)

    yield "values", lambda: calibrated("values", 16)
    yield "shadow", lambda: calibrated("shadow", 64)


PARTS = {"values": values, "shadow": shadow, "cpu": cpu, "calibration": calibration}


@app.command()
def run(out: Path, part: list[str] | None = None, match: str = "", shard: str = "0/1") -> None:
    """Write fingerprints to OUT.

    By default of all parts that run on this machine, else of each `--part`; of the cases that have `--match` in their
    names; and of these, with `--shard 2/8`, of every eighth from number 2 on, because kernels take long to compile.
    """
    on_gpu = torch.cuda.is_available()
    here = [name for name in PARTS if (on_gpu or INTERPRETED if name in ("values", "shadow") else not on_gpu)]
    cases = [(f"{name}: {case}", digest) for name in part or here for case, digest in PARTS[name]() if match in case]
    first, step = map(int, shard.split("/"))
    digests = {}
    for name, digest in cases[first::step]:
        digests[name] = digest()
        sys.stderr.write(f"{name}: {digests[name][:33]}\n")
    out.write_text(json.dumps(digests, indent=1, sort_keys=True) + "\n")


@app.command(name="compile")
def compile_(out: Path, match: str = "") -> None:
    """Compile what a step launches on an H100, and write hashes of the code, registers and stack frames to OUT.

    Of all steps, or of those that have `--match` in their names. Takes minutes where Triton has nothing cached.
    """
    if INTERPRETED:
        raise typer.BadParameter("nothing is compiled where TRITON_INTERPRET is 1")
    from tools.digest_compiled import compiled

    out.write_text(json.dumps(compiled(match), indent=1, sort_keys=True) + "\n")


@app.command()
def compare(before: Path, after: Path) -> None:
    """Say what differs between two files; exit with 1 if anything does."""
    old, new = (json.loads(file.read_text()) for file in (before, after))
    different = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    for name in different:
        sys.stdout.write(f"{name}\n  {old.get(name)}\n  {new.get(name)}\n")
    sys.stdout.write(f"{len(old.keys() & new.keys())} compared, {len(different)} differ\n")
    raise typer.Exit(bool(different))


if __name__ == "__main__":
    app()

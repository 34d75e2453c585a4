"""700 damaged models and texts: each is read, or refused by an error of ours that names a file or a field.

A model that is read has all its numbers, and a text that is read can be tokenised: nothing else is promised here.
"""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st

from tests.calibration.families import family_config
from tests.calibration.tiny_model import random_tokens, save_model_dir, tiny_model
from tests.fuzzing import fuzz
from tests.store.mutation import anything, damaged, edited, split_safetensors, with_header
from vllm_toptheta.calibration.data import read_text, tokenise
from vllm_toptheta.calibration.model import load_model, load_tokenizer
from vllm_toptheta.calibration.plausible import check_understanding
from vllm_toptheta.errors import TopThetaError

EXAMPLES = {"config": 300, "weights": 150, "tokenizer": 100, "texts": 150}


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model_dir(tmp_path_factory.mktemp("original") / "tiny", tiny_model(family_config(request.param)))


@pytest.fixture
def victim(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "tiny"))


def read_or_refuse(folder: Path) -> None:
    """Reads a model as a calibration does; anything but an error of ours fails the test."""
    try:
        tokenizer, model = load_tokenizer(folder), load_model(folder)
        check_understanding(model, [random_tokens(80)], model_dir=folder)
    except TopThetaError as error:
        event(type(error).__name__)
        assert str(error).encode()  # noqa: PT017
        assert error.file is not None or error.field is not None or "layer" in error.message  # noqa: PT017
        assert error.remedy  # noqa: PT017
        return
    event("read")
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert tokenise(tokenizer, "words") is not None


@st.composite
def changed(draw: st.DrawFn, fields: dict[str, Any]) -> dict[str, Any]:
    """Drops, retypes, negates or enlarges a field or two, also inside of others; or puts anything in their places."""
    if draw(st.booleans()):
        return draw(edited(fields, anything))
    fields = json.loads(json.dumps(fields))
    for _ in range(draw(st.integers(1, 2))):
        place = fields
        name = draw(st.sampled_from(sorted(place)))
        if isinstance(place[name], dict) and place[name] and draw(st.booleans()):
            place = place[name]
            name = draw(st.sampled_from(sorted(place)))
        value = place[name]
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        match draw(st.sampled_from(["drop", "retype", "negate", "enlarge"])):
            case "drop":
                del place[name]
                if not fields:
                    return fields
            case "retype":
                place[name] = draw(st.sampled_from([str(value), [value], {"value": value}, None, True, 1.5, 7, ""]))
            case "negate" if is_number:
                place[name] = -value
            case "enlarge" if is_number:
                place[name] = value * draw(st.sampled_from([2, 3, 10**3, 10**9, 10**30])) + draw(st.integers(0, 1))
    return fields


def written(value: Any) -> bytes:
    return json.dumps(value, default=repr).encode(errors="backslashreplace")


def test_there_are_five_hundred_mutations() -> None:
    assert sum(EXAMPLES.values()) >= 500


@given(data=st.data())
@fuzz(EXAMPLES["config"])
def test_config(original: Path, victim: Path, data: st.DataObject) -> None:
    fields = json.loads((original / "config.json").read_bytes())
    (victim / "config.json").write_bytes(written(data.draw(changed(fields))))
    read_or_refuse(victim)


@given(data=st.data())
@fuzz(EXAMPLES["weights"])
def test_weights(original: Path, victim: Path, data: st.DataObject) -> None:
    content = (original / "model.safetensors").read_bytes()
    header, tensors = split_safetensors(content)
    match data.draw(st.sampled_from(["header", "bytes", "swap"])):
        case "header":
            size = st.sampled_from([0, 1, 2, 32, 64, 256, len(tensors), 2**32, 2**64])
            values = (
                anything | size | st.lists(size, max_size=3) | st.sampled_from(["F32", "BF16", "I8", "U8", "F8_E4M3"])
            )
            mutant = with_header(written(data.draw(edited(header, values))), tensors)
        case "bytes":
            start = len(content) - len(tensors)
            mutant = data.draw(damaged(content[:start])) + tensors[: data.draw(st.integers(0, len(tensors)))]
        case _:
            names = data.draw(st.permutations([name for name in header if name != "__metadata__"]))
            mutant = with_header(written(dict(zip(names, list(header.values())[-len(names) :], strict=True))), tensors)
    (victim / "model.safetensors").write_bytes(mutant)
    read_or_refuse(victim)


@given(data=st.data())
@fuzz(EXAMPLES["tokenizer"])
def test_tokenizer(original: Path, victim: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["tokenizer.json", "tokenizer_config.json"]))
    content = (original / name).read_bytes()
    mutant = damaged(content) if data.draw(st.booleans()) else changed(json.loads(content)).map(written)
    (victim / name).write_bytes(data.draw(mutant))
    read_or_refuse(victim)


DOCUMENTS = [{"text": "one", "id": 1}, {"text": "zwei \u00fc", "id": None}]
TEXTS = {
    "a.txt": "prose, ünd more\n" * 5,
    "a.json": json.dumps(DOCUMENTS),
    "a.jsonl": "\n".join(json.dumps(document) for document in DOCUMENTS),
}


@given(data=st.data())
@fuzz(EXAMPLES["texts"])
def test_texts(tmp_path: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(TEXTS)))
    encoding = data.draw(st.sampled_from(["utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-16-le", "latin-1"]))
    content = TEXTS[name].encode(encoding)
    if name != "a.txt" and data.draw(st.booleans()):
        content = written([data.draw(edited(document, anything)) for document in DOCUMENTS])
    content = data.draw(damaged(content) | st.just(content) | st.binary(max_size=40))
    if data.draw(st.booleans()):
        content = data.draw(damaged(gzip.compress(content, mtime=0)) | st.just(gzip.compress(content, mtime=0)))
    file = tmp_path / name
    file.write_bytes(content)
    try:
        text = read_text(file)
    except TopThetaError as error:
        assert error.file == file  # noqa: PT017
        assert error.remedy  # noqa: PT017
        assert str(error).encode()  # noqa: PT017
        return
    assert text.content.strip()
    assert "\0" not in text.content
    assert text.content.encode()

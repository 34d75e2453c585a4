import hashlib
from pathlib import Path

import pytest
import torch

from vllm_toptheta.calibration.data import cut_sequences, load_sequences, prompt_prefix, read_text
from vllm_toptheta.errors import CalibrationError


class ByteTokenizer:
    def __init__(self, starts_with: int | None = None) -> None:
        self.bos_token_id = starts_with

    def __call__(self, text: str, add_special_tokens: bool = True, **options: object) -> dict[str, list[int]]:
        prefix = [self.bos_token_id] if add_special_tokens and self.bos_token_id is not None else []
        return {"input_ids": prefix + list(text.encode())}


def test_a_text_is_described_without_its_folder(tmp_path: Path) -> None:
    file = tmp_path / "prose.txt"
    file.write_bytes("Grüße".encode())
    text = read_text(file)
    assert text.content == "Grüße"
    assert text.source.name == "prose.txt"
    assert text.source.num_characters == 5
    assert text.source.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("content", "message"), [(None, "cannot be read"), (b" \n", "no text"), (b"ok \xff", "byte 3 cannot be decoded")]
)
def test_a_text_that_cannot_be_used_is_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(CalibrationError, match=message) as caught:
        read_text(file)
    assert caught.value.file == file


def test_a_long_text_gives_whole_pieces_from_all_over_it() -> None:
    sequences = cut_sequences([range(1000)], num_sequences=4, max_length=10, seed=0)
    starts = sorted(int(sequence[0]) for sequence in sequences)
    assert all(torch.equal(sequence, torch.arange(10) + sequence[0]) for sequence in sequences)
    gaps = [after - before for before, after in zip(starts, starts[1:], strict=False)]
    assert min(gaps) >= 100
    assert max(gaps + [starts[0] + 1000 - starts[-1]]) <= 500


def test_texts_take_turns_whatever_their_length() -> None:
    texts = [range(0, 10_000), range(20_000, 20_100), range(30_000, 30_100)]
    sequences = cut_sequences(texts, num_sequences=6, max_length=10, seed=3)
    origins = [int(sequence[0]) // 10_000 for sequence in sequences]
    assert sorted(origins) == [0, 0, 2, 2, 3, 3]


def test_short_texts_are_joined_until_none_is_left() -> None:
    texts = [range(index * 7, index * 7 + 7) for index in range(10)]
    sequences = cut_sequences(texts, num_sequences=7, max_length=10, seed=0)
    assert sorted(torch.cat(sequences).tolist()) == list(range(70))


def test_the_seed_decides() -> None:
    def cut(seed: int) -> torch.Tensor:
        return torch.stack(cut_sequences([range(500), range(900)], num_sequences=3, max_length=20, seed=seed))

    assert torch.equal(cut(5), cut(5))
    assert not torch.equal(cut(5), cut(6))


def test_too_little_text_says_how_much_there_is_and_how_much_is_needed() -> None:
    with pytest.raises(CalibrationError, match=r"have 30 tokens, but 4 sequences of 10 need 40"):
        cut_sequences([range(20), range(10)], num_sequences=4, max_length=10, seed=0)


def test_every_sequence_starts_with_the_begin_of_text_token(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("abcdefgh" * 10)
    sequences = load_sequences([read_text(file)], ByteTokenizer(1), num_sequences=3, max_length=9, seed=0)
    assert all(len(sequence) == 9 and sequence[0] == 1 for sequence in sequences)
    assert all(1 not in sequence[1:] for sequence in sequences)
    assert prompt_prefix(ByteTokenizer(None)) == []

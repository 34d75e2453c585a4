"""Where texts come from that are no files of their own: a dataset of the hub, or Python's own standard library."""

import hashlib
import importlib
import sysconfig
from pathlib import Path
from typing import Any

from vllm_toptheta.calibration.data import Text, join_documents, read_text
from vllm_toptheta.errors import CalibrationError
from vllm_toptheta.store import TextSource

__all__ = ["builtin_texts", "read_dataset"]

_BUILTIN_MODULES = 24


def read_dataset(name: str, *, num_characters: int, text_field: str = "text") -> Text:
    """Reads the first texts of a dataset of the Hugging Face hub, or of its local cache.

    Args:
        name: NAME, or NAME:SPLIT; the split is `train` if not given.
        num_characters: texts are taken until there are so many characters.
        text_field: the column that holds the text.

    Raises:
        CalibrationError: the package datasets is not installed, the dataset cannot be loaded, or it has no such
            column.
    """
    remedy = "Check the name and the network, or give text files (--text)"
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError:
        raise CalibrationError(
            "datasets need the package datasets",
            field="dataset",
            remedy="pip install 'vllm-toptheta[datasets]', or give text files (--text)",
        ) from None
    path, _, split = name.partition(":")
    split = split or "train"
    documents, collected = [], 0
    try:
        for row in datasets.load_dataset(path, split=split, streaming=True):
            if not isinstance(row.get(text_field), str):
                raise CalibrationError(
                    f"{name} has no text in {text_field!r}; its columns are: {', '.join(row)}"[:300],
                    field="text_field",
                    remedy="Name the column that holds the text (--text-field)",
                )
            # half a surrogate pair is no character, and no tokenizer takes it
            documents.append(row[text_field].encode(errors="replace").decode())
            collected += len(row[text_field])
            if collected >= num_characters:
                break
    except CalibrationError:
        raise
    except Exception as error:  # the library raises whatever its file systems and builders raise
        reason = str(error).split("\n")[0][:300] or type(error).__name__
        raise CalibrationError(f"{name} cannot be loaded: {reason}", field="dataset", remedy=remedy) from error
    content = join_documents(documents, name)
    digest = hashlib.sha256(content.encode()).hexdigest()
    recorded = f"{Path(path).name}:{split}" if Path(path).exists() else name  # where it lay is nobody's business
    return Text(TextSource(name=recorded, sha256=digest, num_characters=len(content)), content)


def builtin_texts() -> list[Text]:
    """Returns the sources of the largest modules of Python's standard library: a text that every machine has.

    Raises:
        CalibrationError: this Python comes without them.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    modules = sorted(folder.glob("*.py"), key=lambda file: (-file.stat().st_size, file.name))
    if len(modules) < _BUILTIN_MODULES:
        raise CalibrationError(
            "the sources of Python's standard library are not there", file=folder, remedy="Give text files (--text)"
        )
    return [read_text(file) for file in modules[:_BUILTIN_MODULES]]

"""Which store belongs to a model: an explicit path, else TOPTHETA_THRESHOLDS, else the shipped thresholds.

Only the first source that is given is looked at, so that a mistyped path can never load other thresholds. Either path
may name a store or a directory of stores. In a directory a model is recognised by the folder's name,
`<org>--<model>`, never by its architecture: fine-tuned models share one and need thresholds of their own.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import vllm_toptheta
from vllm_toptheta.errors import StoreNotFound
from vllm_toptheta.store.io import MANIFEST_NAME

ENVIRONMENT_VARIABLE = "TOPTHETA_THRESHOLDS"


class ModelName(NamedTuple):
    """A model's name in lower case; `org` is None where only a directory name is known."""

    org: str | None
    name: str

    @classmethod
    def of_model(cls, model: str) -> ModelName:
        """Read the name off a hub id, a local directory or a path in the hub's cache."""
        for part in Path(model).parts:
            if part.startswith("models--"):
                return cls.of_folder(part.removeprefix("models--"))
        parts = model.split("/")
        if len(parts) == 2 and parts[0] not in {"", ".", "..", "~"} and parts[1] and not os.path.isdir(model):
            return cls(parts[0].casefold(), parts[1].casefold())
        return cls(None, os.path.basename(os.path.abspath(os.path.expanduser(model))).casefold())

    @classmethod
    def of_folder(cls, folder_name: str) -> ModelName:
        """Read the name off `<org>--<model>`; the hub allows no `--` in an organisation."""
        org, separator, name = folder_name.casefold().partition("--")
        return cls(org, name) if separator else cls(None, org)

    def matches(self, other: ModelName) -> bool:
        """Whether both may name the same model; an unknown organisation matches any."""
        return self.name == other.name and (None in (self.org, other.org) or self.org == other.org)


def folder_name(model_id: str) -> str:
    """Return the folder name of a hub id's store: `<org>--<model>`."""
    return model_id.replace("/", "--")


def resolve(
    model: str,
    *,
    thresholds: Path | None = None,
    environment: Mapping[str, str] = os.environ,
    needs_shadow: bool = False,
) -> Path:
    """Find the store of a model. No network.

    Args:
        model: A hub id (both parts must match, whatever their case) or a local directory (its last part must match).
        thresholds: A store, or a directory of stores; overrides the environment.
        environment: Where TOPTHETA_THRESHOLDS is looked up.
        needs_shadow: Whether it is wanted for its shadow keys, which are not looked for here.

    Returns:
        The store's folder, not yet loaded.

    Raises:
        StoreNotFound: The path does not exist, or no store or several stores in it match.
    """
    source, origin = _source(thresholds, environment)
    if _is_store(source):
        return source
    wanted = ModelName.of_model(model)
    stores = _stores_in(source, origin)
    found = [store for store in stores if wanted.matches(ModelName.of_folder(store.name))]
    if not found:
        there = ", ".join(store.name for store in stores[:20]) or "none"
        raise StoreNotFound(
            f"no thresholds for the model {model!r}; there are: {there}",
            file=source,
            field=origin,
            remedy=f"Calibrate it: {calibrate_command(model, needs_shadow=needs_shadow)}",
        )
    if len(found) > 1:
        raise StoreNotFound(
            f"the model {model!r} may be {' or '.join(store.name for store in found)}",
            file=source,
            field=origin,
            remedy="Name the folder of one of them",
        )
    return found[0]


def list_stores(*, thresholds: Path | None = None, environment: Mapping[str, str] = os.environ) -> list[Path]:
    """Return the folders that `resolve` chooses from, by name.

    Raises:
        StoreNotFound: The path does not exist.
    """
    source, origin = _source(thresholds, environment)
    return [source] if _is_store(source) else _stores_in(source, origin)


def calibrate_command(model: str, *, needs_shadow: bool = False) -> str:
    """Return the command that makes thresholds for a model, or shadow keys."""
    if needs_shadow:
        of_shadow = f"toptheta calibrate {shlex.quote(model)} --text FILE... --mode shadow --out DIR"
        return f"{of_shadow}; or switch shadow_values on, which needs no store"
    return f"toptheta calibrate {shlex.quote(model)} --text FILE... --k 32,64,128,256 --out DIR"


def shipped_directory() -> Path:
    """Return the thresholds that come with the package: inside it in a wheel, beside it in a checkout."""
    package = Path(vllm_toptheta.__file__).parent
    inside = package / "thresholds"
    return inside if inside.is_dir() else package.parent / "thresholds"


def _source(thresholds: Path | None, environment: Mapping[str, str]) -> tuple[Path, str]:
    """Return the one path to look at, and who named it."""
    if thresholds is not None:
        return Path(thresholds), "thresholds"
    named = environment.get(ENVIRONMENT_VARIABLE)
    return (Path(named), ENVIRONMENT_VARIABLE) if named else (shipped_directory(), "shipped thresholds")


def _is_store(folder: Path) -> bool:
    return (folder / MANIFEST_NAME).is_file()


def _stores_in(source: Path, origin: str) -> list[Path]:
    try:
        return sorted(folder for folder in source.iterdir() if _is_store(folder) and not folder.name.startswith("."))
    except OSError as error:
        raise StoreNotFound(
            f"cannot be listed: {error.strerror}",
            file=source,
            field=origin,
            remedy="Name a store (a folder with manifest.yaml) or a directory of stores",
        ) from None

"""The only way to replace a function of vLLM's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import vllm

from vllm_toptheta.backend.hooks.patch import MARK, replace
from vllm_toptheta.errors import UnsupportedError


def louder(original: Callable[..., str]) -> Callable[..., str]:
    def shout(*args: Any) -> str:
        return original(*args).upper()

    return shout


class Base:
    def method(self, word: str) -> str:
        """Say it."""
        return f"{type(self).__name__} {word}"

    @classmethod
    def of_class(cls, word: str) -> str:
        return f"{cls.__name__} {word}"


@pytest.fixture
def owner() -> type[Base]:
    class Owner(Base):
        pass

    return Owner


def test_methods_and_class_methods_are_replaced(owner: type[Base]) -> None:
    replace(owner, "method", louder)
    replace(owner, "of_class", louder)
    assert owner().method("a") == owner().of_class("a") == owner.of_class("a") == "OWNER A"
    assert Base().method("a") == "Base a"
    assert owner.method.__doc__ == "Say it."
    assert owner.method.__wrapped__ is Base.method  # type: ignore[attr-defined]


def test_once(owner: type[Base]) -> None:
    for name in ("method", "of_class"):
        replace(owner, name, louder)
        replaced = vars(owner)[name]
        replace(owner, name, lambda _: pytest.fail("it was replaced again"))
        assert vars(owner)[name] is replaced
        assert getattr(getattr(owner, name), MARK)


def test_a_missing_name_is_refused_with_the_version(owner: type[Base]) -> None:
    with pytest.raises(UnsupportedError, match=rf"replaces Owner\.other, which vLLM {vllm.__version__} does not have"):
        replace(owner, "other", louder)

"""FlashAttention 3 and 4 through torch's registry: what is tried where, and that a failure leaves version 2.

No GPU here: `varlen_attn` is a loop, and torch's registry gets implementations that work, fail or compute nonsense.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.attention import _registry, current_flash_attention_impl, varlen

from tests.models.varlen_stubs import STUBS
from turbolm.models import attention as attention_module
from turbolm.models.flash import start_kernels

CPU = torch.device("cpu")


class Handle:
    """What torch keeps of an implementation that is active; `remove` brings version 2 back."""

    def __init__(self, on_remove: Callable[[], None]) -> None:
        self.remove = on_remove


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Start varlen on a GPU of that major number, whose `name` is registered by `register`."""

    def run(major: int, **implementations: Callable[[], Any]) -> str:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (major, 0))
        monkeypatch.setattr(varlen, "varlen_attn", STUBS["2.13"])
        monkeypatch.setattr(attention_module, "_TAKES_GQA", True)
        monkeypatch.setattr(_registry, "_FLASH_ATTENTION_IMPLS", implementations)
        monkeypatch.setattr(_registry, "_FLASH_ATTENTION_ACTIVE", None)
        return start_kernels("varlen", CPU)

    return run


@pytest.mark.parametrize(
    ("major", "found"),
    [
        (8, "FlashAttention 2"),
        (9, "FlashAttention 3 (flash_attn_interface)"),
        (10, "FlashAttention 4 (flash_attn.cute.interface)"),
        (12, "FlashAttention 2"),
    ],
)
def test_each_gpu_gets_the_newest_that_serves_it(start: Callable[..., str], major: int, found: str) -> None:
    both = {name: lambda: Handle(lambda: None) for name in ("FA3", "FA4")}
    assert start(major, **both) == f"attention: varlen, {found}"
    assert current_flash_attention_impl() == {9: "FA3", 10: "FA4"}.get(major)


def test_what_is_not_installed_is_named(start: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """By torch's own function, which imports the package."""
    from torch.nn.attention._fa3 import register_flash_attention_fa3

    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    line = start(9, FA3=register_flash_attention_fa3)
    reason = "FA3 is faster on this GPU, and needs flash_attn_interface, which is not installed"
    assert line == f"attention: varlen, FlashAttention 2 ({reason})"
    assert current_flash_attention_impl() is None


def test_what_does_not_load_leaves_version_2(start: Callable[..., str]) -> None:
    def register() -> Any:
        raise ImportError("undefined symbol: _ZN3c10\nand more")

    expected = "FlashAttention 2 (flash_attn_interface does not work here: ImportError: undefined symbol: _ZN3c10)"
    assert start(9, FA3=register) == f"attention: varlen, {expected}"
    assert current_flash_attention_impl() is None


@pytest.mark.parametrize("fault", ["forgets the documents", "raises"])
def test_what_computes_otherwise_is_switched_off(
    start: Callable[..., str], fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = STUBS["2.13"]

    def wrong(query: Any, key: Any, value: Any, cu_q: Any, cu_k: Any, max_q: int, max_k: int, **settings: Any) -> Any:
        if fault == "raises":
            raise RuntimeError("no kernel image is available")
        ends = cu_q[[0, -1]]
        return right(query, key, value, ends, ends, len(query), len(query), **settings)

    def register() -> Handle:
        monkeypatch.setattr(varlen, "varlen_attn", wrong)
        return Handle(lambda: monkeypatch.setattr(varlen, "varlen_attn", right))

    line = start(9, FA3=register)
    assert line.startswith("attention: varlen, FlashAttention 2 (")
    assert ("its results differ from version 2's by" in line) == (fault == "forgets the documents")
    assert varlen.varlen_attn is right and current_flash_attention_impl() is None


def test_other_kernels_are_named_and_nothing_is_tried() -> None:
    assert start_kernels("sdpa", CPU) == "attention: sdpa"

"""A stand-in for CUDA: DeepSpeed's accelerator answers as on a GPU and notes who waits, while tensors stay on the CPU.

    with installed() as waits:
        ...  # build an engine, train a step
    waits.counted  # Counter of (phase, "deepspeed/runtime/zero/stage3.py:step synchronize")

Events never report that they are done, as on a device that is behind its host: each possible wait is counted.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from deepspeed.accelerator import get_accelerator, set_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# What makes the host wait for values of the device, whichever Python or C++ code asks for them.
_READING_OPERATORS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "is_nonzero"}
_NAMED = ("turbolm.", "deepspeed.runtime", "deepspeed.utils", "deepspeed.comm", "torch.optim.", "transformers.masking")
_READING_METHODS = {torch.Tensor.cpu, torch.Tensor.tolist, torch.Tensor.numpy}


@dataclass
class Waits:
    """Where the host would wait for the device, by (phase, place and what)."""

    phase: str = "accumulation"
    counted: Counter[tuple[str, str]] = field(default_factory=Counter)

    def note(self, what: str) -> None:
        self.counted[self.phase, f"{_place()} {what}"] += 1

    def of(self, phase: str, package: str) -> Counter[str]:
        """The waits in one phase that code of one package asks for."""
        return Counter({p: n for (at, p), n in self.counted.items() if at == phase and p.startswith(f"{package}/")})


def _place() -> str:
    """The innermost function on the stack of turbolm, DeepSpeed, torch's optimizers or Transformers' masks."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.startswith(_NAMED):
            package, _, module = name.partition(".")
            return f"{package}/{module.replace('.', '/')}.py:{frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return "tests/"


def _event_and_stream(note: Callable[[str], None]) -> tuple[type, type]:
    class Event:
        def __init__(self, *_: Any, **__: Any) -> None: ...
        def record(self, *_: Any) -> None: ...
        def wait(self, *_: Any) -> None: ...

        def query(self) -> bool:
            return False

        def synchronize(self) -> None:
            note("event.synchronize")

    class Stream:
        def __init__(self, *_: Any, **__: Any) -> None: ...
        def wait_stream(self, *_: Any) -> None: ...
        def wait_event(self, *_: Any) -> None: ...

        def record_event(self, *_: Any) -> Any:
            return Event()

        def synchronize(self) -> None:
            note("stream.synchronize")

    return Event, Stream


def _accelerator(note: Callable[[str], None]) -> CPU_Accelerator:
    event_class, stream_class = _event_and_stream(note)
    current = stream_class()

    class Accelerator(CPU_Accelerator):
        Event, Stream = event_class, stream_class

        def is_synchronized_device(self) -> bool:  # resolves_data_dependency and the others follow it, as for CUDA
            return False

        def synchronize(self, device_index: Any = None) -> None:
            note("synchronize")

        def stream(self, stream: Any) -> Any:
            return nullcontext()

        def current_stream(self, device_index: Any = None) -> Any:
            return current

        default_stream = current_stream

    return Accelerator()


class _Operators(TorchDispatchMode):
    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__()
        self.note = note

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            part is not None and part.dtype == torch.bool for part in args[1]
        )
        if name in _READING_OPERATORS or by_mask:
            self.note(name)
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__()
        self.note = note

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READING_METHODS:
            self.note(func.__name__)
        return func(*args, **(kwargs or {}))


def varlen_on_cpu(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seq_q: torch.Tensor, *_: Any, **options: Any
) -> torch.Tensor:
    """`torch.nn.attention.varlen.varlen_attn`, causal, [tokens, heads, head_dim], in plain operators."""
    place = torch.arange(len(query))
    document = torch.bucketize(place, cu_seq_q[1:], right=True)
    mask = (document[:, None] == document) & (place[:, None] >= place)
    query, key, value = (tensor.transpose(0, 1) for tensor in (query, key, value))
    attend = torch.nn.functional.scaled_dot_product_attention
    return attend(query, key, value, mask, scale=options.get("scale"), enable_gqa=True).transpose(0, 1)


@contextmanager
def installed() -> Iterator[Waits]:
    """Install the accelerator in this process."""
    waits, before = Waits(), get_accelerator()
    set_accelerator(_accelerator(waits.note))
    try:
        with (
            patch.object(torch.Tensor, "record_stream", lambda *_: None),
            patch("torch.nn.attention.varlen.varlen_attn", varlen_on_cpu),
            patch("turbolm.plan.plan.check_kernels"),  # refuses varlen on a CPU
        ):
            yield waits
    finally:
        set_accelerator(before)


@contextmanager
def reads_noted(waits: Waits) -> Iterator[None]:
    """Note also what reads values of tensors in this thread, such as `.item()`, `.cpu()` or an index of booleans."""
    with _Methods(waits.note), _Operators(waits.note):
        yield

"""Measure what a model allocates, moves and multiplies, by layer, in a forward and backward pass on meta tensors."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

AROUND = -1  # in place of a layer's number: what stands around the layers
LOSS = -2

_ATTENTION = {
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
    "torch_attn::_varlen_attn",
    "torch_attn::_varlen_attn_backward",
}
_GROUPED = {"aten::_grouped_mm", "transformers::grouped_mm_fallback", "transformers::grouped_mm_fallback_backward"}


@dataclass
class Section:
    """What one layer, the loss or what stands around them takes. Bytes, and FLOPs of the forward pass."""

    saved: float = 0.0  # live after it minus before it
    # Live bytes after each operator: of its backward pass, above what was live when its forward pass ended (the loss:
    # began); and of its forward pass, above what was live when it began.
    backward_live: list[float] = field(default_factory=list)
    forward_live: list[float] = field(default_factory=list)
    matrix_flops: float = 0.0
    head_width: float = 0.0  # of attention kernels: width of queries and keys + that of values, over all heads
    forward_bytes: float = 0.0  # elementwise: read and written
    backward_bytes: float = 0.0


@dataclass
class Meter(TorchDispatchMode):
    """Count live bytes of storages that operators make, and what each section reads, writes and multiplies."""

    known: set[int]  # storages that are not counted: weights and inputs
    now: int = 0
    section: int = AROUND
    in_backward: bool = False
    floor: float = 0.0  # live bytes that the section's peak is measured from
    sections: dict[int, Section] = field(default_factory=lambda: defaultdict(Section))
    live: dict[int, int] = field(default_factory=dict)
    ends: dict[int, int] = field(default_factory=dict)  # live bytes at the end of each section's forward pass

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and account for it."""
        output = func(*args, **(kwargs or {}))
        inputs = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
        made = [one for one in tree_leaves(output) if isinstance(one, torch.Tensor)]
        for one in made:
            self._add(one.untyped_storage())
        section = self.sections[self.section]
        (section.backward_live if self.in_backward else section.forward_live).append(self.now - self.floor)
        self._work(section, func, inputs, made, (args, kwargs or {}, output))
        return output

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.known and key not in self.live:
            self.live[key] = storage.nbytes()
            self.now += storage.nbytes()
            weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.now -= self.live.pop(key, 0)

    def _work(self, section: Section, func: Any, inputs: list[Any], made: list[Any], call: tuple[Any, ...]) -> None:
        name, packet = func._schema.name, func._overloadpacket
        if name in _ATTENTION:
            if not self.in_backward:
                section.head_width += _head_width(name, inputs)
        elif packet in flop_registry or name in _GROUPED:
            if not self.in_backward:
                args, kwargs, output = call
                section.matrix_flops += (
                    _grouped_flops(inputs)
                    if name in _GROUPED
                    else flop_registry[packet](*args, **kwargs, out_val=output)
                )
        elif not _moves_nothing(func, inputs, made):
            moved = sum(map(_touched, [*inputs, *made]))
            if self.in_backward:
                section.backward_bytes += moved
            else:
                section.forward_bytes += moved

    def begin(self, section: int) -> None:
        """Begin the forward pass of a section; what a layer frees of the one before it counts for it."""
        self.section, self.floor = section, float(self.now)
        self.sections[section].saved -= self.ends.get(section - 1, self.now) if section > 0 else self.now

    def end(self, section: int, following: int = AROUND) -> None:
        """End it; what follows belongs to another section."""
        self.sections[section].saved += self.now
        self.ends[section] = self.now
        self.section = following

    def begin_backward(self, section: int) -> None:
        """Begin the backward pass of a section, which ends where that of another begins."""
        self.in_backward, self.section, self.floor = True, section, float(self.ends.get(section, 0))


def _head_width(name: str, inputs: list[torch.Tensor]) -> float:
    query, _, value = inputs[:3]
    heads = query.shape[1]  # of [batch, heads, tokens, width] as of varlen's [tokens, heads, width]
    return float(heads * (query.shape[-1] + value.shape[-1]))


def _grouped_flops(inputs: list[torch.Tensor]) -> float:
    rows, weight = inputs[:2]
    return 2.0 * rows.shape[0] * rows.shape[1] * weight.shape[-1]


def _moves_nothing(func: Any, inputs: list[torch.Tensor], made: list[torch.Tensor]) -> bool:
    """Return whether an operator is a view or an allocation."""
    if func._schema.name.startswith(("aten::empty", "aten::new_empty", "aten::detach", "aten::lift_fresh")):
        return True
    if func._schema.is_mutable:
        return False
    storages = {one.untyped_storage()._cdata for one in inputs}
    return bool(made) and all(one.untyped_storage()._cdata in storages for one in made)


def _touched(tensor: torch.Tensor) -> int:
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


@contextmanager
def metered(model: nn.Module, layers: list[nn.Module], inputs: Iterable[Any]) -> Iterator[Meter]:
    """Watch a model, its stack of `layers` and the loss behind its base model. Gradients of weights are not kept."""
    stays = [*model.parameters(), *model.buffers(), *(one for one in inputs if isinstance(one, torch.Tensor))]
    meter = Meter({one.untyped_storage()._cdata for one in stays})
    handles = [p.register_post_accumulate_grad_hook(_drop) for p in model.parameters()]
    for number, layer in enumerate(layers):
        handles += [
            layer.register_forward_pre_hook(_entering(meter, number), with_kwargs=True),
            layer.register_forward_hook(_leaving(meter, number)),
        ]
    handles.append(model.base_model.register_forward_hook(lambda *_: meter.begin(LOSS)))
    try:
        with meter:
            yield meter
    finally:
        for handle in handles:
            handle.remove()


def _drop(parameter: nn.Parameter) -> None:
    parameter.grad = None


def _entering(meter: Meter, number: int) -> Callable[..., None]:
    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        if number == 0 and hidden.requires_grad:
            hidden.register_hook(lambda _: meter.begin_backward(AROUND))
        meter.begin(number)

    return enter


def _leaving(meter: Meter, number: int) -> Callable[..., None]:
    def leave(_: nn.Module, __: Any, output: Any) -> None:
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        hidden.register_hook(lambda _: meter.begin_backward(number))
        meter.end(number)

    return leave

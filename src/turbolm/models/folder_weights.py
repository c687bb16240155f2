"""Copy the weights of a model folder into a model, each process only the part that it keeps.

Transformers renames, joins and splits the tensors of published models. Here it does so twice: once on the meta device,
which tells where each tensor goes without reading any, and once for those that are not merely renamed, one at a time.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from transformers import PreTrainedConfig, PreTrainedModel, core_model_loading, modeling_utils
from transformers.conversion_mapping import get_model_conversion_mapping

from turbolm.engine import sharding

Values = Callable[[int, int], torch.Tensor]  # elements [start, start + numel) of a flattened tensor
_BLOCK = 2**21  # elements that are compared or averaged at once


@dataclass(frozen=True)
class Matched:
    """`found` are the model's tensors that the folder has; `sources` those that are one tensor of it, perhaps renamed.

    `tensors` are the folder's tensors (slices of safetensors, not read), `skeleton` the model on the meta device.
    """

    tensors: dict[str, Any]
    found: set[str]
    sources: dict[str, Any]
    skeleton: PreTrainedModel

    def has_own_head(self) -> bool:
        """Return whether weights that the configuration ties are there twice and differ."""
        tied = self.skeleton.all_tied_weights_keys.items()
        return any({one, other} <= self.found and not self._are_equal(one, other) for one, other in tied)

    def _are_equal(self, one: str, other: str) -> bool:
        if not {one, other} <= self.sources.keys():  # joined or split: kept apart, which loses nothing
            return False
        left, right = self.sources[one], self.sources[other]
        if left.get_shape() != right.get_shape():
            return False
        num_elements = math.prod(left.get_shape())
        blocks = [(start, min(_BLOCK, num_elements - start)) for start in range(0, num_elements, _BLOCK)]
        return all(torch.equal(read(left, *block).float(), read(right, *block).float()) for block in blocks)


def match(
    tensors: dict[str, Any], config: PreTrainedConfig, kind: type[PreTrainedModel], attention_implementation: str
) -> tuple[Matched, dict[str, Any]]:
    """Return where `tensors` (name: slice of a safetensors file) go in a model, and Transformers' report of them."""
    empty = {name: torch.empty(tensor.get_shape(), device="meta") for name, tensor in tensors.items()}
    found: dict[str, torch.Tensor] = {}
    set_parameter = core_model_loading.set_param_for_module

    def note(model: PreTrainedModel, name: str, value: torch.Tensor, *more: Any) -> None:
        found[name] = value
        set_parameter(model, name, value, *more)

    with ExitStack() as stack:
        # What is missing is refused, in one line, so it is not drawn, and without Transformers' own report.
        stays = patch.object(PreTrainedModel, "_move_missing_keys_from_meta_to_device", lambda *_, **__: None)
        stack.enter_context(stays)
        stack.enter_context(patch.object(modeling_utils, "log_state_dict_report", lambda *_, **__: None))
        stack.enter_context(_handing_over(note))
        skeleton, info = kind.from_pretrained(
            None,
            config=config,
            state_dict=empty,
            dtype=torch.float32,
            attn_implementation=attention_implementation,
            local_files_only=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    names = {id(tensor): name for name, tensor in empty.items()}
    sources = {target: tensors[names[id(value)]] for target, value in found.items() if id(value) in names}
    return Matched(tensors, set(found), sources, skeleton), info


def _handing_over(put: Callable[..., None]) -> ExitStack:
    """Inside this context Transformers takes tensors as they are given and hands every result to `put`, unread."""
    stack = ExitStack()
    stack.enter_context(patch.object(core_model_loading, "set_param_for_module", put))
    stack.enter_context(patch.object(core_model_loading, "spawn_materialize", lambda _, tensor, *__, **___: tensor))
    return stack


@torch.no_grad()
def fill(matched: Matched, model: PreTrainedModel) -> tuple[list[str], list[str]]:
    """Set the model's parameters and buffers; return the names that were not set, and of those that are not finite.

    Collective for a partitioned model; every rank gets the same names. An embedding or a head with more rows than the
    folder's gets the mean of those for each new one (`model.resize_embeddings`). What is loaded is trained as in
    Transformers, which forgets that a constructor froze it.
    """
    tensors = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers()])
    names: dict[int, list[str]] = {}  # of one tensor, the first as `named_parameters` has it
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    tables, unset, non_finite = _tables_of_tokens(model), dict(model.named_parameters()), []

    def put(name: str, shape: list[int], values: Values) -> None:
        tensor, known_as = tensors[name], names[id(tensors[name])][0]
        ours = list(sharding.whole_shape(tensor))
        if shape[1:] == ours[1:] and (shape == ours or (id(tensor) in tables and shape[0] < ours[0])):
            unset.pop(known_as, None)
            if isinstance(tensor, torch.nn.Parameter):
                tensor.requires_grad_(matched.skeleton.get_parameter(name).requires_grad)
            if not _set(tensor, values if shape == ours else _with_mean_rows(shape, values)):
                non_finite.append(known_as)

    for aliases in names.values():
        there = [name for name in aliases if name in matched.sources]
        if there:
            source = matched.sources[there[0]]
            put(there[0], source.get_shape(), functools.partial(read, source))
    if matched.found - matched.sources.keys():
        _convert(matched, put)
    return list(unset), sharding.all_names(non_finite, model)


def _set(tensor: torch.Tensor, values: Values) -> bool:
    """Set what this process holds of a tensor; return whether it is finite."""
    if not isinstance(tensor, torch.nn.Parameter):
        tensor.copy_(values(0, tensor.numel()).view(tensor.shape))
        return True
    part = values(*sharding.own_range(tensor))
    part = part.float() if part.dtype == torch.float64 else part
    sharding.set_own_part(tensor, part)
    return not part.numel() or all(map(torch.isfinite, part.aminmax()))  # NaN comes out of both


def _convert(matched: Matched, put: Callable[[str, list[int], Values], None]) -> None:
    """Join and split what is not one tensor of the folder, in the folder's own type; one result is held at a time."""
    taken = {id(source) for source in matched.sources.values()}
    state = {
        name: torch.empty(tensor.get_shape(), device="meta")
        if id(tensor) in taken
        else functools.partial(tensor.__getitem__, ...)  # Transformers calls it when it joins or splits
        for name, tensor in matched.tensors.items()
    }

    def put_converted(_: Any, name: str, value: torch.Tensor, *__: Any) -> None:
        if not value.is_meta:
            flat = value.reshape(-1)
            put(name, list(value.shape), lambda start, numel: flat[start : start + numel])

    settings = modeling_utils.LoadStateDictConfig(
        dtype=torch.float32, weight_mapping=get_model_conversion_mapping(matched.skeleton)
    )
    with _handing_over(put_converted):
        core_model_loading.convert_and_load_state_dict_in_model(
            model=matched.skeleton, state_dict=state, load_config=settings
        )


def read(source: Any, start: int, numel: int) -> torch.Tensor:
    """Return elements [start, start + numel) of a flattened tensor of a safetensors file; maps the rows around them."""
    shape = source.get_shape()
    if not shape or not numel:
        return source[...].reshape(-1)[:numel]
    row = math.prod(shape[1:])
    first, end = start // row, -(-(start + numel) // row)
    return source[first:end].reshape(-1)[start - first * row :][:numel]


def _tables_of_tokens(model: PreTrainedModel) -> set[int]:
    head = model.get_output_embeddings()
    tables = (getattr(model.get_input_embeddings(), "weight", None), getattr(head, "weight", None))
    return {id(table) for table in (*tables, getattr(head, "bias", None)) if table is not None}


def _with_mean_rows(shape: list[int], values: Callable[[int, int], torch.Tensor]) -> Callable[[int, int], torch.Tensor]:
    """Return a reader of a table with more rows than `shape` has, each the mean of those there are.

    Near the mean, a new token starts with less than an average token's probability and moves no other far
    (Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models").
    """
    rows, width = shape[0], math.prod(shape[1:])
    total, step = torch.zeros(width, dtype=torch.float64), max(1, _BLOCK // width)
    for first in range(0, rows, step):
        count = min(step, rows - first)
        total += values(first * width, count * width).view(count, width).double().sum(0)
    mean = (total / rows).float()

    def read_grown(start: int, numel: int) -> torch.Tensor:
        known = max(0, min(numel, rows * width - start))
        there = [values(start, known).float()] if known else []
        return torch.cat([*there, mean[torch.arange(start + known, start + numel) % width]])

    return read_grown

"""The state of any optimizer inside the engine, by parameter; tensors are enumerated, not known by name.

A state tensor of the parameter's shape (a moment) is cut like the parameter and fits every layout. Any other tensor (a
factor, a preconditioner, the scales of 8-bit moments) is saved whole, for the layout it was made in: at stage 0 that
is the parameter itself, else this rank's flat partition, and then only the same stage and world size can read it. What
an optimizer keeps on the owner of a whole matrix (`optim.exchange`) belongs to the parameter at every stage.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from turbolm.engine.engine import Engine
from turbolm.engine.partitions import Fragment
from turbolm.errors import UserError

# What recipe and schedule set in a parameter group at every start; all other numbers there are the optimizer's own.
_HYPERPARAMETERS = {"lr", "initial_lr", "lr_scale", "weight_decay", "eps", "momentum"}
_HYPERPARAMETERS |= {"base_weight_decay", "orthogonal", "assembled", "cautious_decay", "ns_steps", "row_beta2"}
_HYPERPARAMETERS |= {"soap_beta2", "soap_every", "soap_max_dim", "hyperball"}
_HYPERPARAMETERS |= {"fused", "foreach", "capturable", "differentiable", "maximize", "amsgrad", "nesterov"}

PARAMETER = "parameter"  # the layout of what belongs to a parameter, however it is cut


@dataclass
class ParameterState:
    """The optimizer's state of one fragment, its tensors by the path to them, such as `exp_avg` or `GG.0`."""

    sharded: dict[str, torch.Tensor] = field(default_factory=dict)  # 1-D, the fragment's elements
    whole: dict[str, torch.Tensor] = field(default_factory=dict)  # any shape, those of the fragment's flat tensor
    scalars: dict[str, float] = field(default_factory=dict)


def parameter_state(optimizer: torch.optim.Optimizer, fragment: Fragment) -> ParameterState:
    """Every tensor and number the optimizer holds for a fragment, sharing memory with it.

    Raises RuntimeError for a state that is neither (a text, an object), because it would be lost.
    """
    state = ParameterState()
    for path, value in _leaves(optimizer.state.get(fragment.flat, {})):
        if not torch.is_tensor(value):
            state.scalars[path] = value
        elif value.dim() == 0:
            state.scalars[path] = value.item()
        elif _is_cut_like(value, fragment.flat):
            state.sharded[path] = fragment.view(value)
        else:
            state.whole[path] = value.detach()
    owned = getattr(optimizer, "owned", {}).get(fragment.name, {})
    state.whole |= {path: value.detach() for path, value in _leaves(owned) if torch.is_tensor(value)}
    return state


def set_scalars(optimizer: torch.optim.Optimizer, fragment: Fragment, values: Mapping[str, float]) -> None:
    """Write scalars back in the form (tensor or number) that this optimizer keeps them in."""
    for path, value in values.items():
        *parents, name = path.split(".")
        holder: Any = optimizer.state[fragment.flat]
        for parent in parents:
            holder = holder[int(parent) if isinstance(holder, list) else parent]
        key: Any = int(name) if isinstance(holder, list) else name
        if torch.is_tensor(holder[key]):
            holder[key].fill_(value)
        else:
            holder[key] = type(holder[key])(value)


def layouts(engine: Engine) -> dict[str, str]:
    """The layout that each own fragment's whole states are bound to: only an equal text can read them."""
    fragments = engine.fragments()
    if engine.zero_stage == 0:
        return {fragment.name: PARAMETER for fragment in fragments}
    owned = getattr(engine.optimizer, "owned", {})
    of_flat: dict[int, list[Any]] = {}
    for fragment in fragments:
        of_flat.setdefault(id(fragment.flat), []).append([fragment.name, fragment.start, fragment.numel])
    rank = f"rank {dist.get_rank()} of {dist.get_world_size()}"
    digests = {key: hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16] for key, value in of_flat.items()}
    of_rank = {fragment.name: f"{rank}, {digests[id(fragment.flat)]}" for fragment in fragments}
    return of_rank | dict.fromkeys(owned, PARAMETER)


def group_numbers(optimizer: torch.optim.Optimizer) -> list[dict[str, float]]:
    """Counters that the optimizer keeps in its parameter groups, such as FusedAdam's `step`."""
    return [
        {
            name: value.item() if torch.is_tensor(value) else value
            for name, value in group.items()
            if name not in _HYPERPARAMETERS and _is_number(value)
        }
        for group in optimizer.param_groups
    ]


def set_group_numbers(
    optimizer: torch.optim.Optimizer, saved: list[dict[str, float]], counted: Mapping[str, float]
) -> None:
    """Restore `group_numbers`; settings that this optimizer does not have are skipped.

    `counted` are a parameter's scalars: one kernel of Adam counts its steps there, another in the groups.
    """
    for group, numbers in zip(optimizer.param_groups, saved, strict=False):
        for name, value in {**counted, **numbers}.items():
            if torch.is_tensor(group.get(name)):
                group[name].fill_(value)
            elif name in group:
                group[name] = value


def check_same_states(name: str, saved: set[str], ours: set[str]) -> None:
    """Raise UserError when checkpoint and optimizer keep different state tensors of a parameter."""
    if saved != ours:
        raise UserError(
            f"the optimizer's state of {name} in the checkpoint is {', '.join(sorted(saved)) or 'empty'}, and this "
            f"optimizer keeps {', '.join(sorted(ours)) or 'none'}; resume with the optimizer that saved it"
        )


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, tensor or number) of everything in nested mappings, lists and tensors that are made of tensors."""

    def below(name: object) -> str:
        return f"{path}.{name}" if path else str(name)

    if isinstance(value, Mapping):
        for name, child in value.items():
            yield from _leaves(child, below(name))
    elif isinstance(value, (list, tuple)):
        for index, child in enumerate(value):
            yield from _leaves(child, below(index))
    elif torch.is_tensor(value) and hasattr(value, "__tensor_flatten__"):
        for name in value.__tensor_flatten__()[0]:
            yield from _leaves(getattr(value, name), below(name))
    elif torch.is_tensor(value) or isinstance(value, (int, float)):
        yield path, value
    elif value is not None:
        raise RuntimeError(f"the optimizer's state {path!r} is a {type(value).__name__}, which cannot be saved")


def _is_cut_like(value: torch.Tensor, flat: torch.Tensor) -> bool:
    """Whether a state's elements match the parameter's one to one, in the same order in memory."""
    return value.numel() == flat.numel() and (value.shape == flat.shape or value.dim() == 1) and value.is_contiguous()


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) or (torch.is_tensor(value) and value.dim() == 0)

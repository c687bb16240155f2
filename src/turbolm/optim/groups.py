"""Group parameters by weight decay, learning rate and whether the optimizer assembles whole matrices of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from torch import nn

from turbolm.engine.sharding import whole_shape
from turbolm.recipe.optimizers import LrMultipliers

KINDS = ("matrices", "convolutions", "head", "embeddings", "vectors")
_DECAYED = ("matrices", "convolutions", "head")
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)  # transformers' Conv1D (GPT-2) is a plain matrix


def build_param_groups(
    model: nn.Module,
    weight_decay: float,
    lr_multipliers: LrMultipliers = LrMultipliers(),  # noqa: B008 (frozen)
    *,
    assembled: Collection[str] = (),
    own_decays: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Group the parameters with equal settings: weight decay on matrices and the head, none on norms, biases and
    embeddings (a tied head is an embedding); the learning rate is scaled by the multiplier of the parameter's kind.

    Parameters of the kinds in `assembled` with two or more dimensions, of which the optimizer needs whole matrices, are
    groups of their own, and so are those of the kinds in `own_decays`, whose learning rate decays over a time of its
    own.

    Each group is a dict with `params` in the model's order, `weight_decay`, `base_weight_decay` (which schedules
    scale), `lr_scale`, `lr_kind` (the kind in `own_decays`, or nothing), `name`, `tensor_names` and `assembled`.
    """
    groups: dict[tuple[bool, bool, float, str], dict[str, Any]] = {}
    for name, parameter, kind in parameter_kinds(model):
        decays, is_assembled = kind in _DECAYED, kind in assembled and _num_dims(parameter) > 1
        of_lr = "matrices" if kind == "convolutions" else kind
        lr_scale, lr_kind = getattr(lr_multipliers, of_lr), of_lr if of_lr in own_decays else ""
        decay = weight_decay if decays else 0.0
        new = {
            "params": [],
            "tensor_names": [],
            "kinds": set(),
            "weight_decay": decay,
            "base_weight_decay": decay,
            "lr_scale": lr_scale,
            "lr_kind": lr_kind,
            "assembled": is_assembled,
        }
        group = groups.setdefault((not is_assembled, not decays, lr_scale, lr_kind), new)
        group["params"].append(parameter)
        group["tensor_names"].append(name)
        group["kinds"].add(kind)
    ordered = [groups[key] for key in sorted(groups)]
    for group in ordered:
        kinds = group.pop("kinds")
        group["name"] = ", ".join(kind for kind in KINDS if kind in kinds)
    return ordered


def parameter_kinds(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, str]]:
    """Yield (name, parameter, one of KINDS) for every trainable parameter; tied ones once."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    convolutions = {id(module.weight) for module in model.modules() if isinstance(module, _CONVOLUTIONS)}
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    head = id(output.weight) if output is not None else None
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in embeddings:
            kind = "embeddings"
        elif _num_dims(parameter) < 2 or name.endswith("A_log"):  # the dynamics of state-space models
            kind = "vectors"
        elif id(parameter) == head:
            kind = "head"
        else:
            kind = "convolutions" if id(parameter) in convolutions else "matrices"
        yield name, parameter, kind


def group_table(optimizer_name: str, groups: list[dict[str, Any]]) -> str:
    """Return one line per group: what updates it, learning rate, decay, number of tensors, first and last tensor."""
    lines = [f"{'group':<36} {'updated by':<14} {'lr x':>6} {'decay':>6} {'tensors':>7}  names"]
    for group in groups:
        by = "adamw" if optimizer_name == "muon" and not group["assembled"] else optimizer_name
        names = group["tensor_names"]
        shown = names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]}"
        lines.append(
            f"{group['name']:<36} {by:<14} {group['lr_scale']:>6g} {group['weight_decay']:>6g} {len(names):>7}  {shown}"
        )
    return "\n".join(lines)


def _num_dims(parameter: nn.Parameter) -> int:
    return len(whole_shape(parameter))

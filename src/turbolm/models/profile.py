"""Trace a model on meta tensors: parameters, FLOPs and bytes of each kind of layer, for every way to run it.

No weight is allocated and nothing is computed. A model is traced with three layers of each kind, at four shapes of a
micro-batch; what is found must be affine in tokens and in pairs of tokens, and the sum over all layers must equal one
trace of the whole model. `turbolm.plan.count` runs this in a child process and caches the answer.
"""

from __future__ import annotations

import copy
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.integrations import unset_hf_deepspeed_config

from turbolm.errors import UserError
from turbolm.models.compile import stacked_layers
from turbolm.models.config import make_config
from turbolm.models.loss import attach_loss
from turbolm.models.meter import AROUND, LOSS, Meter, Section, metered
from turbolm.models.recompute import apply_activation_checkpointing
from turbolm.models.size import count_idle, expert_parameters
from turbolm.models.stand_ins import FLASH, loss_chunks, stand_ins
from turbolm.plan.profile import (
    Activations,
    Cost,
    Kernel,
    LayerKind,
    Loss,
    LossBytes,
    ModelProfile,
    Peak,
    SpanKind,
    Tensor,
    TensorKind,
)
from turbolm.recipe.model_config import is_dropout

_SHAPES = ((2, 512), (2, 1024), (4, 512))  # sequences x tokens
_CHECKED = (4, 1536)
_TOLERANCE = 0.005
_LAYERS_OF_A_KIND = 3  # the last one stands for the others: the first two keep the embeddings and what they receive
# What a moment must be the worst for to be kept: tokens, those of a sequence, and rows of the loss.
_GRID = [(tokens, seq_len, rows) for tokens in (2**k for k in range(8, 19)) for seq_len in (256, 2048, 16384)
         if seq_len <= tokens for rows in (64, 1024, 16384) if rows <= tokens]  # fmt: skip
_DTYPES = {2: torch.bfloat16, 4: torch.float32}
_RECOMPUTATIONS = ("none", "selective", "full")
_MEASURED = ("saved", "head_width", "matrix_flops", "forward_bytes", "backward_bytes")
_SPANS: dict[str, SpanKind] = {
    "sliding_attention": "window",
    "chunked_attention": "chunk",
    "full_attention": "full",
    "attention": "full",
}

_NAMES = {AROUND: "around the layers", LOSS: "the loss"}
Build = Callable[[str, torch.dtype], PreTrainedModel]
Way = tuple[Any, Any, int]  # recomputation, kernel, bytes of an element


class CannotTrace(Exception):
    """The model cannot be traced, and why."""


def profile_model(config: PreTrainedConfig) -> ModelProfile:
    """Return the profile of the model that `config` describes. Raises CannotTrace."""
    unset_hf_deepspeed_config()
    try:
        with stand_ins():
            return _profile(config)
    except CannotTrace:
        raise
    except Exception as error:  # of as many kinds as there are model types
        raise CannotTrace(f"{config.model_type}: {type(error).__name__}: {str(error).splitlines()[0]}") from error


def _profile(config: PreTrainedConfig) -> ModelProfile:
    whole = _build(config, _kernels(config)[-1], torch.bfloat16)
    layers = stacked_layers(whole)
    kinds = _kinds(whole.config, layers)
    kept = [number for numbers in kinds for number in numbers[:_LAYERS_OF_A_KIND]]
    small = _with_layers(config, sorted(kept))
    found = {
        (mode, kernel, size): _trace_at_shapes(small, kernel, size, mode)
        for kernel, size, mode in itertools.product(_kernels(config), _DTYPES, _modes(whole))
        if kernel != "flash" or size == 2  # half precision only
    }
    tensors = tuple(_tensors(whole))
    position = {number: place for place, number in enumerate(sorted(kept))}
    made = [_layer_kind(whole.config, layers, numbers, position, found) for numbers in kinds]
    around = [_around(way, fitted, position, kinds) for way, fitted in found.items()]
    first = next(iter(found.values()))
    profile = ModelProfile(
        model_type=config.model_type,
        tensors=tensors,
        idle_parameters=count_idle(whole),
        is_tied=whole.get_output_embeddings().weight is whole.get_input_embeddings().weight,
        outer_flops_per_token=first[AROUND].matrix_flops.per_token + first[LOSS].matrix_flops.per_token,
        layers=tuple(made),
        outer=tuple(around),
        losses=tuple(_losses(_with_layers(config, kept[:1]), _kernels(config)[0])),
        versions={"torch": torch.__version__.partition("+")[0], "transformers": transformers.__version__},
    )
    _check_whole(profile, config)
    return profile


def _kernels(config: PreTrainedConfig) -> tuple[Kernel, ...]:
    """Return the kernels to trace: a model without sdpa computes attention itself on a CPU."""
    supports = AutoModelForCausalLM._model_mapping[type(config)]
    plain: Kernel = "sdpa" if supports._supports_sdpa else "eager"
    return ("flash", plain) if supports._supports_attention_backend else (plain,)


def _modes(model: PreTrainedModel) -> tuple[str, ...]:
    return _RECOMPUTATIONS if model.supports_gradient_checkpointing else ("none",)


def _build(config: PreTrainedConfig, kernel: str, dtype: torch.dtype) -> PreTrainedModel:
    name = {"flash": FLASH}.get(kernel, kernel)
    with torch.device("meta"), no_init_weights():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=dtype, attn_implementation=name, trust_remote_code=False
        )
    model.tie_weights()
    return model.train()


def _kinds(config: PreTrainedConfig, layers: Sequence[nn.Module]) -> list[list[int]]:
    """Return the numbers of layers that are alike: same classes, parameters, type and span."""
    groups: dict[Any, list[int]] = {}
    for number, layer in enumerate(layers):
        shapes = tuple((name, tuple(p.shape)) for name, p in layer.named_parameters())
        modules = tuple(type(module).__name__ for module in layer.modules())
        groups.setdefault(
            (shapes, modules, _layer_type(config, layer, number), _span(config, layer, number)), []
        ).append(number)
    return list(groups.values())


def _layer_type(config: PreTrainedConfig, layer: nn.Module, number: int) -> str:
    types = getattr(config.get_text_config(), "layer_types", None)
    return str(types[number]) if types and number < len(types) else type(layer).__name__


def _span(config: PreTrainedConfig, layer: nn.Module, number: int) -> tuple[SpanKind, int | None]:
    """Return what limits the keys of a layer's queries, as its modules and its type say."""
    text = config.get_text_config()
    kind = _SPANS.get(_layer_type(config, layer, number))
    windows = {getattr(module, "sliding_window", None) for module in layer.modules()} - {None}
    if kind == "chunk":
        return "chunk", int(text.attention_chunk_size)
    if kind == "window" or (kind is None and windows):
        limit = next(iter(windows), getattr(text, "sliding_window", None))
        return ("window", int(limit)) if limit else ("full", None)
    return "full", None


def _with_layers(config: PreTrainedConfig, numbers: Sequence[int]) -> Build:
    """Return what builds the model with these layers only, in their order."""

    def build(kernel: str, dtype: torch.dtype) -> PreTrainedModel:
        model = _build(config, kernel, dtype)
        layers = stacked_layers(model)
        owner, name = next(
            (module, name)
            for module in model.modules()
            for name, child in module.named_children()
            if isinstance(child, nn.ModuleList) and len(child) == len(layers) and child[0] is layers[0]
        )
        setattr(owner, name, nn.ModuleList(layers[number] for number in numbers))
        for part in {id(one): one for one in (model.config.get_text_config(), owner.config)}.values():
            for key, value in list(vars(part).items()):
                if isinstance(value, list | tuple) and len(value) == len(layers):
                    setattr(part, key, [value[number] for number in numbers])
            part.num_hidden_layers = len(numbers)
        return model

    return build


@dataclass(frozen=True)
class Fitted:
    """What a section takes, as a function of the micro-batch."""

    saved: Cost
    head_width: Cost
    matrix_flops: Cost
    forward_bytes: Cost
    backward_bytes: Cost
    forward_peak: Peak
    backward_peak: Peak


Run = tuple[int, int, int]  # sequences, tokens of each, rows of the loss at once
_CHUNKED = ((1, 2048, 1024), (1, 4096, 2048), (1, 3072, 1024), (1, 4096, 1024))


def _trace_at_shapes(build: Build, kernel: str, size: int, mode: str) -> dict[int, Fitted]:
    """Trace a model with all logits at once and fit what each section takes."""
    model = build(kernel, _DTYPES[size])
    attach_loss(model, "full")
    apply_activation_checkpointing(model, mode)
    runs = [(*shape, 0) for shape in (*_SHAPES, _CHECKED)]
    traces = [_trace(model, kernel, *shape) for shape in (*_SHAPES, _CHECKED)]
    what = f"{mode} recomputation, {kernel} attention"
    return {
        section: _fit_section(
            f"{what}, {_NAMES.get(section, 'a layer')}", runs, [one.sections[section] for one in traces]
        )
        for section in traces[0].sections
    }


def _trace(model: PreTrainedModel, kernel: str, num_sequences: int, seq_len: int) -> Meter:
    """Run one micro-batch forward and backward."""
    shape = (1, num_sequences * seq_len) if kernel == "flash" else (num_sequences, seq_len)
    with torch.device("meta"):
        tokens = torch.zeros(shape, dtype=torch.long)
        inputs = {"input_ids": tokens, "position_ids": torch.zeros_like(tokens), "targets": torch.zeros_like(tokens)}
    layers = stacked_layers(model)
    with metered(model, layers, inputs.values()) as meter:
        objective, nll = model(**inputs, use_cache=False)
        meter.end(LOSS, LOSS)
        before_loss = meter.now - meter.sections[LOSS].saved
        meter.sections[AROUND].saved = before_loss - sum(meter.sections[number].saved for number in range(len(layers)))
        del nll
        meter.in_backward = True  # of the loss, until the gradient of the last layer's output is there
        objective.backward()
    return meter


def _fit_section(what: str, runs: list[Run], sections: list[Section]) -> Fitted:
    """Fit what a section takes in each run. Raises CannotTrace where it is not affine."""
    costs = {name: _fit(f"{name} of {what}", runs, [vars(one)[name] for one in sections]) for name in _MEASURED}
    forward = _fit_peak(what, runs, [one.forward_live for one in sections]) if "loss" in what else Peak(())
    backward = _fit_peak(what, runs, [one.backward_live for one in sections])
    return Fitted(**costs, forward_peak=forward, backward_peak=backward)


def _fit_peak(what: str, runs: list[Run], lists: list[list[float]]) -> Peak:
    """Fit the live bytes after each operator, and return those that are the worst for some micro-batch."""
    if "chunks" in what and (length := len(lists[2]) - len(lists[0])):  # those of the last chunk, when most is kept
        lists = [one[len(one) - length :] for one in lists]
    if len(set(map(len, lists))) > 1:
        raise CannotTrace(f"{what}: other operators for other shapes")
    moments = [_fit(f"peak of {what}", runs, list(values)) for values in set(zip(*lists, strict=True))]
    worst = {_worst(moments, *at) for at in _GRID} if moments else set()
    return Peak(tuple(sorted(worst, key=lambda one: one.fixed)))


def _worst(moments: list[Cost], tokens: int, seq_len: int, rows: int) -> Cost:
    return max(moments, key=lambda one: one.at(tokens, seq_len, rows))


def _fit(what: str, runs: list[Run], values: list[float]) -> Cost:
    """Return the cost through all values but the last, which checks it. Raises CannotTrace."""
    terms = np.array([[n * s, n * s * s, 1, rows] for n, s, rows in runs], dtype=float)
    used = [0, 2, 3] if runs[0][2] else [0, 1, 2]  # chunks of the loss do not look at pairs
    solved = np.zeros(4)
    solved[used] = np.linalg.lstsq(terms[:-1, used] / 1024, np.array(values[:-1]) / 1024, rcond=None)[0]
    cost = Cost(*(round(float(value), 3) + 0.0 for value in solved))
    expected = float(terms[-1] @ solved)
    if abs(expected - values[-1]) > _TOLERANCE * abs(values[-1]) + 4096:
        raise CannotTrace(f"{what} is not affine in tokens: {values[-1]:.6g} where {expected:.6g} was expected")
    return cost


def _layer_kind(
    config: PreTrainedConfig,
    layers: Sequence[nn.Module],
    numbers: Sequence[int],
    position: dict[int, int],
    found: dict[Way, dict[int, Fitted]],
) -> LayerKind:
    """Return what one of the layers `numbers` costs."""
    place = position[_representative(numbers)]
    plain = next(iter(found.values()))[place]
    span_kind, limit = _span(config, layers[numbers[0]], numbers[0])
    per_pair = 2 * plain.head_width.fixed or plain.matrix_flops.per_pair
    return LayerKind(
        name=_layer_type(config, layers[numbers[0]], numbers[0]),
        count=len(numbers),
        num_parameters=sum(p.numel() for p in layers[numbers[0]].parameters()),
        span_kind=span_kind if per_pair else "none",
        span_limit=limit,
        matrix_flops_per_token=plain.matrix_flops.per_token,
        attention_flops_per_pair=per_pair,
        activations=tuple(_activations(way, fitted[place], fitted[place].saved) for way, fitted in found.items()),
    )


def _representative(numbers: Sequence[int]) -> int:
    """Return the layer that stands for others of its kind: not the first two of the model."""
    return numbers[:_LAYERS_OF_A_KIND][-1]


def _activations(way: Way, measured: Fitted, saved: Cost) -> Activations:
    return Activations(*way, saved, measured.backward_peak, measured.forward_bytes, measured.backward_bytes)


def _around(way: Way, fitted: dict[int, Fitted], position: dict[int, int], kinds: list[list[int]]) -> Activations:
    """Return what stands around the layers, with what the first layer saves more than others of its kind."""
    saved = fitted[AROUND].saved
    peak = Peak(tuple(moment + saved.times(-1) for moment in fitted[AROUND].backward_peak.moments))
    for numbers in kinds:
        one = fitted[position[_representative(numbers)]].saved
        for number in numbers[:_LAYERS_OF_A_KIND]:
            saved += fitted[position[number]].saved + one.times(-1)
    return _activations(way, replace(fitted[AROUND], backward_peak=peak), saved)


def _losses(build: Build, kernel: str) -> Iterator[LossBytes]:
    """Trace head and loss in each precision: with all logits, and in two, three and four chunks."""
    for size in _DTYPES:
        full = _trace_at_shapes(build, kernel, size, "none")[LOSS]
        yield _loss_bytes("full", size, full)
        for loss in ("chunked", "liger"):
            sections = []
            for num_sequences, seq_len, rows in _CHUNKED:
                with loss_chunks(rows):
                    model = build(kernel, _DTYPES[size])
                    attach_loss(model, loss)
                    sections.append(_trace(model, kernel, num_sequences, seq_len).sections[LOSS])
            yield _loss_bytes(loss, size, _fit_section(f"the {loss} loss by chunks", list(_CHUNKED), sections))


def _loss_bytes(loss: Loss, size: int, found: Fitted) -> LossBytes:
    moved = found.forward_bytes + found.backward_bytes
    return LossBytes(loss, size, found.saved, found.forward_peak, found.backward_peak, moved)


def _tensors(model: PreTrainedModel) -> Iterator[Tensor]:
    experts = {id(parameter) for parameter, _ in expert_parameters(model)}
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    output = model.get_output_embeddings()
    head = {id(parameter) for parameter in output.parameters()} if output is not None else set()
    for name, parameter in model.named_parameters():
        kinds: Iterator[TensorKind] = (
            kind  # type: ignore[misc]
            for kind, members in (("embedding", tables), ("head", head), ("expert", experts))
            if id(parameter) in members
        )
        yield Tensor(name, tuple(parameter.shape), next(kinds, "matrix" if parameter.ndim > 1 else "vector"))


def _check_whole(profile: ModelProfile, config: PreTrainedConfig) -> None:
    """Trace the whole model once and compare. Raises CannotTrace where its layers do not add up to it."""
    kernel, (sequences, seq_len) = _kernels(config)[-1], _CHECKED
    model = _build(config, kernel, torch.bfloat16)
    attach_loss(model, "full")
    meter = _trace(model, kernel, sequences, seq_len)
    tokens = sequences * seq_len
    layers = sum(one.saved for number, one in meter.sections.items() if number >= 0)
    flops = sum(one.matrix_flops for one in meter.sections.values())
    for what, found, expected in (
        ("bytes", meter.sections[AROUND].saved + layers, profile.saved("none", kernel, 2).at(tokens, seq_len)),
        ("FLOPs", flops, profile.matrix_flops_per_token * tokens + _eager_flops(profile, kernel, tokens, seq_len)),
    ):
        if abs(found - expected) > _TOLERANCE * found:
            raise CannotTrace(f"the whole model takes {found:.6g} {what}, its layers add up to {expected:.6g}")


def _eager_flops(profile: ModelProfile, kernel: str, tokens: int, seq_len: int) -> float:
    """Return the FLOPs of attention that is made of plain products, which see every pair of tokens."""
    if kernel != "eager":
        return 0.0
    return sum(kind.count * kind.attention_flops_per_pair for kind in profile.layers) * tokens * seq_len


def answer(request: dict[str, Any]) -> str:
    """Return the profile of a requested configuration as JSON, or the reason why there is none."""
    try:
        config = make_config(request["config"], None)
        for key in vars(config):
            if is_dropout(key) and key not in request["config"]:
                setattr(config, key, request["dropout"])
        return profile_model(config).to_json()
    except (CannotTrace, UserError) as error:
        return json.dumps({"problem": str(error)})


if __name__ == "__main__":
    print(answer(json.load(sys.stdin)))

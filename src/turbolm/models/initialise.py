"""Draw initial weights that depend only on the seed and the model, whole or already sharded by ZeRO-3."""

from __future__ import annotations

import functools
import hashlib
import math
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import TORCH_INIT_FUNCTIONS, TORCH_MODULES_TO_PATCH, no_init_weights

from turbolm.engine import sharding
from turbolm.errors import UserError

# How Transformers' model types call the matrices whose product is added to the residual stream.
_RESIDUAL_OUTPUTS = {"o_proj", "out_proj", "c_proj", "down_proj", "dense", "dense_4h_to_h", "fc2", "fc_out", "w2", "wo"}


@torch.no_grad()
def initialise_weights(model: PreTrainedModel, seed: int, init: str = "default") -> None:
    """Draw the weights with the model's own `_init_weights`, one layer at a time, each from its own seed.

    The random numbers of a layer do not depend on which layers were drawn before it, nor on where its parameters live:
    they are drawn in fp32 on the CPU and copied. Parameters that ZeRO-3 has partitioned are drawn by rank 0, layer by
    layer, and every rank gets its part, so that no process ever holds the whole model; then it is collective.

    A parameter that no rule draws keeps what its constructor gives it (`_ConstructedValues`), as in Transformers.

    `init` is `model.init`. `depth_scaled` draws the matrices whose output is added to the residual stream with a
    standard deviation smaller by sqrt(2 x layers), as GPT-2 does (Radford et al. 2019, section 2.3), so that the stream
    does not grow with depth. `zero_outputs` makes them zero (modded-nanogpt; GPT-2's biases are zero anyway): they get
    gradients in the first step, and what is before them from the second on.
    """
    drawn: set[int] = set()
    scaled = {id(module.weight) for module in residual_outputs(model, init)} if init != "default" else set()
    std = 0.0
    if init == "depth_scaled":
        std = model.config.initializer_range / math.sqrt(2 * model.config.num_hidden_layers)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    constructed = functools.cache(lambda: _ConstructedValues(model, seed))

    def draw(
        name: str, owner: PreTrainedModel, modules: list[nn.Module], parameters: list[nn.Parameter]
    ) -> list[torch.Tensor]:
        originals = [parameter.data for parameter in parameters]
        for parameter in parameters:
            parameter.data = torch.full(sharding.whole_shape(parameter), math.nan, dtype=torch.float32)
        _seed(seed, name)
        _draw(owner, modules, parameters, scaled, std)
        undrawn = [parameter for parameter in parameters if parameter.data.isnan().any()]
        if undrawn:  # the rules once more, on what the constructor gives: some only scale it, or set a part
            _seed(seed, f"{name}/constructor")
            for parameter in undrawn:
                parameter.data = constructed().of(names[id(parameter)], parameter.data)
            _seed(seed, name)
            _draw(owner, modules, parameters, scaled, std)
        values = [parameter.data for parameter in parameters]
        for parameter, original in zip(parameters, originals, strict=True):
            parameter.data = original
        return values

    for name, owner, modules in _layers(model, "", model):
        parameters = [p for module in modules for p in module.parameters(recurse=False) if id(p) not in drawn]
        drawn.update(id(parameter) for parameter in parameters)
        if not parameters:  # none of its own, or the head of an embedding that was drawn already
            continue
        values = draw(name, owner, modules, parameters) if sharding.sets_whole(parameters[0]) else []
        for parameter in parameters:
            sharding.set_whole(parameter, values.pop(0) if values else None)
    torch.manual_seed(seed)


def _seed(seed: int, name: str) -> None:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:7], "big"))


def residual_outputs(model: PreTrainedModel, init: str) -> list[Any]:
    """Return the modules whose output is added to the residual stream. Raises UserError where none is known."""
    found = []
    for name, module in model.named_modules():
        parts = name.split(".")
        if parts[-1] in _RESIDUAL_OUTPUTS and any(part.isdigit() for part in parts) and hasattr(module, "weight"):
            found.append(module)
    if not found:
        raise UserError(f"model.init: {init} knows no residual outputs in {model.config.model_type}; use default")
    return found


def _draw(
    owner: PreTrainedModel, modules: list[nn.Module], parameters: list[nn.Parameter], scaled: set[int], std: float
) -> None:
    ours = {id(parameter) for parameter in parameters}
    earlier = [p for module in modules for p in module.parameters(recurse=False) if id(p) not in ours]
    for parameter in earlier:  # a head with a bias is drawn after the embedding it is tied to, whose weight stays
        parameter._is_hf_initialized = True
    for module in modules:
        owner._init_weights(module)
    for parameter in earlier:
        del parameter._is_hf_initialized
    for parameter in parameters:
        if id(parameter) in scaled:
            parameter.data.normal_(0.0, std)


class _ConstructedValues:
    """The values that the constructors of a model's modules give its parameters, in fp32 on the CPU.

    The model is constructed again with `torch.empty` on the meta device, so that its weights take no memory. Calls to
    `torch.nn.init` are recorded; `of` replays those of one parameter with the current random numbers.
    """

    def __init__(self, model: PreTrainedModel, seed: int) -> None:
        self._noted: list[tuple[torch.Tensor, Callable[[torch.Tensor], Any]]] = []
        self._parameters: dict[str, nn.Parameter] = {}
        torch.manual_seed(seed)
        try:
            with self._noting():
                built = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32, trust_remote_code=False)
        except Exception:  # on one rank of many: the values stay NaN, and the check of the logits refuses them
            traceback.print_exc()
            return
        self._parameters = dict(built.named_parameters())

    @contextmanager
    def _noting(self) -> Iterator[None]:
        empty = torch.empty

        def note(function: Callable[..., Any], tensor: torch.Tensor, *arguments: Any, **kwargs: Any) -> torch.Tensor:
            if tensor.is_meta:
                self._noted.append((tensor, lambda values: function(values, *arguments, **kwargs)))
            else:
                function(tensor, *arguments, **kwargs)
            return tensor

        with no_init_weights(), ExitStack() as stack:
            for module in [sys.modules[name] for name in TORCH_MODULES_TO_PATCH if name in sys.modules]:
                for name, function in TORCH_INIT_FUNCTIONS.items():
                    if hasattr(module, name):
                        stack.enter_context(patch.object(module, name, functools.partial(note, function)))
            stack.enter_context(patch("torch.empty", lambda *size, **kw: empty(*size, **{**kw, "device": "meta"})))
            yield

    def of(self, name: str, otherwise: torch.Tensor) -> torch.Tensor:
        """Return the value of the parameter `name`; `otherwise` where no constructor sets one."""
        parameter = self._parameters.get(name)
        calls = [call for tensor, call in self._noted if tensor is parameter]
        if parameter is None or (parameter.is_meta and not calls):
            print(f"initial weights: neither a rule nor a constructor of {name} sets it")
            return otherwise
        if not parameter.is_meta:
            return parameter.data.float().clone()
        value = torch.empty(parameter.shape, dtype=torch.float32)
        for call in calls:
            call(value)
        return value


def _layers(
    module: nn.Module, name: str, owner: PreTrainedModel
) -> Iterator[tuple[str, PreTrainedModel, list[nn.Module]]]:
    """(name, model whose rule applies, modules children first) of what is drawn together.

    A layer of the stack is drawn as a whole, because some models scale the projections of their children (GPT-2).
    """
    owner = module if isinstance(module, PreTrainedModel) else owner
    for child_name, child in module.named_children():
        path = f"{name}.{child_name}" if name else child_name
        if isinstance(module, nn.ModuleList):
            yield path, owner, list(_children_first(child))
        else:
            yield from _layers(child, path, owner)
    yield name, owner, [module]


def _children_first(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        yield from _children_first(child)
    yield module


def seed_for_rank(seed: int, rank: int) -> None:
    """Seed each rank differently from here on, for models with dropout."""
    _seed(seed, f"rank/{rank}")


def count_parameters(module: nn.Module) -> int:
    """Return the number of elements of all parameters, sharded or not; tied ones count once."""
    return sum(math.prod(sharding.whole_shape(parameter)) for parameter in module.parameters())

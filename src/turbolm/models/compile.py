"""torch.compile for training: the whole model or each layer, with static shapes, one compilation per sequence
length."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._dynamo.callback import CallbackArgs, CallbackTrigger, callback_handler
from torch._dynamo.exc import TorchDynamoException
from transformers import PreTrainedModel

from turbolm.engine import sharding
from turbolm.errors import UserError
from turbolm.models.attention import ALWAYS_MASKED_SDPA
from turbolm.models.initialise import count_parameters

# Graphs that torch keeps of one function: with and without gradients, for each sequence length and kind of layer.
_MAX_COMPILATIONS = 256


class Compilations:
    """What torch has compiled in this process since `start`: graphs, and the seconds they took.

    A graph's backward pass is compiled when it first runs; it adds seconds, but it is not another graph.
    """

    def __init__(self) -> None:
        self.count, self.seconds = 0, 0.0
        self._started = 0.0
        self._taken = (0, 0.0)

    def start(self) -> None:
        """Forget all that was compiled, in torch as well, and count from 0."""
        torch.compiler.reset()
        self.__init__()  # type: ignore[misc]
        callback_handler.register_start_callback(self._on_start)
        callback_handler.register_end_callback(self._on_end)

    def _on_start(self, _: CallbackArgs) -> None:
        self._started = time.perf_counter()

    def _on_end(self, event: CallbackArgs) -> None:
        self.seconds += time.perf_counter() - self._started
        self.count += event.callback_trigger is CallbackTrigger.DYNAMO

    def take_new(self) -> tuple[int, float]:
        """(graphs, seconds) since the last call."""
        count, seconds = self._taken
        self._taken = self.count, self.seconds
        return self.count - count, self.seconds - seconds


compilations = Compilations()


def apply_compile(model: PreTrainedModel, mode: str, *, backend: str = "inductor") -> None:
    """Compile `model` in place: `none`, `model` (the whole forward pass) or `layers` (each layer of the stack).

    Call it on the model inside its engine: what is compiled lies within the hooks of DeepSpeed. Layers of one kind
    share their code, so a stack is compiled once. Shapes are static: only inputs of another shape compile again. Raises
    UserError where there is no compiler, and at its first forward pass for a model that cannot be compiled as one
    graph.
    """
    if mode == "none":
        return
    if next(model.parameters()).device.type == "cpu" and backend == "inductor":
        _check_cpp_compiler()
        # A pool of compiler processes would take memory and outlive a process that ends with os._exit.
        torch._inductor.config.compile_threads = int(os.environ.get("TORCHINDUCTOR_COMPILE_THREADS", "1"))
    compilations.start()
    torch._dynamo.config.recompile_limit = _MAX_COMPILATIONS
    torch._dynamo.config.accumulated_recompile_limit = 4 * _MAX_COMPILATIONS
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    if mode == "layers" and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(ALWAYS_MASKED_SDPA)
    for module in [model] if mode == "model" else stacked_layers(model):
        compiled = torch.compile(module.forward, dynamic=False, fullgraph=True, backend=backend)
        module.forward = _explained(compiled, model.config.model_type, mode)


def stacked_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The layers of the model's stack: of all lists of modules, the one with most parameters."""
    stacks = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    if not stacks:
        raise UserError(f"execution.compile: {model.config.model_type} has no list of layers; use model or none")
    return max(stacks, key=lambda stack: sum(count_parameters(layer) for layer in stack))


def keep_layers_whole(model: PreTrainedModel) -> None:
    """Have ZeRO-3 gather the weights of a layer at once, before its forward pass.

    Its hooks on the modules inside would break the graph of a compiled layer, and selective recomputation would take
    what they do for operations of the layer.
    """
    sharding.gather_whole(model, list({type(layer) for layer in stacked_layers(model)}))


def _check_cpp_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except RuntimeError as error:
        raise UserError(f"execution.compile: a CPU needs a C++ compiler such as g++ ({error}); use none") from None


def _explained(compiled: Callable[..., Any], model_type: str, mode: str) -> Callable[..., Any]:
    @functools.wraps(compiled)
    def forward(*arguments: Any, **kwargs: Any) -> Any:
        try:
            return compiled(*arguments, **kwargs)
        except TorchDynamoException as error:
            reason = str(error).strip().splitlines()[0]
            other = "layers or none" if mode == "model" else "none"
            raise UserError(
                f"execution.compile: {model_type} cannot be compiled by {mode}: {reason}; use {other}"
            ) from error

    return forward

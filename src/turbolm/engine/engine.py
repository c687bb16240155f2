"""A typed engine: everything that training, checkpoints and checks need from DeepSpeed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from turbolm.engine import partitions, state
from turbolm.engine.averaged_weights import AveragedWeights
from turbolm.engine.hooks import Gate, install_gate
from turbolm.engine.lookahead import Lookahead
from turbolm.engine.partitions import Fragment
from turbolm.engine.sharding import whole_shape
from turbolm.plan.rates import Rates


class Balance(Protocol):
    """What evens the load of experts after each update. Collective."""

    def update(self, load: torch.Tensor) -> None:
        """Take this rank's load of the global batch, [layers, experts]."""


class Engine:
    """A model, its optimizer, and how ZeRO partitions both over the ranks.

    `zero_stage` is 0 to 3. `optimizer` is the torch optimizer inside DeepSpeed's, which steps the fp32 tensors this
    rank owns; its state is keyed by them. Calling the engine runs the model's forward pass. `balance`, if any, is told
    the load of a mixture's experts after each update. `averaged` is None unless a mean of the weights is kept.
    """

    def __init__(self, deepspeed_engine: Any):
        self.deepspeed_engine = deepspeed_engine  # for this package and tests
        self.module: PreTrainedModel = deepspeed_engine.module
        self.device: torch.device = deepspeed_engine.device
        self.zero_stage: int = deepspeed_engine.zero_optimization_stage()
        self._zero = deepspeed_engine.optimizer
        self.optimizer: torch.optim.Optimizer = self._zero.optimizer if self.zero_stage else self._zero
        self._gate: Gate | None = None
        self.balance: Balance | None = None
        self._lookahead: Lookahead | None = None
        self.averaged: AveragedWeights | None = None
        self._before_changes: list[Callable[[], None]] = []

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self.deepspeed_engine(*arguments, **keywords)

    @property
    def training(self) -> bool:
        """Return whether the model is in training mode."""
        return self.module.training

    def train(self) -> None:
        """Put the model into training mode."""
        self.deepspeed_engine.train()

    def eval(self) -> None:
        """Put the model into evaluation mode."""
        self.deepspeed_engine.eval()

    def guard_updates(self, gate: Gate) -> None:
        """Let `gate` decide before every update from now on."""
        self._gate = gate
        if self.zero_stage > 0:
            install_gate(self._zero, gate, scales_loss=self.deepspeed_engine.fp16_enabled())

    def before_changes(self, action: Callable[[], None]) -> None:
        """Call `action` from now on before weights or the optimizer's state change."""
        self._before_changes.append(action)
        self.optimizer.register_step_pre_hook(lambda *_: action())

    def look_ahead(self, decay: float) -> None:
        """Take gradients ahead of the weights from now on (EMA-Nesterov), where the rates say so."""
        self._lookahead = Lookahead(decay)

    def add_to_average(self, share: float) -> None:
        """Move the mean of the weights towards them by `share` of their distance (`AveragedWeights.add`)."""
        assert self.averaged is not None
        self._tell_before_changes()
        self.averaged.add(self._stepped(), share)

    def swap_average(self) -> None:
        """Let the model compute with the mean of the weights, or with the weights again. Collective."""
        assert self.averaged is not None
        self._tell_before_changes()
        self.averaged.swap(self._stepped())
        self.publish_weights()

    def backward_and_step(self, loss: torch.Tensor, *, is_boundary: bool) -> torch.Tensor | float | None:
        """Run the backward pass of one micro-batch, and at the boundary clip and update. Returns the unclipped norm.

        This is `accelerator.backward`, split because ZeRO-0 in fp32 keeps no norm: there it is computed between the two
        calls. The result is None within an accumulation, and infinite when DeepSpeed skipped the update.
        """
        engine = self.deepspeed_engine
        engine.set_gradient_accumulation_boundary(is_boundary=is_boundary)
        engine.backward(loss, scale_wrt_gas=False)
        if not is_boundary:
            return None
        norm: Any = None
        is_refused = False
        if self.zero_stage == 0:
            gradients = [parameter.grad for parameter in self.module.parameters() if parameter.grad is not None]
            norm = nn.utils.get_total_norm(gradients)
            is_refused = bool(self._gate and self._gate.is_open and self._gate.refuses(norm))
            if is_refused:
                engine.zero_grad()
                engine.set_gradient_accumulation_boundary(is_boundary=False)  # only counts the micro-batch
        engine.step()
        if self.zero_stage in (1, 2) and self._zero.overflow:
            self._forget_offloaded_gradients()
        if self._lookahead and not self._lookahead.finish(
            self.optimizer, self._stepped(), is_updated=not (is_refused or self.dropped_update)
        ):
            self.publish_weights()
        return engine.get_global_grad_norm() if norm is None else norm

    @property
    def dropped_update(self) -> bool:
        """Return whether ZeRO 1-3 skipped the last update; at stage 0 only the gate knows."""
        return self.zero_stage > 0 and self._zero.overflow

    def _forget_offloaded_gradients(self) -> None:
        """Clear the gradient buffers after a skipped update. DeepSpeed (0.19.8) does so itself, except where the
        optimizer is offloaded and gradients are summed in fp32: all later steps would add to values that are not
        finite."""
        if getattr(self._zero, "cpu_offload", False):
            for sums in (self._zero.averaged_gradients, self._zero.all_grad_tensors):
                for group in sums:
                    sums[group] = None

    def set_learning_rate(self, lr: float, of_kinds: Mapping[str, float] = MappingProxyType({})) -> None:
        """Write the learning rate of this step into every parameter group, times the group's own `lr_scale`.

        `of_kinds` has that of groups whose `lr_kind` it names.
        """
        for group in self.optimizer.param_groups:
            scaled = of_kinds.get(group.get("lr_kind", ""), lr) * group.get("lr_scale", 1.0)
            if torch.is_tensor(group["lr"]):  # torchao's optimizer, which compiles its update
                group["lr"].fill_(scaled)
            else:
                group["lr"] = scaled

    def set_rates(self, rates: Rates) -> None:
        """Write this step's settings into every parameter group, and look ahead. Collective with EMA-Nesterov."""
        self.set_learning_rate(rates.lr, rates.lr_of_kinds)
        if rates.weight_decay_factor is not None:
            for group in self.optimizer.param_groups:
                group["weight_decay"] = rates.weight_decay_factor * group["base_weight_decay"]
        if rates.momentum is not None:
            self._set_momentum(rates.momentum)
        if self._lookahead and rates.lookahead is not None:
            self._tell_before_changes()
            if self._lookahead.begin(self.optimizer, self._stepped(), rates.lookahead):
                self.publish_weights()

    def _tell_before_changes(self) -> None:
        for action in self._before_changes:
            action()

    def _stepped(self) -> list[torch.Tensor]:
        return sum(partitions.flats_of_groups(self.zero_stage, self._zero), [])

    def _set_momentum(self, momentum: float) -> None:
        """Set the momentum; a group without one uses the first of its `betas`."""
        with_momentum = [group for group in self.optimizer.param_groups if "momentum" in group]
        for group in with_momentum:
            group["momentum"] = momentum
        for group in [] if with_momentum else self.optimizer.param_groups:
            group["betas"] = (momentum, *group["betas"][1:])

    def fragments(self) -> list[Fragment]:
        """Return every fragment of a parameter that this rank's optimizer updates."""
        return list(partitions.own_fragments(self.zero_stage, self.module, self._zero))

    def stepped_partitions(self) -> list[torch.Tensor]:
        """Return the flat partitions that this rank's optimizer steps, in the order of all ranks; none at stage 0."""
        return sum(partitions.flats_of_groups(self.zero_stage, self._zero), []) if self.zero_stage else []

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the full shape of every parameter by name; tied parameters appear once."""
        return {name: whole_shape(parameter) for name, parameter in self.module.named_parameters()}

    def replicated_parameters(self) -> dict[str, torch.Tensor]:
        """Return the parameters that every rank holds in full, as the model uses them; at stage 3 the small ones."""
        whole = self.module.named_parameters()
        if self.zero_stage == 3:
            return {name: p.data for name, p in whole if p.ds_persist and p.data.numel() == p.ds_numel}
        return {name: p.data for name, p in whole}

    def publish_weights(self) -> None:
        """Copy the optimizer's fp32 weights to the parameters that the model computes with. Collective."""
        partitions.publish_weights(self.zero_stage, self._zero)

    @torch.no_grad()
    def copy_weights(self, source: nn.Module) -> None:
        """Load the weights of a model that was built the same way as this engine's. Collective.

        The optimizer's fp32 copy gets them rounded to the type the model computes in, as at a start.
        """
        dtype, parameters = next(self.module.parameters()).dtype, dict(source.named_parameters())
        for fragment in self.fragments():
            own = partitions.own_part(parameters[fragment.name], fragment)
            fragment.view(fragment.flat).copy_(own.to(dtype))
        self.publish_weights()

    def materialise_state(self) -> None:
        """Make the optimizer create its state. The caller overwrites weights and state afterwards. Collective.

        It covers all tensors that the optimizer steps, also those with no fragment on this rank: a step may be
        collective.
        """
        state.materialise_state(self.optimizer, partitions.flats_of_groups(self.zero_stage, self._zero))
        if self._lookahead:
            self._lookahead.materialise(self.optimizer, self._stepped())

    def drop_average(self) -> None:
        """Forget the mean of the weights, if there is one."""
        if self.averaged:
            self.averaged.clear()

    def materialise_average(self) -> None:
        """Create the mean of the weights, which the caller overwrites."""
        assert self.averaged is not None
        self.averaged.materialise(self._stepped())

    def loss_scaler_state(self) -> dict[str, float]:
        """Return the state of the loss scaler (fp16); empty if none is in use."""
        scaler = getattr(self._zero, "loss_scaler", None)
        numbers = vars(scaler) if scaler is not None else {}
        return {name: value for name, value in numbers.items() if isinstance(value, (int, float))}

    def restore_loss_scaler(self, saved: dict[str, float]) -> None:
        """Restore `loss_scaler_state`."""
        scaler = getattr(self._zero, "loss_scaler", None)
        for name, value in saved.items():
            if hasattr(scaler, name):
                setattr(scaler, name, value)

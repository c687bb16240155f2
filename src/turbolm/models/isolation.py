"""Prove on the model that is about to train that no document and no later token moves the logits of another."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from turbolm.engine.engine import Engine
from turbolm.errors import UserError
from turbolm.models.attention import model_inputs
from turbolm.models.initialise import residual_outputs
from turbolm.models.sequence_parallel import sequence_group
from turbolm.models.settings import ropes_by_length

# Relative to the largest logit. Every kernel that isolates gave exactly 0 in fp32; mixtures of experts, whose products
# have other sizes when other tokens change, gave up to 7e-7. The smallest leak seen at initial weights was 4e-3 (ALiBi
# in Bloom), the usual one above 1e-1. Where attention hardly counts, as in a small Marian, the limit is lower: a
# twentieth of how far a document's own tokens move its logits.
_TOLERANCE = {"fp32": 1e-5, "bf16": 1e-3, "fp16": 1e-3}
_ALONE_TOLERANCE = {"fp32": 1e-3, "bf16": 0.2, "fp16": 0.2}  # see `Probe.differ_alone`; other positions move it by 1
# Relative to the norm of a token's logits: in fp32 of the token that differs most, where all types that can be shared
# gave up to 6e-7; else the mean over tokens, since rounding may send one to another expert.
_SHARED_TOLERANCE = {"fp32": 1e-5, "bf16": 0.05, "fp16": 0.05}
_SEQUENCE_TOKENS = 32
_MASKED = 1e9  # logits beyond it, either way, are those of tokens that the model rules out
# Settings that make a type that reads both ways read from left to right.
_CAUSAL_SETTINGS = {"is_decoder": True, "causal": True, "attn_type": "uni", "use_bidirectional_attention": False}


class Probe:
    """Forward passes of one small micro-batch, with changes that must not matter.

    It has two sequences (or one, with `num_sequences`) of at most 32 tokens; with `packed`, each holds two documents.
    The document that must not change is the last one of the last sequence: kernels that join sequences put it behind
    all others. The model runs as it trains and draws the same random numbers in every pass; the caller's random state
    is restored. A compiled model runs uncompiled: its graphs do the same, and compiling one for these sequences would
    take longer than all the rest. Every rank must make the same calls, because under ZeRO-3 a forward pass gathers
    weights.
    """

    def __init__(
        self,
        model: PreTrainedModel | Engine,
        *,
        vocab_size: int,
        seq_len: int,
        attention: str,
        packed: bool = True,
        num_sequences: int = 2,
    ) -> None:
        self.model, self.attention, self.device, self.vocab_size = model, attention, model.device, vocab_size
        group = sequence_group()
        tokens = _SEQUENCE_TOKENS if group is None else -(-_SEQUENCE_TOKENS // group.size) * group.size
        self.seq_len, self.num_tokens, self.sequence = seq_len, min(seq_len, tokens), num_sequences - 1
        self.first = self.num_tokens // 3 if packed else 0  # where the document that must not change begins
        self.middle = (self.first + self.num_tokens) // 2
        self.tokens = np.random.default_rng(0).integers(0, vocab_size, (num_sequences, self.num_tokens))
        sequence = np.concatenate([np.arange(self.first), np.arange(self.num_tokens - self.first)])
        self.positions = np.tile(sequence, (num_sequences, 1))
        self.logits = self._run(self.tokens, self.positions)
        usable = self.logits[self.logits.abs() < _MASKED]
        self.scale = float(usable.abs().max()) if usable.numel() else 0.0

    def _run(self, tokens: np.ndarray, positions: np.ndarray) -> torch.Tensor:
        """Return the logits in fp32, [sequences, tokens, vocabulary]."""
        batch, group = {"input_ids": tokens, "position_ids": positions}, sequence_group()
        if group is None:
            return self._forward(model_inputs(batch, self.attention, self.device)).reshape(*tokens.shape, -1)
        inputs = model_inputs(group.share(batch), self.attention, self.device)
        return group.gather_logits(self._forward(inputs))

    @torch.no_grad()
    def _forward(self, inputs: dict[str, Any]) -> torch.Tensor:
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.compiler.set_stance("force_eager"):
            torch.manual_seed(0)
            logits: torch.Tensor = self.model(**inputs).logits
        return logits.float()

    def move_by_neighbors(self) -> float:
        """Return how far the document's logits move when all other documents change; NaN if they become NaN."""
        tokens = self.tokens.copy()
        self._change(tokens[self.sequence, : self.first])
        self._change(tokens[: self.sequence])
        return self._moved(self._run(tokens, self.positions), slice(self.first, None))

    def move_by_lengths(self) -> float:
        """Return the same when the other documents are `seq_len` tokens long, as their last positions say."""
        positions = self.positions.copy()
        positions[: self.sequence, -1] = self.seq_len - 1
        if self.first:
            positions[self.sequence, self.first - 1] = self.seq_len - 1
        return self._moved(self._run(self.tokens, positions), slice(self.first, None))

    def move_by_tokens(self) -> tuple[float, float]:
        """Return how far the document's logits before its middle tokens, and after them, move when those change."""
        last = (self.middle + self.num_tokens) // 2
        tokens = self.tokens.copy()
        self._change(tokens[self.sequence, self.middle : last])
        logits = self._run(tokens, self.positions)
        return self._moved(logits, slice(self.first, self.middle)), self._moved(logits, slice(last, None))

    def differ_alone(self) -> float:
        """Return how far the document's logits, with padding after it, are from those it has alone, without positions.

        That is how Transformers runs it. Runs without dropout, whose random numbers follow the shape. The result is the
        median over tokens, relative to the norm of the logits: kernels round differently alone, and in half precision
        that may send a token to another expert.
        """
        first, last, end = self.first, self.num_tokens - self.num_tokens // 4, self.num_tokens
        tokens, positions = self.tokens.copy(), self.positions.copy()
        tokens[self.sequence, last:] = 0
        positions[self.sequence] = np.concatenate([np.arange(first), np.arange(last - first), np.arange(end - last)])
        part = slice(self.sequence, None), slice(first, last)
        batch = {"input_ids": tokens[part], "position_ids": positions[part]}
        alone = model_inputs(batch, self.attention, self.device)
        del alone["position_ids"]
        with self._evaluating():
            expected = self._forward(alone)[0]
            difference = self._run(tokens, positions)[self.sequence, first:last] - expected
        return float(_relative(difference, expected).median())

    def differ_shared(self, precision: str) -> float:
        """Return how far logits of ranks that share sequences are from those of a rank that has them whole.

        Runs without dropout. The result is relative, see `_SHARED_TOLERANCE`.
        """
        batch = {"input_ids": self.tokens, "position_ids": self.positions}
        with self._evaluating():
            whole = self._forward(model_inputs(batch, self.attention, self.device))
            apart = _relative(self._run(self.tokens, self.positions) - whole, whole)
        return float(apart.max() if precision == "fp32" else apart.mean())

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        was_training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            if was_training:
                self.model.train()

    def _change(self, tokens: np.ndarray) -> None:
        """Replace every token by another, in place."""
        tokens += 1 + np.random.default_rng(1).integers(0, self.vocab_size - 1, tokens.shape)
        tokens %= self.vocab_size

    def _moved(self, logits: torch.Tensor, where: slice) -> float:
        expected = self.logits[self.sequence, where]
        return float((logits[self.sequence, where] - expected).masked_fill(expected.abs() >= _MASKED, 0.0).abs().max())


def _relative(difference: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Return the norm of each token's difference over that of its logits, but for those that the model rules out."""
    is_masked = expected.abs() >= _MASKED
    moved, size = (each.masked_fill(is_masked, 0.0).norm(dim=-1) for each in (difference, expected))
    return moved / size.clamp(min=1e-12)  # a model's own padding token may have logits of 0


def check_isolation(
    model: PreTrainedModel | Engine,
    *,
    vocab_size: int,
    seq_len: int,
    attention: str,
    precision: str,
    packed: bool = True,
    num_sequences: int = 2,
    config: PreTrainedConfig | None = None,
) -> float:
    """Refuse to train a model whose logits are not finite, or depend on later tokens or on other documents.

    `model` is the model or its engine, `seq_len` the recipe's; `packed` says whether documents share a sequence,
    `num_sequences` how many a micro-batch has (at most two are probed); `config` is the model's, for the message. Runs
    six forward passes of at most 64 tokens, see `Probe`. Returns how far the logits moved when the other documents
    changed. Raises UserError.
    """
    kind = "this model" if config is None else config.model_type
    sizes = {"vocab_size": vocab_size, "seq_len": seq_len, "num_sequences": min(num_sequences, 2)}
    what = f"model: {kind} cannot be trained with {attention} attention"
    if sequence_group() is not None:
        what = f"execution.sequence_parallel: {kind} cannot be trained so with {attention} attention; set 1"
    with _told(what):
        probe = Probe(model, attention=attention, packed=packed, **sizes)
    if not torch.isfinite(probe.logits).all():
        raise UserError(
            f"model: the logits of {kind} are not finite (NaN or infinite) before the first step, in {precision}: a "
            "weight is not, or train.precision is too narrow for it (fp32 is the widest)"
        )
    if sequence_group() is not None and not (apart := probe.differ_shared(precision)) <= _SHARED_TOLERANCE[precision]:
        raise UserError(
            f"execution.sequence_parallel: {kind} does not compute for slices of a sequence what it does for the whole "
            f"(logits differ by {apart:.2g}): it mixes tokens outside attention; set sequence_parallel: 1"
        )
    before, after = probe.move_by_tokens()
    if not after > 0:
        raise UserError(
            f"model: at these weights and in {precision} no token of {kind} moves the logits after it, so nothing can "
            "show whether documents are kept apart; set train.precision: fp32"
        )
    limit = min(_TOLERANCE[precision] * probe.scale, after / 20)
    if not before <= limit:  # NaN is not either
        raise UserError(
            f"model: {kind} sees later tokens (changing one moved the logits before it by {before:.2g}), so it would "
            f"be given what it has to predict; {_causal_cure(config)}"
        )
    has_neighbors = packed or num_sequences > 1
    moved = probe.move_by_neighbors() if has_neighbors else 0.0
    if not moved <= limit:
        raise UserError(_leak_message(moved, attention, packed))
    _check_alone(probe, kind, precision)
    moved_by_lengths = probe.move_by_lengths() if has_neighbors else 0.0
    if not moved_by_lengths <= limit:
        raise UserError(_length_message(moved_by_lengths, kind, packed, config))
    return moved


@contextmanager
def outputs_that_count(model: PreTrainedModel, init: str) -> Iterator[None]:
    """Within it, layers whose outputs begin at zero (`model.init: zero_outputs`) add a random product of their inputs.

    Attention would otherwise not reach the logits before the first step, and a leak would not show.
    """
    handles = []
    matrices: dict[tuple[Any, ...], torch.Tensor] = {}  # those of a large model take seconds to draw

    def add(_: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        value, sizes = inputs[0], (inputs[0].shape[-1], output.shape[-1])
        key = (*sizes, value.dtype, value.device)
        if key not in matrices:
            drawn = torch.randn(sizes, generator=torch.Generator().manual_seed(0)) / sizes[0] ** 0.5
            matrices[key] = drawn.to(value)
        return output + value @ matrices[key]

    if init == "zero_outputs":
        handles = [module.register_forward_hook(add) for module in residual_outputs(model, init)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check_alone(probe: Probe, kind: str, precision: str) -> None:
    """Raise UserError where Transformers' own forward pass of a document is not what is trained."""
    with _told(f"model: {kind} cannot run a document without positions"):
        difference = probe.differ_alone()
    if not difference <= _ALONE_TOLERANCE[precision]:
        raise UserError(
            f"model: {kind} does not compute for a document in a sequence what it does for it alone (logits differ by "
            f"{difference:.0%}): it counts positions from elsewhere, or reads the padding; choose another model type"
        )


def _leak_message(leak: float, attention: str, packed: bool) -> str:
    if packed:
        return (
            f"data.packing: with {attention} attention this model lets packed documents see each other (changing one "
            f"moved its neighbour's logits by {leak:.2g}); set `data.packing: single` or another execution.attention"
        )
    return (
        f"execution.micro_batch: with {attention} attention the sequences of a micro-batch see each other in this "
        f"model (changing one moved the other's logits by {leak:.2g}); set execution.attention: sdpa, or else "
        "execution.micro_batch to data.seq_len, one sequence"
    )


def _length_message(moved: float, kind: str, packed: bool, config: PreTrainedConfig | None) -> str:
    cure = "`data.packing: single` with execution.micro_batch: data.seq_len, one sequence"
    if not packed:
        cure = "execution.micro_batch to data.seq_len, one sequence"
    if config is None or ropes_by_length(config) or ropes_by_length(config.get_text_config()):
        cure = f"model.rope_factors: short (or long), which fixes its rotary factors, or {cure}"
    return (
        f"data.packing: in {kind} a document's logits follow the length of the others in its micro-batch (one of "
        f"data.seq_len tokens moved its neighbour's by {moved:.2g}); set {cure}"
    )


def _causal_cure(config: PreTrainedConfig | None) -> str:
    for key, value in _CAUSAL_SETTINGS.items():
        if getattr(config, key, value) != value:
            return f"set `model.config.{key}: {str(value).lower()}`, which makes it read from left to right"
    return "choose a model type that reads from left to right"


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Turn an error into a UserError; it may be of any kind and come from anywhere in the code of a model type."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        traceback.print_exc()
        raise UserError(f"{what}: {type(error).__name__}: {error}".splitlines()[0]) from error

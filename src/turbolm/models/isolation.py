"""Prove, on the model that is about to be trained, that no document and no later token moves the logits of another."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig

from turbolm.errors import UserError
from turbolm.models.attention import model_inputs
from turbolm.models.settings import ropes_by_length

# Relative to the largest logit. Every kernel that isolates gave exactly 0 in fp32, but mixtures of experts, whose
# products have other sizes when other tokens change, up to 7e-7. The smallest leak seen at initial weights was 4e-3
# (ALiBi in Bloom), the usual one above 1e-1. Where attention hardly counts, as in a small Marian, the limit is lower: a
# twentieth of how far a document's own tokens move its logits.
_TOLERANCE = {"fp32": 1e-5, "bf16": 1e-3, "fp16": 1e-3}
_ALONE_TOLERANCE = {"fp32": 1e-3, "bf16": 0.2, "fp16": 0.2}  # see `Probe.differ_alone`; other positions move it by 1
_ROW_TOKENS = 32
_MASKED = 1e9  # logits beyond it, either way, are those of tokens that the model rules out
# Settings that turn a type that reads both ways into one that reads from left to right.
_CAUSAL_SETTINGS = {"is_decoder": True, "causal": True, "attn_type": "uni", "use_bidirectional_attention": False}


class Probe:
    """Forward passes of one small micro-batch, with changes that must not matter.

    Two rows (or one, with `num_rows`) of at most 32 tokens; with `packed`, each holds two documents. What must not
    change is the last document of the last row, which kernels that join the rows lay behind all others. The model runs
    as it trains, and draws the same random numbers in every pass; the caller's random state stays as it was. A compiled
    model runs as it was before: its graphs do the same, and compiling one for these rows would take longer than all the
    rest. Every rank must make the same calls: under ZeRO-3 a forward pass gathers weights.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        *,
        vocab_size: int,
        seq_len: int,
        attention: str,
        device: torch.device,
        packed: bool = True,
        num_rows: int = 2,
    ) -> None:
        self.forward, self.attention, self.device, self.vocab_size = forward, attention, device, vocab_size
        self.seq_len, self.num_tokens, self.row = seq_len, min(seq_len, _ROW_TOKENS), num_rows - 1
        self.first = self.num_tokens // 3 if packed else 0  # where the document that must not change begins
        self.middle = (self.first + self.num_tokens) // 2
        self.tokens = np.random.default_rng(0).integers(0, vocab_size, (num_rows, self.num_tokens))
        row = np.concatenate([np.arange(self.first), np.arange(self.num_tokens - self.first)])
        self.positions = np.tile(row, (num_rows, 1))
        self.logits = self._run(self.tokens, self.positions)
        usable = self.logits[self.logits.abs() < _MASKED]
        self.scale = float(usable.abs().max()) if usable.numel() else 0.0

    def _run(self, tokens: np.ndarray, positions: np.ndarray) -> torch.Tensor:
        """Logits in fp32, [rows, tokens, vocabulary]."""
        inputs = model_inputs({"input_ids": tokens, "position_ids": positions}, self.attention, self.device)
        return self._forward(inputs).reshape(*tokens.shape, -1)

    @torch.no_grad()
    def _forward(self, inputs: dict[str, Any]) -> torch.Tensor:
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.compiler.set_stance("force_eager"):
            torch.manual_seed(0)
            logits: torch.Tensor = self.forward(**inputs).logits
        return logits.float()

    def is_finite(self) -> bool:
        """Whether every logit is a number."""
        return bool(torch.isfinite(self.logits).all())

    def move_by_neighbours(self) -> float:
        """How far the document's logits move when the tokens of every other document change; NaN if they become so."""
        tokens = self.tokens.copy()
        self._change(tokens[self.row, : self.first])
        self._change(tokens[: self.row])
        return self._moved(self._run(tokens, self.positions)[self.row, self.first :], self._of_document())

    def move_by_lengths(self) -> float:
        """The same when the other documents are `seq_len` tokens long: their last positions say so."""
        positions = self.positions.copy()
        ends = [(self.row, self.first)] if self.first else []
        for row, end in [*ends, *((row, self.num_tokens) for row in range(self.row))]:
            positions[row, end - 1] = self.seq_len - 1
        return self._moved(self._run(self.tokens, positions)[self.row, self.first :], self._of_document())

    def _of_document(self) -> torch.Tensor:
        return self.logits[self.row, self.first :]

    def move_by_tokens(self) -> tuple[float, float]:
        """How far the document's logits before its middle tokens, and after them, move when those change."""
        first, last = self.middle, (self.middle + self.num_tokens) // 2
        tokens = self.tokens.copy()
        self._change(tokens[self.row, first:last])
        logits, expected = self._run(tokens, self.positions)[self.row], self.logits[self.row]
        before, after = slice(self.first, first), slice(last, None)
        return self._moved(logits[before], expected[before]), self._moved(logits[after], expected[after])

    def differ_alone(self) -> float:
        """How far the document's logits, with padding after it, lie from those it has alone and without positions.

        That is how Transformers runs it. Without dropout, whose random numbers follow the shape. The median over its
        tokens, relative to the length of the vector of their logits: kernels round otherwise alone, and in half
        precision that may send a token to another expert.
        """
        first, last, end = self.first, self.num_tokens - self.num_tokens // 4, self.num_tokens
        tokens, positions = self.tokens.copy(), self.positions.copy()
        tokens[self.row, last:] = 0
        positions[self.row] = np.concatenate([np.arange(first), np.arange(last - first), np.arange(end - last)])
        batch = {"input_ids": tokens[self.row :, first:last], "position_ids": positions[self.row :, first:last]}
        alone = model_inputs(batch, self.attention, self.device)
        del alone["position_ids"]
        with _evaluating(self.forward):
            expected = self._forward(alone)[0]
            difference = self._run(tokens, positions)[self.row, first:last] - expected
        is_masked = expected.abs() >= _MASKED
        moved, size = (each.masked_fill(is_masked, 0.0).norm(dim=-1) for each in (difference, expected))
        return float((moved / size.clamp(min=1e-12)).median())  # a model's own padding token may have logits of 0

    def _change(self, tokens: np.ndarray) -> None:
        """Replace every token by another, in place."""
        tokens += 1 + np.random.default_rng(1).integers(0, self.vocab_size - 1, tokens.shape)
        tokens %= self.vocab_size

    def _moved(self, logits: torch.Tensor, expected: torch.Tensor) -> float:
        return float((logits - expected).masked_fill(expected.abs() >= _MASKED, 0.0).abs().max())


@contextmanager
def _evaluating(forward: Callable[..., Any]) -> Iterator[None]:
    """Evaluation mode, where `forward` is a module or an engine."""
    was_training = getattr(forward, "training", False)
    if was_training:
        forward.eval()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        if was_training:
            forward.train()  # type: ignore[attr-defined]


def measure_leak(forward: Callable[..., Any], **settings: Any) -> tuple[float, float]:
    """How far a document's logits move when its neighbours change, and the largest logit; `settings` as `Probe`."""
    probe = Probe(forward, **settings)
    return probe.move_by_neighbours(), probe.scale


def check_isolation(
    forward: Callable[..., Any],
    *,
    vocab_size: int,
    seq_len: int,
    attention: str,
    device: torch.device,
    precision: str,
    packed: bool = True,
    num_rows: int = 2,
    config: PreTrainedConfig | None = None,
) -> float:
    """Refuse to train a model whose logits are not finite, or follow later tokens or other documents.

    `seq_len` is the recipe's, `packed` whether documents share a row, `num_rows` how many rows a micro-batch has (two
    are probed at most), `config` the model's, for the message. Runs `forward` (the model or its engine) six times on
    at most 64 tokens; see `Probe`. Returns how far the logits moved when the other documents changed. Raises
    UserError.
    """
    kind = "this model" if config is None else config.model_type
    try:
        probe = Probe(
            forward,
            vocab_size=vocab_size,
            seq_len=seq_len,
            attention=attention,
            device=device,
            packed=packed,
            num_rows=min(num_rows, 2),
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of any kind: what a model type cannot do fails wherever its code comes to it
        traceback.print_exc()
        raise UserError(f"model: {kind} cannot be trained with {attention} attention: {_one_line(error)}") from error
    if not probe.is_finite():
        raise UserError(
            f"model: the logits of {kind} are not finite (NaN or infinite) before the first step, in {precision}: a "
            "weight is not, or train.precision is too narrow for it (fp32 is the widest)"
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
    neighbours = probe.move_by_neighbours() if packed or num_rows > 1 else 0.0
    if not neighbours <= limit:
        raise UserError(_leak_message(neighbours, attention, packed))
    _check_alone(probe, kind, precision)
    lengths = probe.move_by_lengths() if packed or num_rows > 1 else 0.0
    if not lengths <= limit:
        raise UserError(_length_message(lengths, kind, packed, config))
    return neighbours


def _check_alone(probe: Probe, kind: str, precision: str) -> None:
    """Raise UserError where Transformers' own forward pass of a document is not what is trained."""
    try:
        difference = probe.differ_alone()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise UserError(f"model: {kind} cannot run a document without positions: {_one_line(error)}") from error
    if not difference <= _ALONE_TOLERANCE[precision]:
        raise UserError(
            f"model: {kind} does not compute for a document in a row what it does for it alone (logits differ by "
            f"{difference:.0%}): it counts positions from elsewhere, or reads the padding; choose another model type"
        )


def _leak_message(leak: float, attention: str, packed: bool) -> str:
    if packed:
        return (
            f"data.packing: with {attention} attention this model lets packed documents see each other (changing one "
            f"moved its neighbour's logits by {leak:.2g}); set `data.packing: single` or another execution.attention"
        )
    return (
        f"execution.micro_batch: with {attention} attention the rows of a micro-batch see each other in this model "
        f"(changing one moved the other's logits by {leak:.2g}); set execution.attention: sdpa, or else "
        "execution.micro_batch to data.seq_len, one row"
    )


def _length_message(moved: float, kind: str, packed: bool, config: PreTrainedConfig | None) -> str:
    cures = ["`data.packing: single` with execution.micro_batch: data.seq_len, one row"]
    if not packed:
        cures = ["execution.micro_batch to data.seq_len, one row"]
    if config is None or any(ropes_by_length(part) for part in (config, config.get_text_config())):
        cures.insert(0, "model.rope_factors: short (or long), which fixes its rotary factors")
    return (
        f"data.packing: in {kind} a document's logits follow the length of the others in its micro-batch (one of "
        f"data.seq_len tokens moved its neighbour's by {moved:.2g}); set {', or '.join(cures)}"
    )


def _causal_cure(config: PreTrainedConfig | None) -> str:
    for key, value in _CAUSAL_SETTINGS.items():
        if hasattr(config, key) and getattr(config, key) != value:
            return f"set `model.config.{key}: {str(value).lower()}`, which makes it read from left to right"
    return "choose a model type that reads from left to right"


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]

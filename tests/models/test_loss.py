"""The loss that never holds its logits is the loss, and so are its gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.models.test_isolation import CONFIGS, SHAPE, VOCAB, make_model, packed_sequence
from turbolm.errors import UserError
from turbolm.models.attention import model_inputs
from turbolm.models.compile import apply_compile, compilations
from turbolm.models.loss import (
    attach_loss,
    choose_loss,
    chunked_linear_loss,
    chunked_token_losses,
    summed_loss,
    token_losses,
)
from turbolm.plan.batch import IGNORED_TARGET

CPU = torch.device("cpu")
NUM_ROWS, WIDTH = 50, 12
GRANITE = {"model_type": "granite", "num_key_value_heads": 2, "logits_scaling": 8.0, **SHAPE}
GEMMA = {"model_type": "gemma2", "num_key_value_heads": 2, "head_dim": 16, "final_logit_softcapping": 0.5, **SHAPE}
PHI = {"model_type": "phi", "num_key_value_heads": 4, **SHAPE}  # its head has a bias


def problem(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(0, VOCAB, (NUM_ROWS,), generator=generator)
    targets[::7] = IGNORED_TARGET
    targets[20:40] = IGNORED_TARGET  # a chunk without any target
    hidden, weight = (
        torch.randn(*shape, generator=generator).to(dtype) for shape in ((NUM_ROWS, WIDTH), (VOCAB, WIDTH))
    )
    bias = torch.randn(VOCAB, generator=generator).to(dtype)
    return {"hidden": hidden, "weight": weight, "bias": bias, "targets": targets}


def by_hand(hidden: Any, weight: Any, bias: Any, targets: Any, z_loss: float, softcap: float | None) -> tuple[Any, Any]:
    """In float64, row by row: -log p(target) + z log(sum of exp)^2."""
    logits = hidden.double() @ weight.double().T + (0 if bias is None else bias.double())
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    nll = objective = torch.zeros((), dtype=torch.float64)
    for row, target in zip(logits, targets.tolist(), strict=True):
        if target != IGNORED_TARGET:
            denominator = row.exp().sum()
            nll = nll - (row[target].exp() / denominator).log()
            objective = objective + z_loss * denominator.log() ** 2
    return objective + nll, nll


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("z_loss", [0.0, 0.3])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("chunk_tokens", [7, 10, 50])
def test_chunked_loss_and_gradients(chunk_tokens: int, has_bias: bool, z_loss: float, softcap: float | None) -> None:
    values = problem()
    gradients = []
    for function in (by_hand, chunked_linear_loss):
        leaves = [values[name].clone().requires_grad_() for name in ("hidden", "weight", "bias")]
        settings = {"z_loss": z_loss, "softcap": softcap}
        if function is chunked_linear_loss:
            settings["chunk_tokens"] = chunk_tokens
        bias = leaves[2] if has_bias else None
        objective, nll = function(leaves[0], leaves[1], bias, values["targets"], **settings)
        (objective * 0.5).backward()
        assert not (function is chunked_linear_loss and nll.requires_grad)
        gradients.append([objective.double(), nll.double(), *(leaf.grad for leaf in leaves[: 2 + has_bias])])
    for got, expected in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("z_loss", [0.0, 0.3])
def test_full_loss(z_loss: float) -> None:
    values = problem()
    logits = (values["hidden"] @ values["weight"].T).requires_grad_()
    expected = by_hand(values["hidden"], values["weight"], None, values["targets"], z_loss, None)
    objective, nll = summed_loss(logits, values["targets"], z_loss)
    torch.testing.assert_close((objective.double(), nll.double()), expected, rtol=1e-6, atol=0)
    assert objective.requires_grad and not nll.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_losses_of_single_targets_leave_the_sum_as_it_is(softcap: float | None, dtype: torch.dtype) -> None:
    """To the bit: a run's held-out loss does not depend on whether its parts are reported too."""
    values = problem(dtype)
    leaves = values["hidden"], values["weight"], values["bias"], values["targets"]
    settings = {"softcap": softcap, "chunk_tokens": 7}
    _, nll = chunked_linear_loss(*leaves, **settings)
    _, total, each = chunked_token_losses(*leaves, **settings)
    logits = torch.nn.functional.linear(*leaves[:3])
    _, full_total, full_each = token_losses(logits[None], values["targets"])
    assert torch.equal(total, nll) and torch.equal(full_total, summed_loss(logits, values["targets"])[1])
    exact = [value.double() for value in leaves[:3]]
    rows = zip(exact[0].split(1), values["targets"].split(1), strict=True)
    by_row = [by_hand(row, *exact[1:], target, 0, softcap)[1] for row, target in rows]
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 3e-2}
    torch.testing.assert_close(each.double(), torch.stack(by_row), **tolerance)
    if softcap is None:
        torch.testing.assert_close(full_each.double(), torch.stack(by_row), **tolerance)


def test_in_bf16_sums_are_made_in_fp32() -> None:
    values = problem(torch.bfloat16)
    leaves = [values[name].clone().requires_grad_() for name in ("hidden", "weight")]
    objective, _ = chunked_linear_loss(*leaves, None, values["targets"], chunk_tokens=7)
    objective.backward()
    exact = [values[name].double().requires_grad_() for name in ("hidden", "weight")]
    expected, _ = by_hand(*exact, None, values["targets"], 0.0, None)
    expected.backward()
    assert objective.dtype == torch.float32
    torch.testing.assert_close(objective.double(), expected, rtol=3e-3, atol=0)
    for leaf, reference in zip(leaves, exact, strict=True):
        torch.testing.assert_close(leaf.grad.double(), reference.grad, rtol=0.02, atol=0.1)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    num_elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), kwargs: Any = None) -> Any:
        result = function(*arguments, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.num_elements = max(self.num_elements, result.numel())
        return result


@pytest.mark.parametrize(("kind", "holds_logits"), [("full", True), ("chunked", False)])
def test_logits_are_never_held(kind: str, holds_logits: bool) -> None:
    num_rows, vocab_size = 1024, 20_000
    hidden, weight = torch.randn(num_rows, 4, requires_grad=True), torch.randn(vocab_size, 4, requires_grad=True)
    targets = torch.zeros(num_rows, dtype=torch.int64)
    with LargestTensor() as largest:
        if kind == "full":
            objective, _ = summed_loss(hidden @ weight.T, targets)
        else:
            objective, _ = chunked_linear_loss(hidden, weight, None, targets)
        objective.backward()
    assert (largest.num_elements >= num_rows * vocab_size) == holds_logits
    if not holds_logits:
        assert largest.num_elements <= num_rows * vocab_size / 2


def loss_of(model: Any, targets: torch.Tensor) -> list[float]:
    """Loss, and gradient norm, of a model whose forward pass takes targets."""
    model.zero_grad()
    objective, nll = model(**model_inputs(packed_sequence(1), "sdpa", CPU), targets=targets)
    objective.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    return [objective.item(), nll.item(), norm.item()]


@pytest.mark.parametrize("config", [*CONFIGS.values(), GEMMA, PHI], ids=lambda config: config["model_type"])
def test_a_model_with_its_loss_inside(config: dict[str, Any]) -> None:
    targets = torch.from_numpy(np.random.default_rng(0).integers(0, VOCAB, (1, 32)))
    inputs = model_inputs(packed_sequence(1), "sdpa", CPU)
    losses = []
    for kind in ("full", "chunked"):
        model = make_model(config, "eager" if config is GEMMA else "sdpa")
        logits = model(**inputs).logits
        assert choose_loss("auto", model, model, inputs, "bf16") == "chunked"
        few = 2**26 // model.config.vocab_size
        assert choose_loss("auto", model, model, inputs, "fp32", few) == "full"
        assert choose_loss("auto", model, model, inputs, "fp32", few + 1) == "chunked"
        assert choose_loss("auto", model, model, inputs, "bf16", few) == "chunked"
        attach_loss(model, kind, z_loss=0.1)
        assert torch.equal(model(**inputs).logits, logits), "without targets it is the model that it was"
        losses.append(loss_of(model, targets))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_what_cannot_be_chunked_is_refused_or_left_full() -> None:
    inputs = model_inputs(packed_sequence(1), "sdpa", CPU)
    granite, llama = make_model(GRANITE, "sdpa"), make_model(CONFIGS["llama"], "sdpa")
    assert choose_loss("auto", granite, granite, inputs, "bf16") == "full"
    with pytest.raises(
        UserError, match=r"chunked does not work here: granite changes the logits after its output head"
    ):
        choose_loss("chunked", granite, granite, inputs, "bf16")
    assert choose_loss("auto", llama, llama, inputs, "fp16") == "full"
    with pytest.raises(UserError, match=r"not with train\.precision fp16"):
        choose_loss("liger", llama, llama, inputs, "fp16")
    assert choose_loss("full", granite, granite, inputs, "fp16") == "full"


@pytest.mark.parametrize("z_loss", [0.0, pytest.param(0.1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["chunked", pytest.param("full", marks=pytest.mark.slow)])
def test_the_loss_is_part_of_the_compiled_graph(kind: str, z_loss: float) -> None:
    targets = torch.from_numpy(np.random.default_rng(0).integers(0, VOCAB, (1, 32)))
    plain, compiled = make_model(CONFIGS["llama"], "sdpa"), make_model(CONFIGS["llama"], "sdpa")
    attach_loss(plain, kind, z_loss=z_loss)
    attach_loss(compiled, kind, z_loss=z_loss)
    apply_compile(compiled, "model", backend="aot_eager")
    assert loss_of(compiled, targets) == pytest.approx(loss_of(plain, targets), rel=1e-5)
    assert compilations.count == 1

"""The router loss is Transformers' own, of each packed sequence by itself, and the load of the experts is counted."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.models.small import small_config
from turbolm.errors import UserError
from turbolm.models.attention import model_inputs
from turbolm.models.balance import find_balance
from turbolm.models.build import check_all_trained
from turbolm.models.compile import apply_compile, compilations
from turbolm.models.loss import attach_loss
from turbolm.models.recompute import apply_activation_checkpointing
from turbolm.models.router import attach_router_loss, find_routers, freeze_balancing_biases
from turbolm.models.size import measure_model
from turbolm.plan.batch import IGNORED_TARGET
from turbolm.plan.flops import training_flops_per_token

CPU = torch.device("cpu")
VOCAB, SEQ_LEN, LAYERS, EXPERTS = 64, 12, 2, 4
SHAPE = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4} | {
    "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": None,
}  # fmt: skip
NARROW = {"moe_intermediate_size": 16, "num_experts": EXPERTS, "num_experts_per_tok": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": EXPERTS, "router_aux_loss_coef": 0.3},
    "qwen3_moe": {**NARROW, "head_dim": 8, "router_aux_loss_coef": 0.2},
    "olmoe": {"num_experts": EXPERTS, "num_experts_per_tok": 2},
    "doge": {"is_moe": True, "num_experts": 16, "num_experts_per_tok": 2},  # the one with a function of its own
    "jetmoe": {"num_local_experts": EXPERTS, "kv_channels": 8, "num_experts_per_tok": 2},  # of attention as well
    "granitemoe": {"num_local_experts": EXPERTS},
    "gpt_oss": {"num_local_experts": EXPERTS, "head_dim": 8},
    "phimoe": {"num_local_experts": EXPERTS},
    "qwen2_moe": {**NARROW, "shared_expert_intermediate_size": 16},
    "ernie4_5_moe": {"moe_num_experts": EXPERTS, "moe_k": 2, "moe_intermediate_size": 16, "moe_layer_start_index": 1},
    "minimax_m2": {"num_local_experts": EXPERTS, "num_experts_per_tok": 2, "head_dim": 8},
    "flex_olmo": {"num_experts": EXPERTS, "num_experts_per_tok": 2},
}
UNBALANCED: dict[str, dict[str, Any]] = {
    "glm4_moe": {**NARROW, "n_routed_experts": EXPERTS, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    "llama4_text": {"num_local_experts": EXPERTS, "head_dim": 8},  # its configuration has an unused coefficient
}


def make(model_type: str, attention: str = "eager", **changes: Any) -> PreTrainedModel:
    """A small mixture with weights large enough that routers prefer some experts."""
    own = {**CONFIGS, **UNBALANCED}.get(model_type, {})
    config = AutoConfig.for_model(model_type, **{**SHAPE, **own, **changes})
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5.0 if parameter.dim() > 1 else 1.0)
    return model.train()


def micro_batch(lengths: list[list[int]], seed: int = 0) -> dict[str, np.ndarray]:
    """A sequence for each list, of documents with these lengths; what they leave is padding."""
    rng = np.random.default_rng(seed)
    shape = (len(lengths), SEQ_LEN)
    tokens, positions = rng.integers(1, VOCAB, shape), np.zeros(shape, np.int64)
    targets = rng.integers(1, VOCAB, shape)
    for index, documents in enumerate(lengths):
        ends = np.cumsum([*documents, SEQ_LEN - sum(documents)])
        positions[index] = np.concatenate(
            [np.arange(end - begin) for begin, end in zip([0, *ends], ends, strict=False)]
        )
        targets[index, sum(documents) :] = IGNORED_TARGET
    return {"input_ids": tokens, "position_ids": positions, "targets": targets}


def run(model: PreTrainedModel, batch: dict[str, np.ndarray], attention: str = "sdpa") -> tuple[Any, ...]:
    """Objective, likelihood, router loss and load of a model whose loss is attached; gradients of the objective."""
    model.zero_grad()
    result: tuple[Any, ...] = model(**model_inputs(batch, attention, CPU), targets=torch.from_numpy(batch["targets"]))
    result[0].backward()
    return result


def attached(model: PreTrainedModel, setting: float | str = "config", kind: str = "chunked") -> PreTrainedModel:
    routers = find_routers(model, setting)
    assert routers is not None
    attach_loss(model, kind)
    attach_router_loss(model, routers)
    return model


@pytest.mark.parametrize(
    "model_type", [*list(CONFIGS)[:5], *(pytest.param(name, marks=pytest.mark.slow) for name in list(CONFIGS)[5:])]
)
def test_of_one_sequence_it_is_transformers_own(model_type: str) -> None:
    """Its loss beside labels with and without router loss tells the coefficient; `aux_loss` is the loss."""
    model, batch = make(model_type), micro_batch([[SEQ_LEN]])
    inputs = model_inputs(batch, "eager", CPU)
    labels = torch.cat([torch.zeros(1, 1, dtype=torch.int64), torch.from_numpy(batch["targets"])[:, :-1]], dim=1)
    with torch.no_grad():
        theirs = [model(**inputs, labels=labels, output_router_logits=on) for on in (True, False)]
    result = run(attached(model), batch, "eager")
    assert result[2].item() / SEQ_LEN == pytest.approx(theirs[0].aux_loss.item(), rel=1e-5)
    added = (result[0] - result[1]).item() / SEQ_LEN
    assert added == pytest.approx((theirs[0].loss - theirs[1].loss).item(), rel=1e-4, abs=1e-6)
    assert added > 1e-4


@pytest.mark.parametrize("kind", ["full", "chunked"])
def test_it_is_a_sum_over_sequences_however_they_are_batched(kind: str) -> None:
    lengths = [[5, 7], [12], [3], [8, 2], [], [4, 4]]
    model = attached(make("mixtral", "sdpa"), kind=kind)
    whole = run(model, micro_batch(lengths))
    gradient = model.model.layers[0].mlp.gate.weight.grad.clone()
    batch, parts, gradients = micro_batch(lengths), [], []
    for chosen in ([0, 1, 2], [3], [4, 5]):
        parts.append(run(model, {name: value[chosen] for name, value in batch.items()}))
        gradients.append(model.model.layers[0].mlp.gate.weight.grad.clone())
    for whole_sum, *part_sums in zip(whole, *parts, strict=True):
        torch.testing.assert_close(sum(part_sums), whole_sum, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sum(gradients), gradient, rtol=1e-4, atol=1e-5)
    with torch.no_grad():  # and not Transformers' loss of the batch, which is another one
        mask = torch.from_numpy(batch["targets"] != IGNORED_TARGET)
        logits = model.model(**model_inputs(batch, "sdpa", CPU), output_router_logits=True).router_logits
        from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

        one = load_balancing_loss_func(logits, EXPERTS, 2, mask.long())
    assert abs(one.item() / (whole[2].item() / mask.sum().item()) - 1) > 0.01


def test_rows_laid_end_to_end_are_split_again() -> None:
    """Kernels that read cumulative lengths get one long sequence."""
    batch, model = micro_batch([[5, 7], [8, 2], [12]]), attached(make("olmoe", "sdpa"))
    separate = run(model, batch)
    model.zero_grad()
    flat = {name: value.reshape(1, -1) for name, value in batch.items() if name != "targets"}
    end_to_end = model(**model_inputs(flat, "sdpa", CPU), targets=torch.from_numpy(batch["targets"]))
    torch.testing.assert_close(end_to_end, separate, rtol=1e-5, atol=1e-5)


def test_the_load_is_the_choices_of_tokens_that_are_not_padding() -> None:
    batch = micro_batch([[5, 2], [8, 3]])
    model = make("qwen3_moe", "sdpa")
    with torch.no_grad():
        logits = model.model(**model_inputs(batch, "sdpa", CPU), output_router_logits=True).router_logits
    is_token = batch["targets"].flatten() != IGNORED_TARGET
    expected = np.zeros((LAYERS, EXPERTS))
    for layer, scores in enumerate(logits):
        for row in scores.numpy()[is_token]:
            expected[layer, np.argsort(row)[-2:]] += 1
    for setting in ("config", "off"):
        *_, load = run(attached(make("qwen3_moe", "sdpa"), setting), batch)
        np.testing.assert_array_equal(load.numpy(), expected)
    assert expected.max() > 1.5 * expected.min(), "a load that is even would prove little"


def test_off_a_number_and_evaluation() -> None:
    batch = micro_batch([[5, 7], [12]])
    model = make("mixtral", "sdpa", output_router_logits=True)
    off = run(attached(model, "off"), batch)
    other = attached(make("mixtral", "sdpa"), 0.7)
    number = run(other, batch)
    assert off[0] == off[1] and number[1] == off[1] and number[2] == off[2], "reported, but not trained"
    assert (number[0] - number[1]).item() == pytest.approx(0.7 * number[2].item(), rel=1e-5)
    gates = [one.model.layers[0].mlp.gate.weight.grad for one in (model, other)]
    assert gates[0].norm() > 0 and not torch.allclose(*gates, rtol=0.01)
    with torch.no_grad():
        objective, nll = model(**model_inputs(batch, "sdpa", CPU), targets=torch.from_numpy(batch["targets"]))
    assert objective == nll == off[1], "an evaluation is the likelihood alone"


COMPILED = [("layers", "full")] + [
    pytest.param(mode, checkpointing, marks=pytest.mark.slow)
    for mode, checkpointing in (("layers", "none"), ("layers", "selective"), ("model", "full"))
]


@pytest.mark.parametrize("checkpointing", ["full", "selective", 2])
def test_recomputed(checkpointing: str | int) -> None:
    batch, plain, other = micro_batch([[5, 7], [8]]), make("mixtral", "sdpa"), make("mixtral", "sdpa")
    apply_activation_checkpointing(other, checkpointing)
    compare(attached(other), attached(plain), batch)
    assert all(getattr(module, "_turbolm_recorded", None) is None for module in other.modules()), "nothing is kept"


@pytest.mark.parametrize(("mode", "checkpointing"), COMPILED)
def test_compiled(mode: str, checkpointing: str) -> None:
    plain, other = attached(make("mixtral", "sdpa")), make("mixtral", "sdpa")
    apply_activation_checkpointing(other, checkpointing)
    apply_compile(attached(other), mode, backend="eager" if mode == "layers" else "aot_eager")
    for seed in (0, 1):
        compare(other, plain, micro_batch([[5, 7], [8]], seed))
    is_older = transformers.__version__ < "5.23"  # it makes a second graph, as often as the first
    assert compilations.count == 1 or (is_older and compilations.count == 2)


def compare(model: PreTrainedModel, plain: PreTrainedModel, batch: dict[str, np.ndarray]) -> None:
    got, expected = run(model, batch), run(plain, batch)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4)


def test_grouped_products_equal_an_expert_at_a_time() -> None:
    batch, grouped, eager = micro_batch([[5, 7], [8]]), make("mixtral", "sdpa"), make("mixtral", "sdpa")
    assert grouped.config._experts_implementation == "grouped_mm", "what Transformers takes by itself"
    eager.set_experts_implementation("eager")
    compare(attached(grouped), attached(eager), batch)


@pytest.mark.parametrize("model_type", UNBALANCED)
def test_a_type_without_a_router_loss_says_so(model_type: str) -> None:
    model = make(model_type, "sdpa")
    routers = find_routers(model, "config")
    assert routers is not None and routers.coefficient == 0
    assert "this type is not balanced" in routers.message
    assert ("e_score_correction_bias stays as it is" in routers.message) == (model_type == "glm4_moe")
    with pytest.raises(UserError, match=r"router_aux_loss: 0.1 cannot act: Transformers has no router loss for"):
        find_routers(model, 0.1)
    bias = [buffer.clone() for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]
    result = run(attached(model, kind="full"), micro_batch([[5, 7], [8]]))
    assert result[0] == result[1] and result[2] is None
    assert (result[3] is not None) == (model_type == "glm4_moe"), "llama4 runs all experts on all tokens"
    now = [buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]
    assert len(now) == (model_type == "glm4_moe") and all(map(torch.equal, now, bias))


def test_a_dense_model_has_no_routers() -> None:
    llama = make("llama")
    assert find_routers(llama, "config") is find_routers(llama, "off") is None
    with pytest.raises(UserError, match="llama has no experts"):
        find_routers(llama, 0.01)


@pytest.mark.parametrize("is_loaded", [False, True])
def test_a_balancing_bias_that_is_a_parameter_becomes_a_buffer(is_loaded: bool, tmp_path: Path) -> None:
    """Transformers' `from_pretrained` makes it look like one that is trained."""
    before = make("ernie4_5_moe", "sdpa")
    (name, bias), *others = [(name, p) for name, p in before.named_parameters() if not p.requires_grad]
    bias.data.copy_(torch.tensor([[3.0, 0.1, -3.0, 0.0]]))
    assert not others
    with pytest.raises(UserError, match="parameters that are not trained"):
        check_all_trained(before)
    before.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).train() if is_loaded else copy.deepcopy(before)
    freeze_balancing_biases(model)
    check_all_trained(model)
    assert name not in dict(model.named_parameters()) and name in dict(model.named_buffers())
    assert torch.equal(model.state_dict()[name], bias.data)
    batch = micro_batch([[5, 7], [8]])
    result = run(attached(model), batch)
    torch.testing.assert_close(result, run(attached(before), batch))
    assert result[3][0, 0] > 2 * result[3][0, 2], "it still chooses"


# bailing_hybrid, kimi_linear and kolibri1 passed too; without kernels for linear attention they take minutes.
BY_BIAS = """afmoe axk1 axk2 beam deepseek_v3 deepseek_v32 deepseek_v4 dots1 ernie4_5_moe exaone_moe
glm4_moe glm4_moe_lite glm_moe_dsa hy_v3 hy_v4 laguna lfm2_moe mimo_v2_flash minimax_m2 nemotron_h
solar_open""".split()
QUICK = ("glm4_moe", "ernie4_5_moe")


@pytest.mark.parametrize(
    "model_type", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in BY_BIAS]
)
def test_the_bias_that_moves_is_that_of_the_experts_that_are_counted(model_type: str) -> None:
    """Whichever expert has a low bias, it is the one that gets no token."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small_config(model_type), attn_implementation="eager").train()
    freeze_balancing_biases(model)
    routers = find_routers(model, "off", 0.01)
    assert routers is not None and routers.balance is not None and "moves by 0.01 a step" in routers.message
    attach_loss(model, "full")
    attach_router_loss(model, routers)
    batch = micro_batch([[SEQ_LEN]])
    for row, bias in routers.balance.biases:
        assert bias.dtype == torch.float32
        for expert in range(bias.numel()):
            bias.view(-1)[expert] -= 1e6
            load = run(model, batch, "eager")[3][row]
            bias.view(-1)[expert] += 1e6
            assert load[expert] == 0 < load.nansum(), (row, expert)


def test_a_bias_that_cannot_move_is_refused() -> None:
    for model_type in ("mixtral", "llama"):
        with pytest.raises(UserError, match=rf"router_bias_update: 0.01 cannot act: {model_type} does not balance"):
            find_routers(make(model_type), "off", 0.01)
    for model_type in ("longcat_flash", "zaya"):  # some choices are of no expert
        model = AutoModelForCausalLM.from_config(small_config(model_type))
        with pytest.raises(UserError, match=f"cannot act: {model_type} does not count the tokens"):
            find_routers(model, "off", 0.01)
    with pytest.raises(UserError, match=r"does not count the tokens of the 4 experts that model\.layers"):
        find_balance(make("glm4_moe"), "glm4_moe", [], 0.01)


def test_weights_a_token_does_not_use() -> None:
    def idle(model_type: str, **changes: Any) -> int:
        return measure_model(make(model_type, **changes)).idle

    # Two layers of 4 experts with 3 matrices of 32 x 16 each, two experts a token: half of them idle.
    assert idle("qwen3_moe") == 2 * 2 * 3 * 32 * 16
    assert idle("mixtral") == idle("olmoe") == idle("granitemoe") == 2 * 2 * 3 * 32 * 48
    assert idle("glm4_moe") == 1 * 2 * 3 * 32 * 16, "its first layer is dense"
    assert idle("llama4_text", num_experts_per_tok=1) == 2 * 3 * 3 * 32 * 48
    assert idle("llama") == 0


@pytest.mark.parametrize("tied", [False, True])
def test_flops_are_those_that_torch_counts(tied: bool) -> None:
    """Eager attention computes the whole square; of grouped products torch counts nothing."""
    model = make("qwen3_moe", tie_word_embeddings=tied)
    model.set_experts_implementation("eager")
    tokens = torch.randint(0, VOCAB, (2, SEQ_LEN))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    size = measure_model(model)
    norms = sum(p.numel() for p in model.parameters() if p.dim() < 2)
    expected = training_flops_per_token(replace(size, matmul=size.matmul - norms), lambda *_: SEQ_LEN)
    assert counter.get_total_flops() == expected * tokens.numel()

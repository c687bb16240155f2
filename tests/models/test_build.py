"""Models are what the recipe says: no silent key, no silent dropout, the same weights at every start."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig

from turbolm.errors import UserError
from turbolm.models.build import build_config, build_model, check_all_trained
from turbolm.models.recompute import apply_activation_checkpointing
from turbolm.recipe.schema import Model

LLAMA = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2
}  # fmt: skip


def complete(model: Model, **changes: Any) -> Any:
    return build_config(model, **{"seq_len": 16, "vocab_size": 100, "bos_token_id": 1, "eos_token_id": 2, **changes})


def test_dropout_is_off_unless_the_recipe_sets_it() -> None:
    gpt2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2}
    names = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
    assert [getattr(complete(Model(config=gpt2)), name) for name in names] == [0, 0, 0]
    assert [getattr(complete(Model(config=gpt2, dropout=0.2)), name) for name in names] == [0.2, 0.2, 0.2]
    mixed = complete(Model(config={**gpt2, "attn_pdrop": 0.3}))
    assert [getattr(mixed, name) for name in names] == [0, 0, 0.3]


def test_the_tokenizer_completes_the_configuration() -> None:
    config = complete(Model(config=LLAMA))
    assert (config.vocab_size, config.bos_token_id, config.eos_token_id) == (100, 1, 2)
    assert complete(Model(config={**LLAMA, "vocab_size": 128})).vocab_size == 128


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**LLAMA, "num_hidden_layer": 2}, "has no such setting; did you mean 'num_hidden_layers'"),
        ({**LLAMA, "vocab_size": 64}, "cannot hold the tokenizer's 100 tokens"),
        ({**LLAMA, "max_position_embeddings": 8}, "positions for 8 tokens"),
        ({**LLAMA, "model_type": "lama"}, "knows no model type 'lama'"),
        ({**LLAMA, "num_attention_heads": 5}, r"^model.config.num_attention_heads: llama cannot be built with 5: "),
    ],
)
def test_a_wrong_configuration_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        complete(Model(config=config))


def test_a_parameter_that_is_not_trained_is_refused() -> None:
    roformer = {
        "model_type": "roformer", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 2, "is_decoder": True,
    }  # fmt: skip
    models = [
        build_model(Model(config=c), complete(Model(config=c)), seed=0, attention="eager") for c in (LLAMA, roformer)
    ]
    check_all_trained(models[0])
    with pytest.raises(UserError, match=r"encoder.embed_positions.weight are parameters that are not trained"):
        check_all_trained(models[1])


def test_weights_depend_on_the_seed_alone() -> None:
    def weights(seed: int) -> torch.Tensor:
        model = build_model(Model(config=LLAMA), complete(Model(config=LLAMA)), seed=seed, attention="sdpa")
        return torch.cat([parameter.flatten() for parameter in model.parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_weights_are_distributed_as_transformers_draws_them(name: str) -> None:
    mapping = {
        "llama": {**LLAMA, "hidden_size": 128, "tie_word_embeddings": True},
        "gpt2": {"model_type": "gpt2", "n_embd": 128, "n_layer": 4, "n_head": 2},
    }[name]
    config = complete(Model(config=mapping), vocab_size=1000)
    ours = build_model(Model(config=mapping), config, seed=0, attention="sdpa")
    torch.manual_seed(7)
    theirs = dict(AutoModelForCausalLM.from_config(config).named_parameters())
    assert {parameter_name for parameter_name, _ in ours.named_parameters()} == set(theirs)
    for parameter_name, parameter in ours.named_parameters():
        expected = theirs[parameter_name]
        assert parameter.mean().item() == pytest.approx(expected.mean().item(), abs=2e-3), parameter_name
        assert parameter.std().item() == pytest.approx(expected.std().item(), rel=0.05), parameter_name


def test_pretrained_weights_are_read_from_a_folder(tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=100
    )
    original = AutoModelForCausalLM.from_config(config)
    original.save_pretrained(tmp_path)
    section = Model(pretrained=str(tmp_path))
    model = build_model(section, complete(section), seed=0, attention="sdpa")
    for name, value in original.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    with pytest.raises(UserError, match=r"has no config\.json"):
        complete(Model(pretrained=str(tmp_path / "missing")))


@pytest.mark.parametrize(("every", "recomputed"), [("none", 0), ("full", 4), (1, 4), (2, 2), (3, 2)])
def test_activation_checkpointing_recomputes_every_nth_layer(every: str | int, recomputed: int) -> None:
    model = build_model(Model(config=LLAMA), complete(Model(config=LLAMA)), seed=0, attention="sdpa").train()
    apply_activation_checkpointing(model, every)
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(count)
    tokens = torch.arange(8)[None]
    model(input_ids=tokens, use_cache=False).logits.sum().backward()
    assert calls == 4 + recomputed


@pytest.mark.parametrize(("kind", "matrix_products", "other"), [("none", 0, 0), ("full", 24, 1), ("selective", 0, 1)])
def test_selective_recomputation_keeps_matrix_products(kind: str, matrix_products: int, other: int) -> None:
    """A layer has seven, whose last output no gradient needs; its norms are made again either way."""
    model = build_model(Model(config=LLAMA), complete(Model(config=LLAMA)), seed=0, attention="sdpa").train()
    apply_activation_checkpointing(model, kind)
    tokens = torch.arange(8)[None]
    loss = model(input_ids=tokens, use_cache=False).logits.sum()
    with CountOperators() as counted:
        loss.backward()
    gradients = 2 * (4 * 7 + 1)  # of input and weight of every matrix
    assert counted.names["aten::mm"] - gradients == matrix_products
    assert (counted.names["aten::rsqrt"] > 0) == bool(other)


class CountOperators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), kwargs: Any = None) -> Any:
        self.names[function.name()] += 1
        return function(*arguments, **(kwargs or {}))


@pytest.mark.parametrize(
    ("config", "scaled"),
    [
        ({**LLAMA, "hidden_size": 128}, {"o_proj", "down_proj"}),
        ({"model_type": "gpt2", "n_embd": 128, "n_layer": 4, "n_head": 2}, {"c_proj"}),
        ({"model_type": "gpt_neox", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4,
          "num_attention_heads": 2}, {"dense", "dense_4h_to_h"}),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)  # fmt: skip
def test_depth_scaled_weights_keep_the_residual_stream_small(config: dict[str, Any], scaled: set[str]) -> None:
    model = build_model(
        Model(config=config, init="depth_scaled"), complete(Model(config=config)), seed=0, attention="eager"
    )
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and ".norm" not in name:
            expected = 0.02 / math.sqrt(2 * 4) if name.split(".")[-2] in scaled else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.05), name


def test_zero_outputs_are_zero_and_nothing_else_changes() -> None:
    for config, zero in (
        (LLAMA, ("o_proj", "down_proj")),
        ({"model_type": "gpt2", "n_embd": 64, "n_head": 2}, ("c_proj",)),
    ):
        sections = [Model(config=config, init=init) for init in ("zero_outputs", "default")]
        ours, plain = (build_model(one, complete(one), seed=0, attention="eager") for one in sections)
        for (name, parameter), other in zip(ours.named_parameters(), plain.parameters(), strict=True):
            expected = torch.zeros_like(other) if name.split(".")[-2] in zero and parameter.dim() > 1 else other
            assert torch.equal(parameter, expected), name


def test_the_vocabulary_is_padded() -> None:
    assert complete(Model(config=LLAMA, pad_vocab_to_multiple=64)).vocab_size == 128
    assert complete(Model(config={**LLAMA, "vocab_size": 129}, pad_vocab_to_multiple=64)).vocab_size == 192
    assert complete(Model(config={**LLAMA, "vocab_size": 192}, pad_vocab_to_multiple=64)).vocab_size == 192
    with pytest.raises(ValueError, match="neither `init` nor `pad_vocab_to_multiple` with `pretrained`"):
        Model(pretrained="x", pad_vocab_to_multiple=64)


def test_padded_tokens_lose_their_probability() -> None:
    """They start as likely as any other and are never a target: the softmax itself drives them out."""
    section = Model(config=LLAMA, pad_vocab_to_multiple=64)
    model = build_model(section, complete(section), seed=0, attention="sdpa").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = torch.randint(0, 100, (8, 17), generator=torch.Generator().manual_seed(0))

    def padded_mass() -> float:
        return model(tokens[:, :-1], use_cache=False).logits.softmax(-1)[..., 100:].sum(-1).mean().item()

    assert padded_mass() == pytest.approx(28 / 128, rel=0.1)
    for _ in range(30):
        logits = model(tokens[:, :-1], use_cache=False).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert padded_mass() < 0.01


@pytest.mark.parametrize("kind", ["full", 2, "selective", "offloaded"])
def test_recomputation_is_bitwise_equal(kind: str | int) -> None:
    tokens = torch.arange(16)[None]
    gradients = []
    for chosen in ("none", kind):
        model = build_model(Model(config=LLAMA), complete(Model(config=LLAMA)), seed=0, attention="sdpa").train()
        apply_activation_checkpointing(model, chosen)
        model(input_ids=tokens, use_cache=False).logits.square().mean().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert torch.equal(*gradients)

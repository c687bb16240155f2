"""Initial weights: every one is set, as Transformers sets it, from its layer's own seed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from turbolm.errors import UserError
from turbolm.models.build import build_config, build_model
from turbolm.models.initialise import _ConstructedValues
from turbolm.models.trial import small_mapping
from turbolm.recipe.schema import Model

TYPES = sorted(AutoModelForCausalLM._model_mapping._model_mapping)
# Constructors alone set weights of apertus and openai-gpt.
COMMON = {
    "apertus", "bart", "deepseek_v3", "gemma3_text", "gpt2", "gpt_oss", "gptj", "llama", "mamba", "mixtral",
    "openai-gpt", "qwen3_moe", "xlstm",
}  # fmt: skip


def build(model_type: str, seed: int = 1) -> PreTrainedModel:
    section = Model(config=small_mapping(model_type))
    config = build_config(section, seq_len=48, vocab_size=96, bos_token_id=1, eos_token_id=2)
    return build_model(section, config, seed=seed, attention="eager")


def tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return dict([*model.named_parameters(), *model.named_buffers()])


@pytest.fixture
def dirty_memory() -> Iterator[None]:
    """Memory that nothing was written to holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    "model_type",
    [pytest.param(name, marks=[] if name in COMMON else pytest.mark.slow) for name in TYPES],
)
def test_every_weight_is_set_as_transformers_sets_it(model_type: str, dirty_memory: None) -> None:
    try:
        model = build(model_type)
    except UserError as error:
        assert model_type not in COMMON
        pytest.skip(str(error))
    ours = tensors(model)
    assert [name for name, value in ours.items() if value.isnan().any()] == []
    theirs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        theirs.append(tensors(AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)))
    assert ours.keys() == theirs[0].keys()
    for name, value in ours.items():
        expected, other = theirs[0][name], theirs[1][name]
        if torch.equal(expected, other):  # no random number in it
            assert torch.equal(value, expected), name
        elif value.numel() > 1000 and (model_type, name) not in OTHERWISE_DRAWN:
            assert value.std().item() == pytest.approx(expected.std().item(), rel=0.25), name


# A rule of the whole model draws these, which come with a layer of their own here.
OTHERWISE_DRAWN = {
    ("modernbert-decoder", "lm_head.dense.weight"),
    ("phi4_multimodal", "model.embed_tokens_extend.image_embed.img_processor.head.mlp.fc1.weight"),
    ("phi4_multimodal", "model.embed_tokens_extend.image_embed.img_processor.head.mlp.fc2.weight"),
}


@pytest.mark.parametrize(("model_type", "layer"), [("llama", "model.layers.1"), ("gpt2", "transformer.h.1")])
def test_a_layer_is_drawn_by_the_models_rule_from_its_own_seed(model_type: str, layer: str) -> None:
    """The rule that old runs were drawn by: SHA-256 of `seed/name`, children first."""
    ours, theirs = build(model_type, seed=5), build(model_type, seed=6)
    for name in (layer, "lm_head"):
        digest = hashlib.sha256(f"5/{name}".encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:7], "big"))
        with torch.no_grad():
            theirs.get_submodule(name).apply(theirs._init_weights)  # children first
    drawn, expected = (model.get_submodule(layer).state_dict() for model in (ours, theirs))
    assert [name for name, value in drawn.items() if not torch.equal(value, expected[name])] == []
    if model_type == "llama":
        assert torch.equal(ours.lm_head.weight, theirs.lm_head.weight)


def test_a_weight_that_nothing_sets_stays_visible() -> None:
    """It is NaN, not whatever the memory held, and the check of the logits refuses it."""
    model = build("llama")
    with torch.no_grad():
        model.model.norm.forgotten = torch.nn.Parameter(torch.empty(4))
        otherwise = torch.full((4,), torch.nan)
        assert _ConstructedValues(model, 0).of("model.norm.forgotten", otherwise) is otherwise

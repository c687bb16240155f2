"""Published configurations are accepted as they are; a misspelt setting is refused by plan, submit and train alike."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from turbolm.errors import UserError
from turbolm.launch.slurm import write_submission
from turbolm.models.build import build_config
from turbolm.models.count import examine
from turbolm.plan.count import check_model
from turbolm.plan.summary import collect_summary
from turbolm.recipe.load import load_recipe

PUBLISHED = json.loads((Path(__file__).parent.parent / "fixtures/published_configs.json").read_text())
QUICK = ("SmolLM2-135M", "gpt2", "OLMo-2-1B", "granite-3.0-1b-a400m", "Qwen2.5-0.5B")

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
LLAMA = {"model_type": "llama", **SMALL}
GPT2 = {"model_type": "gpt2", "n_embd": 64, "n_layer": 1, "n_head": 4}
# What the recipe says, the misspelt key, and the key that is meant where one is near.
MISSPELT: list[tuple[dict[str, Any], str, str | None]] = [
    (LLAMA | {"hiden_size": 64}, "hiden_size", "hidden_size"),
    (LLAMA | {"rope_teta": 1e4}, "rope_teta", "rope_theta"),
    (LLAMA | {"rope_parameters": {"rope_type": "default", "theta": 1e4}}, "rope_parameters.theta", "rope_theta"),
    (LLAMA | {"rope_scaling": {"rope_type": "linear", "facter": 2.0}}, "rope_scaling.facter", "factor"),
    (LLAMA | {"num_kv_heads": 2}, "num_kv_heads", "num_key_value_heads"),
    (LLAMA | {"tie_embeddings": True}, "tie_embeddings", "tie_word_embeddings"),
    (LLAMA | {"rms_norm_epsilon": 1e-5}, "rms_norm_epsilon", "rms_norm_eps"),
    (LLAMA | {"initialiser_range": 0.03}, "initialiser_range", "initializer_range"),
    (GPT2 | {"n_embed": 64}, "n_embed", "n_embd"),
    (GPT2 | {"n_heads": 4}, "n_heads", "n_head"),
    (SMALL | {"model_type": "gpt_neox", "rotary_pcts": 0.5}, "rotary_pcts", None),
    (SMALL | {"model_type": "mistral", "sliding_windows": 16}, "sliding_windows", "sliding_window"),
    (SMALL | {"model_type": "qwen2", "layer_type": ["full_attention"]}, "layer_type", "layer_types"),
    (SMALL | {"model_type": "qwen3_moe", "head_dims": 16}, "head_dims", "head_dim"),
    (SMALL | {"model_type": "qwen3_moe", "num_expert": 4}, "num_expert", "num_experts"),
    (SMALL | {"model_type": "mixtral", "num_local_expert": 4}, "num_local_expert", "num_local_experts"),
    (SMALL | {"model_type": "smollm3", "no_rope_layer": [1]}, "no_rope_layer", "no_rope_layers"),
    (SMALL | {"model_type": "olmo2", "hidden_activation_fn": "silu"}, "hidden_activation_fn", None),
    (SMALL | {"model_type": "granite", "attention_multipler": 0.1}, "attention_multipler", "attention_multiplier"),
    (
        SMALL | {"model_type": "gemma2", "attn_logit_softcaping": 30.0},
        "attn_logit_softcaping",
        "attn_logit_softcapping",
    ),
]
RECIPE = """\
name: x
model: {model}
tokenizer: {{train: {{vocab_size: 300}}}}
data: {{seq_len: 32}}
train: {{budget: 3200, global_batch: 320}}
cluster: {{device: cpu, processes_per_node: 1, slurm: {{}}}}
execution: {{cache_dir: cache}}
"""


def write_recipe(folder: Path, model: dict[str, Any]) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(model=json.dumps(model)), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in PUBLISHED]
)
def test_a_published_configuration_is_accepted_as_it_is(name: str, tmp_path: Path) -> None:
    """As a file of a recipe it has the parameters that Transformers counts for its folder, and builds."""
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]))
    with torch.device("meta"):
        counted = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    expected = sum(parameter.numel() for parameter in counted.parameters())
    recipe = load_recipe(write_recipe(tmp_path, {"config_file": str(tmp_path)}))
    answer = examine(recipe.model.config_file, None)
    assert answer.problems == ()
    assert answer.size is not None and answer.size.total == expected
    config = build_config(recipe.model, seq_len=32, vocab_size=300, bos_token_id=0, eos_token_id=0)
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in built.parameters()) == expected


@pytest.mark.parametrize(
    ("config", "key", "meant"),
    [pytest.param(*case, marks=() if at < 5 else pytest.mark.slow) for at, case in enumerate(MISSPELT)],
)
def test_a_misspelt_setting_is_refused_everywhere(
    config: dict[str, Any], key: str, meant: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_recipe(tmp_path, {"config": config})
    recipe = load_recipe(path)
    hint = f"; did you mean '{meant}'?" if meant else ""
    expected = f"model.config.{key}: {config['model_type']} has no such setting{hint}"
    check = {
        "train, before any rank starts": lambda: check_model(recipe, path, examine),  # its answer is kept for the next
        "plan": lambda: collect_summary(recipe, str(path), (), lambda *_: {}),
        "submit": lambda: write_submission(path),
        "a rank": lambda: build_config(recipe.model, seq_len=32, vocab_size=300, bos_token_id=0, eos_token_id=0),
    }
    for who, ask in check.items():
        with pytest.raises(UserError) as caught:
            ask()
        assert expected in str(caught.value), who
        assert not re.search(r"'(.+)'; did you mean '\1'", str(caught.value)), "no value is suggested for itself"
    assert not Path("runs").exists(), "nothing is left of what was refused"

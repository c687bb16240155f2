"""`scale: {from: RECIPE}`: what the rules give against values computed by hand, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from turbolm.plan.text import scaling_lines
from turbolm.recipe.contract import contract_of, fingerprint
from turbolm.recipe.load import RecipeError, dump_recipe, load_recipe, load_scaled
from turbolm.recipe.scale import RULES, scale_batch

MODEL = "model_type: llama, intermediate_size: 384, num_hidden_layers: 4, tie_word_embeddings: {tied}"
TUNED = f"""\
name: tuned
model: {{config: {{hidden_size: 128, num_attention_heads: 4, {MODEL}}}}}
tokenizer: {{train: {{vocab_size: 512}}}}
data: {{seq_len: 512}}
train: {{budget: 1M, global_batch: 8192}}
optimizer: OPTIMIZER
"""
ADAMW = "{name: adamw, lr: 2e-3, weight_decay: 0.1, lr_multipliers: {head: 0.5}}"
MUON = "{name: muon, lr: 2e-3, weight_decay: 0.1, peak_lrs: {matrices: 1e-2}}"
LARGER = """\
name: larger
extends: tuned.yaml
scale: {from: tuned.yaml}
model: {config: {hidden_size: 512, intermediate_size: 1536, num_attention_heads: 16}}
train: {budget: 64M}
"""


def write(folder: Path, larger: str = LARGER, optimizer: str = ADAMW, tied: str = "false") -> Path:
    (folder / "tuned.yaml").write_text(TUNED.replace("OPTIMIZER", optimizer).replace("{tied}", tied))
    path = folder / "larger.yaml"
    path.write_text(larger)
    return path


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return str(caught.value)


def test_values_of_adamw_are_those_computed_by_hand(tmp_path: Path) -> None:
    """64 times the tokens: 64^0.383 = 4.92, so 4 times the batch and twice the rates; 4 times the width."""
    recipe = load_recipe(write(tmp_path))
    assert recipe.train.global_batch == 4 * 8192
    assert recipe.optimizer.lr == pytest.approx(2 * 2e-3)
    multipliers = recipe.optimizer.lr_multipliers.model_dump()
    assert multipliers == {"matrices": 0.25, "head": 0.5 / 4, "embeddings": 1, "vectors": 1}
    # batch / (lr x decay x budget) of the matrices stays: 4 / (2 x 0.25 x 64) = 1 / 8
    assert recipe.optimizer.weight_decay == pytest.approx(0.1 / 8)


@pytest.mark.parametrize(("adjust_lr", "factor"), [("match_rms_adamw", 0.5), ("original", 1.0)])
def test_values_of_muon_follow_the_size_of_its_updates(tmp_path: Path, adjust_lr: str, factor: float) -> None:
    optimizer = MUON.replace("name: muon", f"name: muon, adjust_lr: {adjust_lr}")
    recipe = load_recipe(write(tmp_path, optimizer=optimizer, tied="true"))
    assert recipe.optimizer.lr == pytest.approx(4e-3)
    assert recipe.optimizer.peak_lrs.model_dump(exclude_none=True) == {"matrices": pytest.approx(2e-2)}
    multipliers = recipe.optimizer.lr_multipliers
    assert (multipliers.matrices, multipliers.embeddings, multipliers.vectors) == (factor, 0.5, 1)
    assert recipe.optimizer.weight_decay == pytest.approx(0.1 * 4 / (2 * factor * 64), rel=1e-3)


@pytest.mark.parametrize("adjust_lr", ["match_rms_adamw", "original"])
def test_a_moved_update_of_muon_has_the_same_norm_at_every_width(tmp_path: Path, adjust_lr: str) -> None:
    torch = pytest.importorskip("torch")
    from turbolm.optim.muon import orthogonalise, update_scale

    optimizer = MUON.replace("name: muon", f"name: muon, adjust_lr: {adjust_lr}")
    tuned, larger = (load_recipe(path) for path in (tmp_path / "tuned.yaml", write(tmp_path, optimizer=optimizer)))
    norms = []
    for recipe, width in ((tuned, 128), (larger, 512)):
        shape = (3 * width, width)
        update = orthogonalise(torch.randn(shape, generator=torch.Generator().manual_seed(0)), 12)
        size = torch.linalg.matrix_norm(update * update_scale(shape, adjust_lr), 2).item()
        norms.append(size * recipe.optimizer.lr_multipliers.matrices)
    assert norms[1] == pytest.approx(norms[0], rel=0.05)  # Newton-Schulz ends in about [0.7, 1.2]


@pytest.mark.parametrize("ratio", [0.01, 0.4, 1, 2, 3.7, 20, 1000])
def test_a_batch_is_that_of_nanochat_in_whole_sequences(ratio: float) -> None:
    nanochat = 2 ** round(math.log2(2**19 * ratio**0.383))
    assert scale_batch(2**19, ratio, 2048) == nanochat
    assert scale_batch(2**19, ratio, 1536) == pytest.approx(nanochat, abs=768)
    assert scale_batch(2**19, ratio, 1536) % 1536 == 0
    assert scale_batch(1024, 1e-9, 512) == 512


def test_the_contract_is_that_of_the_plain_values(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path))
    plain = LARGER.replace("scale: {from: tuned.yaml}\n", "").replace("64M", "64M, global_batch: 32768") + (
        "optimizer: {lr: 4e-3, weight_decay: 0.0125, lr_multipliers: {matrices: 0.25, head: 0.125}}\n"
    )
    (tmp_path / "plain.yaml").write_text(plain)
    by_hand = load_recipe(tmp_path / "plain.yaml")
    assert fingerprint(contract_of(recipe)) == fingerprint(contract_of(by_hand))
    copy = tmp_path / "elsewhere"
    copy.mkdir()
    (copy / "recipe.yaml").write_text(dump_recipe(recipe))  # as a run directory keeps it, without the tuned recipe
    assert load_recipe(copy / "recipe.yaml") == recipe == by_hand
    assert load_scaled(copy / "recipe.yaml")[1] is None


def test_what_the_recipe_sets_stays_and_later_rules_use_it(tmp_path: Path) -> None:
    path = write(tmp_path, LARGER.replace("64M", "64M, global_batch: 131072"))
    recipe = load_recipe(path, ["optimizer.weight_decay=0.3"])
    assert recipe.train.global_batch == 131072
    assert recipe.optimizer.lr == pytest.approx(4 * 2e-3)
    assert recipe.optimizer.weight_decay == 0.3
    scaling = load_scaled(path, ["optimizer.weight_decay=0.3"])[1]
    assert scaling is not None
    own = {one.key: one.value for one in scaling.derived if one.status == "set in the recipe"}
    assert own == {"train.global_batch": 131072, "optimizer.weight_decay": 0.3}
    assert "train.global_batch 32768; the recipe sets 131072" in list(scaling_lines(scaling))


def test_a_value_of_a_file_that_the_tuned_recipe_does_not_extend_is_set(tmp_path: Path) -> None:
    (tmp_path / "piece.yaml").write_text("optimizer: {lr: 5e-4}\n")
    path = write(tmp_path, LARGER.replace("extends: tuned.yaml", "extends: [tuned.yaml, piece.yaml]"))
    assert load_recipe(path).optimizer.lr == 5e-4


def test_rules_that_are_left_out_are_only_suggested(tmp_path: Path) -> None:
    path = write(tmp_path, LARGER.replace("from: tuned.yaml", "from: tuned.yaml, rules: [lr]"))
    recipe, tuned = load_recipe(path), load_recipe(tmp_path / "tuned.yaml")
    assert (recipe.train.global_batch, recipe.optimizer) == (tuned.train.global_batch, tuned.optimizer)
    scaling = load_scaled(path)[1]
    assert scaling is not None and scaling.applied == {"optimizer.lr": 2e-3}
    left_out = {one.key: one.suggested for one in scaling.derived if one.status == "rule left out"}
    assert left_out["train.global_batch"] == 32768 and left_out["optimizer.lr_multipliers.matrices"] == 0.25


def test_without_extends_the_tuned_values_are_taken_too(tmp_path: Path) -> None:
    text = TUNED.replace("OPTIMIZER", "{lr: 2e-3}").replace("{tied}", "false").replace(", global_batch: 8192", "")
    path = write(tmp_path, "scale: {from: tuned.yaml, rules: [batch, width]}\n" + text.replace("tuned\n", "other\n", 1))
    recipe = load_recipe(path)
    assert recipe.train.global_batch == 8192 and recipe.optimizer.lr_multipliers.head == 0.5


def test_the_path_is_relative_to_the_file_that_says_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    write(folder)
    (tmp_path / "top.yaml").write_text("extends: a/larger.yaml\nname: top\n")
    monkeypatch.chdir(tmp_path)
    assert load_recipe("top.yaml").optimizer == load_recipe(folder / "larger.yaml").optimizer
    (tmp_path / "off.yaml").write_text("extends: a/larger.yaml\nscale: null\n")
    assert load_recipe("off.yaml").optimizer.lr == 2e-3


@pytest.mark.parametrize(
    ("larger", "told"),
    [
        (LARGER.replace("{from: tuned.yaml}", "{from: nowhere.yaml}"), "larger.yaml:3: scale.from: no such file: "),
        (LARGER.replace("{from: tuned.yaml}", "{from: larger.yaml}"), "scale.from: a recipe scales from itself: "),
        (LARGER.replace("{from: tuned.yaml}", "tuned.yaml"), "scale: expected {from: RECIPE}, "),
        (LARGER.replace("{from: tuned.yaml}", "{rules: [lr]}"), "scale.from: expected the path of a tuned recipe "),
        (LARGER.replace("tuned.yaml}", "tuned.yaml, exponent: 1}"), "scale.exponent: unknown key (known: from, rules)"),
        (LARGER.replace("tuned.yaml}", "tuned.yaml, rules: [rate]}"), f"scale.rules: expected a list of {RULES[0]}, "),
        (LARGER + "optimizer: {name: muon}\n", "scale.from: optimizer.name is muon here and adamw in "),
        (LARGER.replace("hidden_size: 512", "model_type: qwen3, hidden_size: 512"), "model_type is qwen3 here and "),
        (LARGER.replace("512,", "512, tie_word_embeddings: null,"), "width needs model.config.tie_word_embeddings "),
        (LARGER.replace("64M", "64M, global_batch: 5"), "train.global_batch: must be a multiple of data.seq_len"),
    ],
)
def test_what_cannot_be_derived_is_refused_at_its_line(tmp_path: Path, larger: str, told: str) -> None:
    assert told in refusal(write(tmp_path, larger))


def test_more_refusals(tmp_path: Path) -> None:
    path = write(tmp_path)
    assert "scale: can only be set in a file" in refusal(path, "scale.rules=[lr]")
    write(tmp_path, optimizer="{name: sgd, lr: 0.1}")
    assert "no rule is known for optimizer.name sgd, only for adamw, " in refusal(path)
    muon = MUON.replace("name: muon", "name: muon, adjust_lr: original")
    write(tmp_path, LARGER + "optimizer: {adjust_lr: match_rms_adamw}\n", optimizer=muon)
    assert "optimizer.adjust_lr is match_rms_adamw here and original in " in refusal(path)
    write(tmp_path, optimizer=MUON.replace("name: muon", "name: muon, hyperball: true"))
    assert "no rule is known for optimizer.hyperball" in refusal(path)
    write(tmp_path)
    (tmp_path / "tuned.yaml").write_text("name: tuned\noptimizer: {lr: fast}\n")
    assert "tuned.yaml:2: optimizer.lr: expected a number such as 3e-4" in refusal(path)
    (tmp_path / "tuned.yaml").write_text("extends: larger.yaml\n")  # a loop of `extends` and one of `scale`
    assert "extends itself" in refusal(path)


def test_what_no_rule_covers_is_told(tmp_path: Path) -> None:
    larger = LARGER.replace("1536, num_attention_heads: 16", "2048, num_attention_heads: 8, num_hidden_layers: 8")
    scaling = load_scaled(write(tmp_path, larger + "optimizer: {betas: [0.9, 0.99]}\n"))[1]
    assert scaling is not None
    name = str(tmp_path / "tuned.yaml")
    assert scaling.notes == (
        f"layers: 4 in {name}, 8 here: no rule",
        f"feed-forward width: 384 in {name}, 2048 here: no rule",
        f"size of a head: 32 in {name}, 64 here: no rule",
        f"not as in {name}, for which its values were tuned: optimizer.betas",
    )
    assert json.loads(json.dumps(scaling.as_dict()))["derived"][0]["key"] == "train.global_batch"


@pytest.mark.parametrize(
    ("model_type", "width", "heads", "layers", "inner"),
    [
        ("gpt2", "n_embd", "n_head", "n_layer", "n_inner"),
        ("gpt_neo", "hidden_size", "num_heads", "num_layers", "intermediate_size"),
        ("mpt", "d_model", "n_heads", "n_layers", "ffn_hidden_size"),
        ("xglm", "d_model", "attention_heads", "num_layers", "ffn_dim"),
    ],
)
def test_what_no_rule_covers_is_told_under_the_names_of_other_types(
    tmp_path: Path, model_type: str, width: str, heads: str, layers: str, inner: str
) -> None:
    names = {"hidden_size": width, "num_attention_heads": heads, "num_hidden_layers": layers}
    names |= {"intermediate_size": inner, "llama": model_type}
    larger = LARGER.replace("1536, num_attention_heads: 16", "2048, num_attention_heads: 8, num_hidden_layers: 8")
    path = write(tmp_path, larger)
    for file in (path, tmp_path / "tuned.yaml"):
        text = file.read_text()
        for usual, name in names.items():
            text = text.replace(usual, name)
        file.write_text(text)
    scaling = load_scaled(path)[1]
    assert scaling is not None and scaling.applied["optimizer.lr_multipliers.matrices"] == 0.25
    name = str(tmp_path / "tuned.yaml")
    assert scaling.notes == (
        f"layers: 4 in {name}, 8 here: no rule",
        f"feed-forward width: 384 in {name}, 2048 here: no rule",
        f"size of a head: 32 in {name}, 64 here: no rule",
    )

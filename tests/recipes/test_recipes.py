"""Every recipe of this repository loads, plans on the machines it describes, and says what it is."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from turbolm.errors import UserError
from turbolm.plan.count import read_model_config, size_model
from turbolm.plan.machine import described_machine
from turbolm.plan.parameters import estimate_size
from turbolm.plan.plan import build_plan
from turbolm.plan.recipe_table import read_header, render_readme
from turbolm.plan.summary import collect_summary
from turbolm.recipe.json_schema import recipe_json_schema
from turbolm.recipe.load import load_recipe
from turbolm.recipe.schema import Recipe
from turbolm.shipped import recipes_by_name

FOLDER = Path(__file__).parents[2] / "recipes"
FILES = list(recipes_by_name().values())
NAMES = [path.parent.relative_to(FOLDER).as_posix() for path in FILES]
PIECES = sorted(path for path in FOLDER.rglob("*.yaml") if path not in FILES)

# From the models' own checkpoints.
PUBLISHED_PARAMETERS = {
    "gpt2-124m/pretrain": 124_439_808,
    "llama3.1-8b/pretrain": 8_030_261_248,
    "llama3.1-70b/pretrain": 70_553_706_496,
    "llama3.2-1b/pretrain": 1_235_814_400,
    "qwen3-1.7b/continue": 1_720_574_976,
    "gpt2-124m/fineweb-adamw": 124_439_808,
    "gpt2-124m/fineweb-muon": 124_439_808,
    "gpt2-124m/rtx4090x4": 124_439_808,
    "gpt2-124m/one-24gb": 124_439_808,
    "llama3.2-1b/a100": 1_235_814_400,
    "llama3.1-8b/a100": 8_030_261_248,
    "llama3.1-8b/long-64k": 8_030_261_248,
    "smollm2-135m/pretrain": 134_515_008,
    "smollm2-360m/pretrain": 361_821_120,
    "smollm3-3b/pretrain": 3_075_098_624,
    "smollm3-3b/long-32k": 3_075_098_624,
    "smollm3-3b/long-64k": 3_075_098_624,
    "olmo2-1b/pretrain": 1_484_916_736,
    "olmoe-1b-7b/pretrain": 6_919_161_856,
    "gemma3-1b/continue": 999_885_952,
    "qwen3-0.6b/continue": 596_049_920,
    "qwen3-30b-a3b/continue": 30_532_122_624,
}
NUM_PROCESSES = {"gpt2-124m/pretrain": 8, "llama3.2-1b/pretrain": 8, "llama3.1-8b/pretrain": 64}
NUM_PROCESSES |= {"qwen3-1.7b/continue": 16, "llama3.1-70b/pretrain": 512}
NUM_PROCESSES |= {"gpt2-124m/fineweb-adamw": 8, "gpt2-124m/fineweb-muon": 8, "gpt2-124m/rtx4090x4": 4}
NUM_PROCESSES |= {"gpt2-124m/one-24gb": 1, "llama3.2-1b/a100": 8, "llama3.1-8b/a100": 128, "llama3.1-8b/long-64k": 32}
NUM_PROCESSES |= {"smollm2-135m/pretrain": 8, "smollm2-360m/pretrain": 64, "smollm3-3b/pretrain": 192}
NUM_PROCESSES |= {"smollm3-3b/long-32k": 96, "smollm3-3b/long-64k": 96, "olmo2-1b/pretrain": 64}
NUM_PROCESSES |= {"olmoe-1b-7b/pretrain": 256, "gemma3-1b/continue": 8, "qwen3-0.6b/continue": 8}
NUM_PROCESSES |= {"qwen3-30b-a3b/continue": 64}
# Of a mixture, the parameters that a token passes through: 1.3B and 3.3B as published.
ACTIVE = {"olmoe-1b-7b/pretrain": 1_282_017_280, "qwen3-30b-a3b/continue": 3_353_032_704}


def config_of(name: str) -> dict[str, Any]:
    path = FOLDER / name / "config.yaml"
    config, _ = read_model_config(load_recipe(path), path)
    assert config is not None
    return config


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No data, tokenizers or checkpoints are here."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_it_plans_on_its_cluster(path: Path) -> None:
    recipe = load_recipe(path)
    summary = collect_summary(recipe, str(path), (), lambda *_: {})
    name = path.parent.relative_to(FOLDER).as_posix()
    if name in NUM_PROCESSES:
        assert described_machine(recipe) is not None
        assert summary.plan.world_size == NUM_PROCESSES[name]
        assert (summary.plan.device, summary.plan.precision) == ("cuda", "bf16")
        assert summary.memory is not None and summary.gpu_memory_bytes is not None
        assert summary.memory.device_bytes < summary.gpu_memory_bytes / 2
        assert summary.footprint is not None and summary.footprint.verdict(summary.gpu_memory_bytes) == "FITS"
    assert summary.size is not None
    if name in ACTIVE:
        assert summary.size.total - summary.size.idle == ACTIVE[name]
    assert summary.size.total == PUBLISHED_PARAMETERS.get(name, summary.size.total)
    assert summary.batch.num_filler_bins == 0


def test_every_promised_recipe_is_there() -> None:
    assert set(PUBLISHED_PARAMETERS) == set(NUM_PROCESSES)
    assert set(NAMES) >= set(PUBLISHED_PARAMETERS) | {"quickstart"}
    clusters = {path.stem for path in (FOLDER / "_clusters").glob("*.yaml")}
    assert clusters >= {"local", "a100x8", "h100x8", "a100x8_multinode", "h100x8_multinode", "rtx4090x4", "one_24gb"}
    assert {path.stem for path in (FOLDER / "_base").glob("*.yaml")} >= {"fineweb_edu", "climbmix", "dclm"}


def test_all_of_them_load_and_plan_without_torch() -> None:
    """Neither torch nor Transformers is imported, nor a process started that would import them."""
    code = (
        "import subprocess, sys\n"
        "from turbolm.plan.summary import collect_summary\n"
        "from turbolm.recipe.load import load_recipe\n"
        "from turbolm.shipped import recipes_by_name\n"
        "subprocess.run = subprocess.Popen = None\n"
        "for path in recipes_by_name().values():\n"
        "    recipe = load_recipe(path)\n"
        "    assert recipe.cluster.gpu is None or collect_summary(recipe, str(path), (), lambda *_: {}).footprint\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_the_header_says_command_hardware_and_expectations(path: Path) -> None:
    header = read_header(path)
    assert f"recipes/{path.relative_to(FOLDER).as_posix()}" in header["command"]
    assert re.search(r"turbolm (train|submit) recipes/", header["command"])
    assert header["hardware"]
    for expectation in ("runtime", "loss"):
        assert "estimated until measured" in header[expectation] or "measured" in header[expectation]
    recipe = load_recipe(path)
    assert recipe.name == "-".join(path.parent.relative_to(FOLDER).parts)
    if recipe.cluster.gpus_per_node:
        assert header["hardware"].startswith(f"{recipe.cluster.num_nodes} node")
        assert ("submit" in header["command"]) == (recipe.cluster.num_nodes > 1)


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_the_first_line_leads_editors_to_the_schema(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    match = re.fullmatch(r"# yaml-language-server: \$schema=(\S+)", first)
    assert match
    assert (path.parent / match[1]).resolve() == FOLDER / "schema.json"


@pytest.mark.parametrize("path", PIECES, ids=lambda path: path.stem)
def test_a_piece_says_what_it_is_and_is_no_more_than_a_part_of_a_recipe(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("# ")
    known = set(Recipe.model_fields) - {"name"} | {"extends"}
    assert set(yaml.safe_load(text)) <= known
    if path.parent.name == "_clusters":
        assert set(yaml.safe_load(text)) == {"cluster"}


@pytest.mark.parametrize("name", PUBLISHED_PARAMETERS)
def test_the_architecture_is_what_transformers_builds(name: str) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoConfig, AutoModelForCausalLM

    config = config_of(name)
    fields = {key: value for key, value in config.items() if key not in ("model_type", "torch_dtype")}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **fields))
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED_PARAMETERS[name]
    counts = estimate_size(config)
    assert counts is None or counts.total == PUBLISHED_PARAMETERS[name]


@pytest.mark.parametrize(
    "name", [name for name in PUBLISHED_PARAMETERS if "/continue" not in name and "/long" not in name]
)
def test_training_accepts_the_configuration(name: str) -> None:
    pytest.importorskip("torch")
    from turbolm.models.build import build_config

    recipe = load_recipe(FOLDER / name / "config.yaml")
    config = build_config(recipe.model, seq_len=recipe.data.seq_len, vocab_size=49152, bos_token_id=1, eos_token_id=2)
    if name.startswith("llama"):
        rope = config.rope_parameters
        assert (rope["rope_type"], rope["rope_theta"], config.rms_norm_eps) == ("llama3", 500000.0, 1e-5)
        assert rope["factor"] == (32.0 if "3.2" in name else 8.0)
        assert config.tie_word_embeddings == ("3.2" in name)


def test_the_largest_needs_stage_3_and_the_second_copy_of_its_weights_is_counted() -> None:
    path = FOLDER / "llama3.1-70b/pretrain/config.yaml"
    summary = collect_summary(load_recipe(path), str(path), (), lambda *_: {})
    assert summary.plan.ds_config["zero_optimization"]["zero_hpz_partition_size"] == 8
    assert summary.memory is not None
    assert summary.memory.weights == pytest.approx(2 * 70_553_706_496 * (1 / 512 + 1 / 8), rel=1e-6)


def test_smollm3_has_every_source_of_its_stages_from_their_first_step_on() -> None:
    """As its three configs list them: 41, 46 and 56 sources, from steps 1, 3450001 and 4198001 on."""
    recipe = load_recipe(FOLDER / "smollm3-3b/pretrain/config.yaml")
    machine = described_machine(recipe)
    assert machine is not None
    segments = build_plan(recipe, machine).curriculum.segments
    assert [segment.first_step for segment in segments] == [0, 3_450_000, 4_198_000]
    counts = [sum(weight > 0 for weight in segment.weights or ()) for segment in segments]
    assert counts == [41, 46, 56]
    shares = [dict(zip(recipe.data.sources, segment.weights or (), strict=True)) for segment in segments]
    for part, published in zip(shares, (0.333 / 1.0, 0.3 / 1.00005, 0.2 / 1.00565), strict=True):
        (edu,) = (share for source, share in part.items() if source.label == "fineweb-edu")
        assert edu == pytest.approx(published, rel=1e-9)
    for name, count in (("long-32k", 56), ("long-64k", 57)):
        assert len(load_recipe(FOLDER / f"smollm3-3b/{name}/config.yaml").data.sources) == count


@pytest.mark.usefixtures("elsewhere")
def test_sequences_longer_than_a_checkpoints_positions_need_other_rotary_positions() -> None:
    path = FOLDER / "qwen3-1.7b/continue/config.yaml"
    longer = ["data.seq_len=65536", "execution.micro_batch=65536"]
    with pytest.raises(UserError, match="positions for 32768 tokens, fewer than 65536; model.rope_parameters extends"):
        collect_summary(load_recipe(path, longer), str(path), (), lambda *_: {})
    yarn = "model.rope_parameters={rope_type: yarn, factor: 4, original_max_position_embeddings: 32768}"
    notes = collect_summary(load_recipe(path, [*longer, yarn]), str(path), (), lambda *_: {}).notes
    assert "model.rope_parameters: yarn, positions for 131072 tokens (the checkpoint has 32768)" in notes


def test_the_table_is_up_to_date() -> None:
    assert (FOLDER / "README.md").read_text() == render_readme(), "run `turbolm recipes --write`"


# ------------------------------------------------------------------------------------------------------- JSON schema


def test_the_schema_is_up_to_date() -> None:
    assert json.loads((FOLDER / "schema.json").read_text()) == recipe_json_schema(), "run `turbolm schema --write`"


def accepts(schema: dict[str, Any], value: Any, root: dict[str, Any]) -> bool:
    """The part of JSON Schema 2020-12 that the recipe schema uses; an unknown keyword fails."""
    known = {"$schema", "$defs", "title", "description", "default"}
    types = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool}
    checks = {
        "$ref": lambda ref: accepts(root["$defs"][ref.removeprefix("#/$defs/")], value, root),
        "anyOf": lambda options: any(accepts(option, value, root) for option in options),
        "oneOf": lambda options: sum(accepts(option, value, root) for option in options) == 1,
        "type": lambda name: (
            value is None
            if name == "null"
            else isinstance(value, types[name]) and (name == "boolean" or not isinstance(value, bool))
        ),
        "const": lambda const: value == const,
        "enum": lambda allowed: value in allowed,
        "properties": lambda inner: (
            not isinstance(value, dict) or all(accepts(inner[key], value[key], root) for key in value if key in inner)
        ),
        "additionalProperties": lambda rule: (
            not isinstance(value, dict)
            or rule is True
            or all(
                key in schema.get("properties", {}) or (isinstance(rule, dict) and accepts(rule, entry, root))
                for key, entry in value.items()
            )
        ),
        "propertyNames": lambda rule: not isinstance(value, dict) or all(accepts(rule, key, root) for key in value),
        "required": lambda keys: not isinstance(value, dict) or all(key in value for key in keys),
        "items": lambda rule: not isinstance(value, list) or all(accepts(rule, entry, root) for entry in value),
        "prefixItems": lambda rules: (
            not isinstance(value, list)
            or all(accepts(rule, entry, root) for rule, entry in zip(rules, value, strict=False))
        ),
        "minItems": lambda least: not isinstance(value, list) or len(value) >= least,
        "maxItems": lambda most: not isinstance(value, list) or len(value) <= most,
        "minLength": lambda least: not isinstance(value, str) or len(value) >= least,
        "pattern": lambda pattern: not isinstance(value, str) or re.search(pattern, value) is not None,
        "minimum": lambda bound: not isinstance(value, (int, float)) or value >= bound,
        "maximum": lambda bound: not isinstance(value, (int, float)) or value <= bound,
        "exclusiveMinimum": lambda bound: not isinstance(value, (int, float)) or value > bound,
        "exclusiveMaximum": lambda bound: not isinstance(value, (int, float)) or value < bound,
    }
    assert set(schema) <= known | set(checks), set(schema) - known - set(checks)
    return all(checks[keyword](schema[keyword]) for keyword in schema if keyword in checks)


@pytest.mark.parametrize("path", [*FILES, *PIECES], ids=lambda path: path.parent.name + "/" + path.stem)
def test_the_schema_accepts_every_file(path: Path) -> None:
    schema = recipe_json_schema()
    data = yaml.safe_load(
        re.sub(r"(?<![\d.])(\d+)e(-?\d+)\b", r"\1.0e\2", path.read_text())
    )  # YAML 1.1 reads 1e-5 as text
    assert accepts(schema, data, schema)


@pytest.mark.parametrize(
    ("given", "is_accepted"),
    [
        ({"train": {"budget": "2M", "max_grad_norm": "off"}}, True),
        ({"train": {"budget": 2000000, "max_grad_norm": 0.5}}, True),
        ({"train": {"budjet": "2M"}}, False),
        ({"extends": ["a.yaml", "b.yaml"]}, True),
        ({"extends": 3}, False),
        ({"optimizer": {"betas": [0.9, 0.95]}}, True),
        ({"optimizer": {"betas": [0.9]}}, False),
        ({"data": {"sources": [{"type": "parquet", "path": "a/*.parquet"}]}}, True),
        ({"data": {"sources": [{"type": "parquet", "path": ["a", "b"]}]}}, True),
        ({"data": {"sources": [{"type": "parquet"}]}}, False),
        ({"data": {"sources": []}}, False),
        ({"execution": {"zero_stage": 4}}, False),
        ({"cluster": {"gpu": "H100"}}, False),
        ({"schedule": {"warmup": "200 steps"}}, True),
    ],
)
def test_the_schema_accepts_what_a_recipe_may_say(given: dict[str, Any], is_accepted: bool) -> None:
    schema = recipe_json_schema()
    assert accepts(schema, given, schema) == is_accepted


def test_every_key_is_described() -> None:
    schema = recipe_json_schema()

    def has_description(entry: dict[str, Any]) -> bool:
        return "description" in entry or "description" in schema["$defs"].get(
            entry.get("$ref", "")[len("#/$defs/") :], {}
        )

    owners = {"recipe": schema, **schema["$defs"]}
    bare = [
        f"{owner}.{key}"
        for owner, definition in owners.items()
        for key, entry in definition.get("properties", {}).items()
        if not has_description(entry)
    ]
    assert bare == []
    assert set(schema["properties"]) == {"extends", "scale", *Recipe.model_fields}
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"


def test_a_model_without_a_formula_is_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    config = {"model_type": "starcoder2", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64}
    config |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    size = size_model(config, tmp_path)
    assert (size.source, size.embedding, size.head) == ("counted", 64 * 32, 0)
    assert size.total > size.embedding
    monkeypatch.setattr("turbolm.plan.count._run_examiner", lambda _: pytest.fail("counted again"))
    assert size_model(config, tmp_path) == size

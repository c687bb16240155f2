"""Hub names in `model.pretrained` and `tokenizer.path`, against a small hub on this machine."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants, snapshot_download

from tests.hub_stub import Hub, serve_hub
from tests.train.harness import SEQ_LEN, make_recipe
from tests.world import run_world
from turbolm.data.prepare.build import find_store, prepare
from turbolm.errors import UserError
from turbolm.hub import Origin, cached_config, fetch, pretrained_folder, tokenizer_path
from turbolm.plan.count import read_model_config
from turbolm.recipe.load import dump_recipe
from turbolm.recipe.schema import Recipe
from turbolm.train.run_contract import as_started, check_contract, settle_commits
from turbolm.train.run_directory import run_directory

NAME, TOKEN = "someone/tiny", "hf_" + "s3cr3tT0k3n" * 3


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A tiny model with its tokenizer, beside what must never be downloaded."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("hub")
    store = prepare(make_recipe(folder))
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=300, max_position_embeddings=64, **sizes)).save_pretrained(folder / "model")
    found = [*(folder / "model").iterdir(), *(store / "tokenizer").iterdir()]
    others = dict.fromkeys(("pytorch_model.bin", "modeling_tiny.py", "onnx/model.safetensors", "README.md"), b"no")
    return {path.name: path.read_bytes() for path in found} | others


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve_hub() as hub:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield hub


def recipe_of(folder: Path, revision: str | None = None, **sections: Any) -> Recipe:
    tokenizer = {"train": None, "path": NAME}
    model = {"config": None, "pretrained": NAME, "revision": revision}
    return make_recipe(folder, model=model, tokenizer=tokenizer, **sections)


@pytest.mark.parametrize("value", ["gpt2", "org/name", "Org-1/name_2.5B", "checkpoints/missing"])
def test_what_may_be_a_hub_name(value: str) -> None:
    assert Origin("model", value, None).is_on_hub


@pytest.mark.parametrize(
    "value",
    ["/a/b", "./a", "../a", "~/a", "a/b/c", "a/", "a//b", ".hidden", "tok/tokenizer.json", "a b", "there"],
)
def test_what_is_a_path(value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    assert not Origin("model", value, None).is_on_hub


def test_a_download_takes_no_code_and_no_pickles_and_happens_once(hub: Hub, files: dict[str, bytes]) -> None:
    commit = hub.create(NAME).commit(files)
    assert fetch(Origin("model", NAME, None)) == commit
    folder = pretrained_folder(recipe_of(Path.cwd()).model)
    assert folder.name == commit
    there = {path.name for path in folder.rglob("*") if path.is_file()}
    assert there == {name for name in files if name.endswith((".json", ".safetensors")) and "/" not in name}
    assert all((folder / name).read_bytes() == files[name] for name in there)
    asked = len(hub.requests)
    assert fetch(Origin("tokenizer", NAME, None)) == fetch(Origin("model", NAME, None)) == commit
    assert len(hub.requests) == asked, "what the cache holds costs no request"


def test_plan_reads_a_cached_configuration_and_downloads_nothing(hub: Hub, files: dict[str, bytes]) -> None:
    hub.create(NAME).commit(files)
    recipe = recipe_of(Path.cwd())
    config, (note,) = read_model_config(recipe, "recipe.yaml")
    assert config is None and not hub.requests
    assert f"hf download {NAME} config.json --revision main" in note
    snapshot_download(NAME, allow_patterns="config.json")
    asked = len(hub.requests)
    assert read_model_config(recipe, "recipe.yaml") == (json.loads(files["config.json"]), [])
    assert cached_config(recipe.model) is not None and len(hub.requests) == asked
    with pytest.raises(UserError, match="is not in the Hugging Face cache"):
        pretrained_folder(recipe.model)  # the weights are not there


def cannot(origin: Origin) -> str:
    with pytest.raises(UserError) as caught:
        fetch(origin)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_refusal_says_what_to_do(hub: Hub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    hub.create(NAME).commit(files)
    hub.create("a/gated", is_gated=True).commit(files)
    hub.create("a/pickled").commit({"config.json": b"{}", "pytorch_model.bin": b"x"})
    hub.create("a/lora").commit({"adapter_config.json": b"{}", "adapter_model.safetensors": b"x"})
    hub.create("a/slow").commit({"tokenizer.model": b"x", "README.md": b"x"})
    gated = cannot(Origin("model", "a/gated", None))
    assert f"a/gated is gated. Ask for access at {hub.url}/a/gated, then set HF_TOKEN in the environment" in gated
    assert gated.endswith("hf download a/gated --revision main")
    missing = cannot(Origin("model", "checkpoints/mine", None))
    assert f"there is no folder checkpoints/mine here (in {Path.cwd()})" in missing
    assert "as a hub name checkpoints/mine is not on the hub, or is private (set HF_TOKEN" in missing
    assert cannot(Origin("model", NAME, "v9")) == f"model.revision: {NAME} has no branch, tag or commit v9"
    assert "has no model.safetensors: only safetensors are read" in cannot(Origin("model", "a/pickled", None))
    assert "a/lora is an adapter (PEFT), not a model" in cannot(Origin("model", "a/lora", None))
    assert "has no tokenizer.json: convert it" in cannot(Origin("tokenizer", "a/slow", None))
    assert "expected a branch, a tag or a commit" in cannot(Origin("model", NAME, "../../x"))
    assert "only a hub name has revisions" in cannot(Origin("model", "./folder", "main"))
    Path(NAME).mkdir(parents=True)
    assert f"model.pretrained {NAME} is a path on this machine; remove one of the two" in cannot(
        Origin("model", NAME, "main")
    )
    Path(NAME).rmdir()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    offline = cannot(Origin("tokenizer", NAME, "v1"))
    assert "is not in the Hugging Face cache, and HF_HUB_OFFLINE is set" in offline
    assert offline.endswith(f"run where there is a network: hf download {NAME} --revision v1")


def test_an_interrupted_download_is_completed(hub: Hub, files: dict[str, bytes]) -> None:
    """Of two shards one is there, and of the tokenizer no settings: both would be used as they are otherwise."""
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    shards = {"model-1.safetensors": b"1", "model-2.safetensors": b"2"}
    sharded = {name: data for name, data in files.items() if name != "model.safetensors"}
    hub.create(NAME).commit({**sharded, **shards, "model.safetensors.index.json": json.dumps(index).encode()})
    partial = ["config.json", "*index.json", "model-1*", "tokenizer.json"]
    folder = Path(snapshot_download(NAME, allow_patterns=partial))
    fetch(Origin("tokenizer", NAME, None))
    assert (folder / "tokenizer_config.json").is_file() and not (folder / "model-2.safetensors").exists()
    fetch(Origin("model", NAME, None))
    assert (folder / "model-2.safetensors").is_file()


def _work(recipe: Recipe, cache: str) -> Any:
    """One rank: the hub does not answer it."""
    from turbolm.train.worker import run_worker

    constants.HF_HUB_CACHE, constants.ENDPOINT = cache, "http://127.0.0.1:1"
    try:
        return run_worker(recipe)
    except UserError as error:
        return str(error)


def test_a_run_stays_at_the_commit_it_started_from(hub: Hub, files: dict[str, bytes], tmp_path: Path) -> None:
    """Ranks read the cache alone; a branch that moves while a run is under way moves no run."""
    repository = hub.create(NAME)
    first = repository.commit(files)
    recipe = recipe_of(tmp_path, "main", train={"budget": 2 * 5 * SEQ_LEN}, logging={"sample_tokens": 0})
    settled = settle_commits(as_started(recipe)[0])
    assert settled.model.revision == settled.tokenizer.revision == first
    prepare(settled)
    asked = len(hub.requests)
    assert run_world(1, _work, recipe, constants.HF_HUB_CACHE) == [0]
    assert len(hub.requests) == asked
    run = run_directory(recipe)
    contract = json.loads(run.contract.read_text())["contract"]
    assert contract["model"]["revision"] == contract["tokenizer"]["revision"] == first
    config = json.loads(files["config.json"]) | {"hidden_size": 32}
    second = repository.commit({**files, "config.json": json.dumps(config).encode()})
    assert Path(snapshot_download(NAME, revision="main")).name == second, "now the cache's branch has moved too"
    again = settle_commits(as_started(recipe)[0])
    assert again.model.revision == first and find_store(again) is not None
    assert as_started(recipe)[0].tokenizer.revision == first, "as every rank asks"
    run.hub.unlink()
    assert as_started(recipe_of(tmp_path))[0].model.revision == first, "the contract knows as well"
    with pytest.raises(UserError, match=f'model.revision: "{first}" -> "{second}"'):
        check_contract(run, recipe_of(tmp_path, second), None)


def test_a_start_without_a_step_settles_nothing(hub: Hub, files: dict[str, bytes], tmp_path: Path) -> None:
    repository = hub.create(NAME)
    recipe = recipe_of(tmp_path, "main")
    repository.commit(files)
    settle_commits(as_started(recipe)[0])
    second = repository.commit({**files, "note.json": b"{}"})
    snapshot_download(NAME, allow_patterns="*.json", revision="main")  # the weights are not there yet
    again = settle_commits(as_started(recipe)[0])
    assert again.model.revision == second
    assert tokenizer_path(again.tokenizer).name == second


def test_the_command_refuses_in_one_line_without_the_token(hub: Hub, files: dict[str, bytes], tmp_path: Path) -> None:
    hub.create(NAME, is_gated=True).commit(files)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe_of(tmp_path)))
    command = [sys.executable, "-m", "turbolm.cli", "train", "recipe.yaml"]
    environment = {**hub.environment(tmp_path / "home"), "HF_TOKEN": TOKEN}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"turbolm: model.pretrained: {NAME} is gated.")
    assert "Traceback" not in done.stderr
    assert f"Bearer {TOKEN}" in {authorization for *_, authorization in hub.requests}
    assert TOKEN not in done.stdout + done.stderr
    written = [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert not written

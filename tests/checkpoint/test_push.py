"""Exports that are pushed, to a small hub on this machine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from typer.testing import CliRunner

from tests.hub_stub import Hub, serve_hub
from turbolm.checkpoint.export_folder import RECORD, replace_export
from turbolm.checkpoint.push import check_token, push_export
from turbolm.cli import app
from turbolm.errors import UserError
from turbolm.launch.slurm import write_submission
from turbolm.launch.train import train_here
from turbolm.recipe.load import load_recipe

RECIPE = str(Path(__file__).parents[2] / "recipes/quickstart/config.yaml")
TOKEN = "hf_" + "w" * 34
CARD = b"---\ntags: [turbolm]\n---\n# it\n"
FILES = {"config.json": b"{}", "model.safetensors": b"weights" * 1000, "README.md": CARD}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve_hub() as hub:
        hub.writers.add(TOKEN)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield hub


def make_export(folder: Path, files: dict[str, bytes] = FILES) -> Path:
    new = folder.with_name("new")
    new.mkdir(parents=True)
    for name, data in files.items():
        (new / name).write_bytes(data)
    replace_export(folder, new)
    return folder


def on_hub(hub: Hub, name: str) -> dict[str, bytes]:
    repository = hub.repositories[name]
    return repository.commits[repository.branches["main"]]


def refused(export: Path, name: str = "me/it", *, private: bool = False) -> str:
    with pytest.raises(UserError) as caught:
        push_export(export, name, private=private)
    assert "\n" not in str(caught.value) and TOKEN not in str(caught.value)
    return str(caught.value)


def test_what_export_wrote_is_pushed_in_one_commit_and_no_other_file(hub: Hub) -> None:
    export = make_export(Path("run/export"))
    (export / "notes.txt").write_text("my own")
    (export / "README.md").write_bytes(FILES["README.md"] + b"evaluated\n")  # the card may grow
    Path("run/recipe.yaml").touch()
    done = CliRunner().invoke(app, ["push", "run", "me/it", "--private"])
    assert (done.exit_code, done.stdout) == (0, f"pushed to {hub.url}/me/it\n")
    pushed = on_hub(hub, "me/it")
    assert sorted(pushed) == sorted([*FILES, RECORD]) and hub.repositories["me/it"].is_private
    assert pushed["model.safetensors"] == FILES["model.safetensors"] and pushed["README.md"].endswith(b"evaluated\n")
    assert len(hub.repositories["me/it"].commits) == 2, "the empty one and the push"
    record = json.loads(pushed[RECORD])["files"]["model.safetensors"]["sha256"]
    assert record == hashlib.sha256(pushed["model.safetensors"]).hexdigest()


def test_weights_of_an_earlier_push_do_not_stay(hub: Hub) -> None:
    parts = {f"model-0000{number}-of-00002.safetensors": b"part" * number for number in (1, 2)}
    index = {"model.safetensors.index.json": b"{}"}
    push_export(make_export(Path("old"), {**FILES, **parts, **index}), "me/it", private=False)
    hub.repositories["me/it"].commit({**on_hub(hub, "me/it"), "by-hand.md": b"kept"})
    push_export(make_export(Path("new-one")), "me/it", private=False)
    assert sorted(on_hub(hub, "me/it")) == sorted([*FILES, RECORD, "by-hand.md"])


def test_a_cut_push_leaves_nothing_half_and_the_same_command_completes_it(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = make_export(Path("export"))
    monkeypatch.setattr("huggingface_hub.lfs.http_backoff", _once)
    hub.cut_after = 100
    assert "the push to me/it was cut" in refused(export)
    assert on_hub(hub, "me/it") == {} and not hub.large
    push_export(export, "me/it", private=False)
    assert on_hub(hub, "me/it")["model.safetensors"] == FILES["model.safetensors"]


def _once(*arguments: object, **keywords: object) -> object:
    """The library's own retries would wait seconds, and hide the cut."""
    from huggingface_hub.utils import http_backoff

    return http_backoff(*arguments, **{**keywords, "max_retries": 0})  # type: ignore[arg-type]


def test_every_refusal_is_one_line_with_the_cure(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    export = make_export(Path("export"))
    hub.create("me/open").commit({})
    assert refused(export, "me/open", private=True) == (
        "REPO: me/open is public on the hub; make it private there, or push without --private"
    )
    assert on_hub(hub, "me/open") == {}
    assert "expected `name` or `owner/name`" in refused(export, "a/b/c")
    assert "expected the folder of an export" in refused(Path.cwd())
    Path("secret").write_text("of the user")
    (export / "README.md").unlink()
    assert "README.md: missing, or not a plain file" in refused(export)
    (export / "README.md").symlink_to(Path("secret").resolve())
    assert "README.md: missing, or not a plain file" in refused(export)
    assert "me/it" not in hub.repositories, "nothing was created"
    (export / "README.md").unlink()
    (export / "README.md").write_bytes(CARD)
    monkeypatch.setenv("HF_TOKEN", "hf_readonly")
    assert "does not let this token write to me/it" in refused(export)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert "set HF_TOKEN in the environment (never in a recipe)" in refused(export)
    (export / "model.safetensors").write_bytes(b"other")
    assert "model.safetensors changed since the export was written" in refused(export)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="^export.push_to: HF_HUB_OFFLINE is set"):
        check_token("export.push_to")


def test_a_run_that_could_not_push_at_its_end_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    recipe = load_recipe(RECIPE, ["export.push_to=me/it", "cluster.device=cpu", "cluster.slurm={}"])
    with pytest.raises(UserError, match="^export.push_to: pushing to the hub needs a token that may write"):
        train_here(recipe, RECIPE, ())
    with pytest.raises(UserError, match="^export.push_to: pushing to the hub needs a token that may write"):
        write_submission(RECIPE, ["export.push_to=me/it", "cluster.slurm={}"])
    with pytest.raises(UserError, match="export.push_to"):
        load_recipe(RECIPE, ["export.push_to=https://hub/me/it"])

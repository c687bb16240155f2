"""A run directory with links and names that lead out of it: nothing behind them is written or removed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.train.harness import make_recipe
from turbolm.checkpoint import manifest
from turbolm.checkpoint.retention import Retention, remove_old
from turbolm.checkpoint.save import _open_folder
from turbolm.errors import UserError
from turbolm.recipe.load import dump_recipe, load_recipe
from turbolm.train.fork import _Plateau, _write
from turbolm.train.run_directory import RunDirectory, refuse_links_out


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    """What must stay as it is."""
    folder = tmp_path / "precious"
    folder.mkdir()
    (folder / "file").write_text("precious")
    return folder


def make_checkpoint(path: Path, step: int) -> Path:
    path.mkdir(parents=True)
    parts = {"step": step, "tokens_seen": step, "contract": "x", "world_size": 1, "parameters": {}, "files": {}}
    (path / "manifest.json").write_text(json.dumps({"format_version": manifest.FORMAT_VERSION, **parts}))
    return path


def test_retention_never_removes_through_a_link(tmp_path: Path, precious: Path) -> None:
    run = tmp_path / "checkpoints"
    for step in (2, 3, 4):
        make_checkpoint(run / manifest.checkpoint_name(step), step)
    (run / manifest.checkpoint_name(2) / "inner").symlink_to(precious)
    outside = make_checkpoint(precious / "step", 1)
    (run / manifest.checkpoint_name(1)).symlink_to(outside)
    removed = remove_old(run, Retention(keep_last=1), newest_step=4)
    assert [path.name for path in removed] == [manifest.checkpoint_name(step) for step in (2, 3)]
    assert (run / manifest.checkpoint_name(1)).is_symlink()
    assert (outside / "manifest.json").exists() and (precious / "file").read_text() == "precious"


def test_a_link_in_the_place_of_a_checkpoint_is_replaced(tmp_path: Path, precious: Path) -> None:
    run = tmp_path / "checkpoints"
    run.mkdir()
    for name in (".tmp-step-00000005", "step-00000005", ".old-step-00000005"):
        (run / name).symlink_to(precious)
    temporary = manifest.temporary_folder(run, 5)
    _open_folder(temporary)
    manifest.write_json(temporary / "trainer.json", {"step": 5})
    manifest.commit(temporary, run / "step-00000005", {})
    manifest.clear_leftovers(run)
    assert sorted(path.name for path in run.iterdir()) == ["step-00000005"]
    assert not (run / "step-00000005").is_symlink()
    assert [path.name for path in precious.iterdir()] == ["file"]


def test_a_fork_takes_only_what_the_manifest_names(tmp_path: Path, precious: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "step-00000003", 3)
    (checkpoint / "trainer.json").write_text("{}")
    (checkpoint / "link").symlink_to(precious / "file")
    (checkpoint / "folder").mkdir()
    (checkpoint / "evil.pkl").touch()
    content = {**manifest.read_manifest(checkpoint), "files": {"trainer.json": {"bytes": 2, "sha256": ""}}}
    record = {"fingerprint": "", "store_fingerprint": ""}
    content |= {"step": 3, "tokens_seen": 300}
    recipe = make_recipe(tmp_path)
    plateau = _Plateau(checkpoint, RunDirectory(tmp_path), record, content, recipe)
    _write(RunDirectory(tmp_path / "fork"), plateau, recipe, same_documents=True)
    made = sorted(path.name for path in (tmp_path / "fork/checkpoints/step-00000003").iterdir())
    assert made == ["manifest.json", "trainer.json"]


@pytest.mark.parametrize("name", ["../../x", "/etc/x", "..", ".", "a/b", "-x", "", "a" * 101, "x\n"])
def test_the_name_of_a_run_is_no_path(name: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_recipe(make_recipe(tmp_path)).replace("name: cell", f"name: {json.dumps(name)}", 1))
    with pytest.raises(UserError, match=r"recipe\.yaml:1: name: "):
        load_recipe(recipe)


@pytest.mark.parametrize(
    "name", ["checkpoints", "attempts", "metrics.jsonl", "recipe.yaml", "export", "model/config.json", "attempts/7"]
)
def test_a_run_directory_with_a_link_out_of_it_is_refused(name: str, tmp_path: Path, precious: Path) -> None:
    run = RunDirectory(tmp_path / "runs" / "x")
    (run.path / name).parent.mkdir(parents=True)
    (run.path / name).symlink_to(precious)
    with pytest.raises(UserError, match=f"{name} is a link that leads out of the run directory"):
        refuse_links_out(run)
    (run.path / name).unlink()
    (run.path / name).symlink_to(precious / "nowhere")  # would be made on writing
    with pytest.raises(UserError, match="leads out"):
        refuse_links_out(run)
    (run.path / name).unlink()
    (run.path / "there").touch()
    (run.path / name).symlink_to(os.path.relpath(run.path / "there", (run.path / name).parent))
    refuse_links_out(run)


def test_the_run_directory_itself_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk/x/attempts").mkdir(parents=True)
    (tmp_path / "x").symlink_to(tmp_path / "disk/x")
    refuse_links_out(RunDirectory(tmp_path / "x"))
    refuse_links_out(RunDirectory(tmp_path / "new"))

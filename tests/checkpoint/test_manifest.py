"""A checkpoint counts only when every file is what its manifest says, and the newest such one is found."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from turbolm.checkpoint import manifest


def write_checkpoint(folder: Path, step: int) -> Path:
    final = folder / manifest.checkpoint_name(step)
    temporary = folder / f".tmp-{final.name}"
    temporary.mkdir(parents=True)
    (temporary / "fragments-00000.safetensors").write_bytes(f"tensors of step {step}".encode())
    (temporary / "trainer.json").write_text(json.dumps({"step": step}))
    files = {path.name: manifest.describe_file(path) for path in temporary.iterdir()}
    manifest.commit(temporary, final, {"step": step, "files": files})
    return final


def truncate(checkpoint: Path) -> None:
    (checkpoint / "fragments-00000.safetensors").write_bytes(b"tens")


def flip(checkpoint: Path) -> None:
    path = checkpoint / "fragments-00000.safetensors"
    path.write_bytes(path.read_bytes().replace(b"tensors", b"tensorz"))


def remove(checkpoint: Path) -> None:
    (checkpoint / "trainer.json").unlink()


def remove_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()


def garble_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").write_text('{"files": ')


def older_format(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").write_text('{"format_version": 0, "files": {}}')


def link_outside(checkpoint: Path) -> None:
    path = checkpoint / "trainer.json"
    outside = checkpoint.parent / "outside.json"
    outside.write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(outside)


def name_outside(checkpoint: Path) -> None:
    values = json.loads((checkpoint / "manifest.json").read_text())
    values["files"]["../step-00000001/trainer.json"] = values["files"].pop("trainer.json")
    (checkpoint / "manifest.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate, "fragments-00000.safetensors: 4 bytes instead of"),
        (flip, "fragments-00000.safetensors: content changed"),
        (remove, "trainer.json: missing"),
        (remove_manifest, "no manifest.json"),
        (garble_manifest, "cannot be read"),
        (older_format, "not a checkpoint manifest of format"),
        (link_outside, "trainer.json: not a plain file"),
        (name_outside, "not a plain file of the checkpoint"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_with_its_reason(
    damage: Callable[[Path], None], reason: str, tmp_path: Path
) -> None:
    older, newer = write_checkpoint(tmp_path, 1), write_checkpoint(tmp_path, 2)
    assert manifest.find_newest_valid(tmp_path) == (newer, [])
    damage(newer)
    found, rejected = manifest.find_newest_valid(tmp_path)
    assert found == older
    assert len(rejected) == 1 and str(newer) in rejected[0] and reason in rejected[0]
    damage(older)
    assert manifest.find_newest_valid(tmp_path)[0] is None


def test_what_was_not_renamed_into_place_does_not_count(tmp_path: Path) -> None:
    newest = write_checkpoint(tmp_path, 7)
    (tmp_path / ".tmp-step-00000009").mkdir()
    (tmp_path / "step-9").mkdir()
    os.utime(newest, (0, 0))  # the step decides, not the time
    write_checkpoint(tmp_path, 3)
    assert [step for step, _ in manifest.list_checkpoints(tmp_path)] == [3, 7]
    assert manifest.find_newest_valid(tmp_path)[0] == newest
    assert manifest.find_newest_valid(tmp_path / "nothing") == (None, [])


def test_old_ones_go_and_a_step_can_be_saved_again(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        write_checkpoint(tmp_path, step)
    write_checkpoint(tmp_path, 4)
    (tmp_path / ".tmp-step-00000005").mkdir()
    manifest.remove_old(tmp_path, keep_last=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]
    assert manifest.verify_checkpoint(tmp_path / "step-00000004") == []

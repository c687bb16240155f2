"""The newest checkpoint damaged in every way we can think of: passed over with file and reason, or nothing is done."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.canary import assert_it_sings, pickles
from tests.checkpoint.toy import CONTRACT, Engine, one_process, write_checkpoint
from tests.memory_folder import memory_folder
from turbolm.checkpoint.export import export_checkpoint
from turbolm.checkpoint.load import load_checkpoint
from turbolm.checkpoint.verify import find_newest_valid, verify_checkpoint
from turbolm.errors import UserError

TENSORS, INDEX = "fragments-00000.safetensors", "fragments-00000.json"
pytestmark = pytest.mark.chaos


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    with one_process():
        yield


@pytest.fixture(scope="module")
def pair() -> Iterator[Path]:
    """A folder with checkpoints of steps 1 and 2."""
    with memory_folder() as folder:
        write_checkpoint(folder, 1)
        write_checkpoint(folder, 2)
        yield folder


def recompute_manifest(checkpoint: Path) -> None:
    """As a forger would: sizes and hashes of what is there now."""
    path = checkpoint / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"] = {
        file.name: {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        for file in checkpoint.iterdir()
        if file.name != "manifest.json"
    }
    path.write_text(json.dumps(manifest))


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def truncate(checkpoint: Path) -> None:
    os.truncate(checkpoint / TENSORS, (checkpoint / TENSORS).stat().st_size // 2)


def empty(checkpoint: Path) -> None:
    (checkpoint / TENSORS).write_bytes(b"")


def flip_a_bit(checkpoint: Path) -> None:
    content = bytearray((checkpoint / TENSORS).read_bytes())
    content[random.Random(0).randrange(len(content))] ^= 1 << random.Random(1).randrange(8)
    (checkpoint / TENSORS).write_bytes(content)


def remove_a_shard(checkpoint: Path) -> None:
    (checkpoint / TENSORS).unlink()


def take_a_shard_of_another_step(checkpoint: Path) -> None:
    shutil.copy(checkpoint.with_name("step-00000001") / TENSORS, checkpoint / TENSORS)


def take_an_index_of_another_step(checkpoint: Path) -> None:
    shutil.copy(checkpoint.with_name("step-00000001") / INDEX, checkpoint / INDEX)
    recompute_manifest(checkpoint)


def remove_the_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()


def garble_the_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").write_text('{"files": ')


def nest_the_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").write_text("[" * 100_000)


def garble_the_trainer_state(checkpoint: Path) -> None:
    (checkpoint / "trainer.json").write_text("\x00\xff not JSON")
    recompute_manifest(checkpoint)


def forget_the_trainer_state(checkpoint: Path) -> None:
    (checkpoint / "trainer.json").write_text('{"step": 2}')
    recompute_manifest(checkpoint)


def forget_the_order_of_the_data(checkpoint: Path) -> None:
    edit_json(checkpoint / "trainer.json", order_digest=None)
    recompute_manifest(checkpoint)


def forge_the_anomalies(checkpoint: Path) -> None:
    edit_json(checkpoint / "trainer.json", anomalies={"skipped_batches": [3]})
    recompute_manifest(checkpoint)


def forge_the_best_loss(checkpoint: Path) -> None:
    edit_json(checkpoint / "trainer.json", best_eval_loss="low")
    recompute_manifest(checkpoint)


def change_the_contract(checkpoint: Path) -> None:
    edit_json(checkpoint / "manifest.json", contract="f" * 64)


def remove_the_random_state(checkpoint: Path) -> None:
    index = json.loads((checkpoint / INDEX).read_text())
    del index["rng"]
    (checkpoint / INDEX).write_text(json.dumps(index))
    recompute_manifest(checkpoint)


def remove_a_rank(checkpoint: Path) -> None:
    edit_json(checkpoint / "manifest.json", world_size=2)


def group_of(index: dict[str, Any], name: str) -> dict[str, list[int]]:
    """The fragments in an index file that have the state of a parameter."""
    return next(group["fragments"] for group in index["fragments"] if name in group["fragments"])


def remove_a_fragment(checkpoint: Path) -> None:
    index = json.loads((checkpoint / INDEX).read_text())
    del group_of(index, "inner.weight")["inner.weight"]
    (checkpoint / INDEX).write_text(json.dumps(index))
    recompute_manifest(checkpoint)


def shift_a_fragment(checkpoint: Path) -> None:
    index = json.loads((checkpoint / INDEX).read_text())
    group_of(index, "inner.weight")["inner.weight"][0] = 1
    (checkpoint / INDEX).write_text(json.dumps(index))
    recompute_manifest(checkpoint)


def rename_to_a_later_step(checkpoint: Path) -> None:
    checkpoint.rename(checkpoint.with_name("step-00000009"))


def older_format(checkpoint: Path) -> None:
    edit_json(checkpoint / "manifest.json", format_version=1)


def link_outside(checkpoint: Path) -> None:
    shutil.move(checkpoint / TENSORS, checkpoint.parent / "outside")
    (checkpoint / TENSORS).symlink_to(checkpoint.parent / "outside")


def name_outside(checkpoint: Path) -> None:
    values = json.loads((checkpoint / "manifest.json").read_text())
    values["files"]["../step-00000001/trainer.json"] = values["files"].pop("trainer.json")
    (checkpoint / "manifest.json").write_text(json.dumps(values))


def name_an_absolute_file(checkpoint: Path) -> None:
    values = json.loads((checkpoint / "manifest.json").read_text())
    values["files"][str(checkpoint / "trainer.json")] = values["files"].pop("trainer.json")
    (checkpoint / "manifest.json").write_text(json.dumps(values))


def link_the_folder(checkpoint: Path) -> None:
    shutil.move(checkpoint, checkpoint.parent / "outside")
    checkpoint.symlink_to(checkpoint.parent / "outside")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate, f"{TENSORS}: 3308 bytes instead of 6616"),
        (empty, f"{TENSORS}: 0 bytes instead of"),
        (flip_a_bit, f"{TENSORS}: content changed (SHA-256 differs)"),
        (remove_a_shard, f"{TENSORS}: missing"),
        (take_a_shard_of_another_step, f"{TENSORS}: content changed"),
        (take_an_index_of_another_step, f"{INDEX}: not of step 2"),
        (remove_the_manifest, "no manifest.json"),
        (garble_the_manifest, "manifest.json: cannot be read"),
        (nest_the_manifest, "manifest.json: cannot be read"),
        (garble_the_trainer_state, "trainer.json: "),
        (forget_the_trainer_state, "trainer.json: lacks scaler, or has it of another type"),
        (forget_the_order_of_the_data, "trainer.json: lacks order_digest"),
        (forge_the_anomalies, "trainer.json: not a trainer's state: "),
        (forge_the_best_loss, "trainer.json: not a trainer's state: "),
        (change_the_contract, "another learning contract"),
        (remove_the_random_state, f"{INDEX}: the random state of rank 0 is missing"),
        (remove_a_rank, "buffers.safetensors: not of world_size 2, but of '1'"),
        (remove_a_fragment, "0 of 35 elements of inner.weight"),
        (shift_a_fragment, "elements 0 to 1 of inner.weight"),
        (rename_to_a_later_step, "its manifest is of step 2"),
        (older_format, "not a checkpoint manifest of format"),
        (link_outside, f"{TENSORS}: not a plain file"),
        (name_outside, "not a plain file of the checkpoint"),
        (name_an_absolute_file, "not a plain file of the checkpoint"),
        (link_the_folder, "a link"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_damaged_checkpoint_is_passed_over(
    damage: Callable[[Path], None], reason: str, pair: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(pair, folder)
    older, newer = folder / "step-00000001", folder / "step-00000002"
    assert find_newest_valid(folder, {CONTRACT}) == (newer, [])
    damage(newer)
    found, rejected = find_newest_valid(folder, {CONTRACT})
    assert found == older
    assert len(rejected) == 1 and str(folder / "step-0000000") in rejected[0] and reason in rejected[0]
    load_checkpoint(older, Engine(seed=3))
    shutil.rmtree(older)
    assert find_newest_valid(folder, {CONTRACT})[0] is None


@pytest.mark.parametrize("kind", ["pickle", "torch.save", "text"])
@pytest.mark.parametrize("name", [TENSORS, INDEX, "buffers.safetensors", "trainer.json", "manifest.json"])
def test_a_pickle_is_never_executed(name: str, kind: str, pair: Path, tmp_path: Path) -> None:
    folder, canary = tmp_path / "checkpoints", tmp_path / "canary"
    shutil.copytree(pair, folder)
    newer = folder / "step-00000002"
    (newer / name).write_bytes(pickles(canary)[kind])
    if name != "manifest.json":
        recompute_manifest(newer)
    found, rejected = find_newest_valid(folder, {CONTRACT})
    assert found == folder / "step-00000001" and name in rejected[0]
    assert verify_checkpoint(newer)
    for use in (
        lambda: load_checkpoint(newer, Engine()),
        lambda: export_checkpoint(newer, tmp_path, tmp_path / "export", precision="fp32", card=""),
    ):
        with pytest.raises((UserError, ValueError)):
            use()
    assert_it_sings(canary)

"""An export replaces what an export wrote and nothing else, and names no code."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest

from turbolm.checkpoint.export_folder import RECORD, check_replaceable, drop_code, replace_export, update_card
from turbolm.errors import UserError


def write_export(folder: Path, content: str = "{}") -> Path:
    (folder / "sub").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "sub/template.jinja", "README.md"):
        (folder / name).write_text(content)
    return folder


def contents(folder: Path) -> dict[str, bytes | None]:
    found = {}
    for path in [folder, *folder.rglob("*")]:
        found[str(path.relative_to(folder))] = None if path.is_symlink() or path.is_dir() else path.read_bytes()
    return found


def link_a_file(out: Path) -> None:
    shutil.move(out / "model.safetensors", out.parent / "weights")
    (out / "model.safetensors").symlink_to(out.parent / "weights")


def link_the_folder(out: Path) -> None:
    out.rename(out.parent / "elsewhere")
    out.symlink_to(out.parent / "elsewhere")


def be_a_file(out: Path) -> None:
    shutil.rmtree(out)
    out.write_text("notes")


def claim_all(out: Path) -> None:
    """A record of someone else's making."""
    (out / RECORD).write_text('{"files": ["config.json"]}')


CASES: list[tuple[Callable[[Path], object], str]] = [
    (lambda out: (out / "notes.txt").write_text("mine"), "notes.txt"),
    (lambda out: (out / "sub" / "deep.py").write_text("mine"), "sub/deep.py"),
    (lambda out: (out / "model.safetensors").write_text("[]"), "model.safetensors"),  # of the same size
    (lambda out: (out / "config.json").write_text("longer"), "config.json"),
    (lambda out: (out / "broken").symlink_to("nowhere"), "broken"),
    (lambda out: os.unlink(out / RECORD), "README.md, config.json, model.safetensors and 1 more"),
    (lambda out: (out / RECORD).write_text("[" * 100_000), "README.md, config.json, model.safetensors and 2 more"),
    (claim_all, "README.md, config.json, model.safetensors and 2 more"),
    (link_a_file, "model.safetensors"),
    (link_the_folder, "is not a folder but a link"),
    (be_a_file, "is not a folder but a file"),
]


@pytest.mark.parametrize(("change", "named"), CASES)
def test_what_an_export_did_not_write_stays(change: Callable[[Path], object], named: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    replace_export(out, write_export(tmp_path / ".tmp-out"))
    check_replaceable(out)
    change(out)
    before = contents(tmp_path)
    new = write_export(tmp_path / "new", '{"new": 1}')
    with pytest.raises(UserError) as refusal:
        replace_export(out, new)
    assert named in str(refusal.value) and "choose another folder" in str(refusal.value)
    shutil.rmtree(new)
    assert contents(tmp_path) == before


def test_an_export_is_replaced_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    replace_export(out, write_export(tmp_path / "first"))
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / "config.json").write_text("2")
    replace_export(out, tmp_path / "second")
    assert sorted(path.name for path in out.iterdir()) == ["config.json", RECORD]
    (tmp_path / "empty").mkdir()
    replace_export(tmp_path / "empty", write_export(tmp_path / "third"))
    assert (tmp_path / "empty" / "README.md").exists()


@pytest.mark.parametrize("cut_at", range(3))
def test_a_card_whose_update_is_cut_is_still_the_exports(cut_at: int, tmp_path: Path) -> None:
    out = tmp_path / "out"
    replace_export(out, write_export(tmp_path / "new"))
    replace, done = os.replace, list[Path]()

    def cut(source: Path, target: Path) -> None:
        if len(done) == cut_at:
            raise KeyboardInterrupt
        done.append(target)
        replace(source, target)

    with patch("turbolm.files.os.replace", cut), pytest.raises(KeyboardInterrupt):
        update_card(out, "## Evaluation", "## Evaluation\n\nfirst\n")
    check_replaceable(out)
    assert update_card(out, "## Evaluation", "## Evaluation\n\nsecond\n")
    text = (out / "README.md").read_text()
    assert "second" in text and "first" not in text
    check_replaceable(out)
    assert "next" not in (out / RECORD).read_text()


def test_an_export_of_an_earlier_version_is_moved_aside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = write_export(tmp_path / "out")
    (out / "README.md").write_text("Exported with turbolm.")
    (out / "notes.txt").write_text("mine")
    before = contents(out)
    replace_export(out, write_export(tmp_path / "new"))
    assert contents(tmp_path / "out.1") == before
    assert "it is moved to" in capsys.readouterr().err


def test_no_exported_file_names_code(tmp_path: Path) -> None:
    code = {
        "auto_map": {"AutoConfig": "a--b.C"},
        "custom_pipelines": {},
        "trust_remote_code": True,
        "code_revision": "x",
    }
    kept = {"model_type": "llama", "sub": {"size": 1}, "list": [{"a": 1}]}
    planted = {**kept, **code, "sub": {"size": 1, **code}, "list": [{"a": 1, **code}]}
    names = ("config.json", "generation_config.json", "tokenizer_config.json", "processor_config.json")
    for name in names:
        (tmp_path / name).write_text(json.dumps({**planted, "custom_generate": "owner/code"}))
    (tmp_path / "tokenizer.json").write_text(vocabulary := json.dumps({"model": {"vocab": {"auto_map": 1}}}))
    (tmp_path / "modeling.py").write_text("import os")
    drop_code(tmp_path)
    assert [json.loads((tmp_path / name).read_text()) for name in names] == [kept] * 4
    assert (tmp_path / "tokenizer.json").read_text() == vocabulary
    assert not list(tmp_path.rglob("*.py"))

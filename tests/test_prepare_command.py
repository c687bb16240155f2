"""`turbolm prepare` and `turbolm verify` as a user meets them."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from tests.data.conftest import make_texts, write_jsonl
from turbolm import cli
from turbolm.data.prepare import build as prepare_module
from turbolm.data.prepare.progress import Progress, ProgressLine

RECIPE = """\
name: test
model: {{config: {{model_type: llama}}}}
tokenizer: {{train: {{vocab_size: 300}}}}
data:
  seq_len: 64
  sources: [{{type: jsonl, path: {path}}}]
  deduplicate: exact
train: {{budget: 64000, global_batch: 640}}
execution: {{cache_dir: {cache}, prepare_workers: 1}}
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(prepare_module, "SHARD_TEXT_BYTES", 16_000)
    corpus = write_jsonl(tmp_path / "texts.jsonl", [*make_texts(300), "", *make_texts(2)])
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(path=corpus, cache=tmp_path / "cache"))
    return path


def turbolm(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["turbolm", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_stopped_prepare_says_how_to_go_on(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int, code: int
) -> None:
    show, handlers = ProgressLine.__call__, [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    shown: list[Progress] = []

    def stop(line: ProgressLine, progress: Progress) -> None:
        show(line, progress)
        shown.append(progress)
        if len(shown) == 3:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(ProgressLine, "__call__", stop)
    assert turbolm(monkeypatch, "prepare", recipe) == code
    assert shown[-1].stage == "stopping"
    output = capsys.readouterr()
    assert "prepare: stopping; finishing the shards at work" in output.out
    assert "finished shards (" in output.err
    assert "are kept; run the same command again to go on from there." in output.err
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    finished = list((recipe.parent / "cache").rglob("shard-*.json"))
    assert len(finished) >= 3
    assert turbolm(monkeypatch, "prepare", recipe) == 0
    output = capsys.readouterr()
    assert "skipped: 1 empty documents" in output.out
    assert "skipped: 2 duplicate documents" in output.out
    assert all(path.is_file() for path in finished)


def test_verify_names_every_damaged_file(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert turbolm(monkeypatch, "verify", recipe) == 2
    assert "holds no complete token store" in capsys.readouterr().err
    assert turbolm(monkeypatch, "prepare", recipe) == 0
    folder = Path(capsys.readouterr().out.rsplit("token store: ", 1)[1].strip())
    for what in (recipe, folder):
        assert turbolm(monkeypatch, "verify", what) == 0
        assert "intact; " in capsys.readouterr().out
    files = {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    middle = len(files["shard-00002.tokens"]) // 2
    content = bytearray(files["shard-00002.tokens"])
    content[middle] ^= 1
    (folder / "shard-00002.tokens").write_bytes(content)  # edited, in the middle
    (folder / "shard-00003.tokens").write_bytes(files["shard-00003.tokens"][:-2])  # truncated
    (folder / "shard-00000.index").write_bytes(files["shard-00001.index"])  # exchanged
    (folder / "shard-00004.index").unlink()  # missing
    tokenizer = folder / "tokenizer" / "tokenizer.json"
    tokenizer.write_bytes(files["tokenizer.json"].replace(b"true", b"fals"))
    assert turbolm(monkeypatch, "verify", folder) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[1] for line in lines[:-1]] == ["the tokenizer", *(f"shard {n}" for n in (0, 2, 3, 4))]
    for line, name in zip(lines, ("tokenizer.json", *(f"shard-0000{n}" for n in (0, 2, 3, 4))), strict=False):
        assert name in line
    manifest = json.loads(files["manifest.json"])
    manifest["bos_id"] += 1
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert turbolm(monkeypatch, "verify", recipe) == 2
    assert "manifest.json has changed since it was written" in capsys.readouterr().err
    assert turbolm(monkeypatch, "prepare", recipe) == 0
    assert {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == files

"""One rule for every path of a recipe, and what the file system refuses at a start is one line and exit code 2."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.launch.harness import write_recipe
from turbolm.errors import UserError
from turbolm.recipe.document import RecipeError
from turbolm.recipe.load import load_recipe
from turbolm.recipe.paths import expand_path, make_folder
from turbolm.train.run_directory import run_directory

# (what a recipe says, what it means)
MEANS = [
    ("runs", "runs"),
    ("./~", "~"),
    ("~", "/home/é me"),
    ("~/x y", "/home/é me/x y"),
    ("a/~/b", "a/~/b"),
    ("$SCRATCH/x", "/scratch/m e/x"),
    ("${SCRATCH}/x", "/scratch/m e/x"),
    ("x/${DEEP}y", "x/a/by"),
    ("x/$SCRATCH", "x/scratch/m e"),
    ("$DEEP/*.jsonl", "a/b/*.jsonl"),
    ("it costs 5$/x", "it costs 5$/x"),
    ("$there/$SCRATCH", "$there/scratch/m e"),  # a folder of that very name
    ("no $(id) no `id`", "no $(id) no `id`"),
]
REFUSED = [
    ("$NOT_SET/x", "the environment variable NOT_SET is not set"),
    ("x/${NOT_SET}", "the environment variable NOT_SET is not set"),
    ("$EMPTY/x", "the environment variable EMPTY is not set"),
    ("${SCRATCH:-/tmp}/x", r"expected \$\{NAME\}"),
    ("~nobody-has-this-name/x", "no home folder for '~nobody-has-this-name'"),
]
KEYS: dict[str, Any] = {
    "execution.cache_dir": lambda path: {"execution": {"cache_dir": path}},
    "execution.runs_dir": lambda path: {"execution": {"runs_dir": path}},
    "data.sources": lambda path: {"data": {"seq_len": 64, "sources": [{"type": "text", "path": path}]}},
    "tokenizer.path": lambda path: {"tokenizer": {"path": path}},
    "model.pretrained": lambda path: {"model": {"pretrained": path}},
    "model.config_file": lambda path: {"model": {"config_file": path}},
}


@pytest.fixture(autouse=True)
def variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in {"HOME": "/home/é me", "SCRATCH": "/scratch/m e", "DEEP": "a/b", "EMPTY": ""}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NOT_SET", raising=False)
    Path("$there").mkdir()


@pytest.mark.parametrize(("text", "path"), MEANS, ids=[text for text, _ in MEANS])
def test_what_a_path_means(text: str, path: str, tmp_path: Path) -> None:
    assert expand_path(text) == Path(path)
    recipe = load_recipe(write_recipe(tmp_path, execution={"runs_dir": text}))
    assert recipe.execution.runs_dir == text, "the recipe keeps what was written"
    assert run_directory(recipe).path == Path(path) / "tiny"


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize(("text", "reason"), REFUSED, ids=[text for text, _ in REFUSED])
def test_what_means_no_path_is_refused_by_name(text: str, reason: str, key: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=reason) as refusal:
        load_recipe(write_recipe(tmp_path, **KEYS[key](text)))
    assert key in str(refusal.value)


def trouble(kind: str) -> Path:
    """A folder that cannot be written to, of one kind."""
    match kind:
        case "not a directory":
            Path("file").touch()
            return Path("file/inside")
        case "a file of that name":
            Path("file").touch()
            return Path("file")
        case "name too long":
            return Path("new") / ("n" * 300)
        case "dangling link":
            Path("link").symlink_to("nowhere/at/all")
            return Path("link/inside")
        case "links in a circle":
            Path("circle").symlink_to("circle")
            return Path("circle/inside")
        case "no permission":
            Path("closed").mkdir(mode=0o555)
            return Path("closed/inside")
        case _:
            Path(kind).mkdir()
            return Path(kind) / "inside"


KINDS = {
    "not a directory": "a part of the path is a file",
    "a file of that name": "Not a directory",
    "name too long": "choose a shorter name",
    "dangling link": "a link that leads nowhere|check the name",
    "links in a circle": "links lead in a circle",
    "no permission": "this user may not",
    "full": "free some space",
    "read-only": "mounted read-only",
}

# A user without an entry in /etc/passwd, who may read everything: this Python may lie in root's home.
AS_NOBODY = ["setpriv", "--reuid=54321", "--regid=54321", "--clear-groups", "--bounding-set=-all,+dac_read_search"]
AS_NOBODY += ["--inh-caps=-all,+dac_read_search", "--ambient-caps=-all,+dac_read_search"]


def command(kind: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    run = [*(AS_NOBODY if kind == "no permission" else []), sys.executable, "-m", "turbolm.cli", *arguments]
    mounts = {
        "full": "mount -t tmpfs -o size=64k none full && head -c 1M /dev/zero >full/fill 2>/dev/null;",
        "read-only": "mount -t tmpfs -o ro none read-only &&",
    }
    if kind in mounts:
        run = ["unshare", "--mount", "sh", "-c", f'{mounts[kind]} exec "$@"', "sh", *run]
    environment = {**os.environ, "HOME": "/nonexistent"}
    return subprocess.run(run, env=environment, capture_output=True, text=True, timeout=120, check=False)


def tree() -> set[str]:
    """All that is there, but for the cache of models that planning keeps."""
    found = (path.relative_to(Path.cwd()).as_posix() for path in Path.cwd().rglob("*"))
    return {path for path in found if not path.startswith("planned")}


# The others need root's means, or take them away: through the command, below.
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("full", "read-only", "no permission")])
def test_a_folder_that_cannot_be_written_to_is_one_line(kind: str) -> None:
    path = trouble(kind)
    before = tree()
    with pytest.raises(UserError, match=KINDS[kind]) as refusal:
        make_folder(path, "execution.runs_dir")
    assert str(refusal.value).startswith(f"execution.runs_dir: {path} cannot be written: ")
    assert "\n" not in str(refusal.value)
    assert tree() == before, "nothing half-made is left"


@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="mounts, and becomes another user")
@pytest.mark.parametrize(
    ("kind", "verb", "key"),
    [
        ("full", "submit", "runs_dir"),
        ("full", "prepare", "cache_dir"),
        ("read-only", "submit", "runs_dir"),
        ("no permission", "prepare", "cache_dir"),
        ("not a directory", "train", "runs_dir"),
    ],
)
def test_the_command_says_it_in_one_line(kind: str, verb: str, key: str, tmp_path: Path) -> None:
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)  # pytest's folders are closed to others
    path = trouble(kind)
    folders = {"cache_dir": "planned", "runs_dir": "planned", key: str(path), "prepare_workers": 1}
    Path("text.txt").write_text("words " * 500)
    sources = [{"type": "text", "path": "text.txt"}]
    recipe = write_recipe(
        tmp_path, data={"seq_len": 64, "sources": sources}, execution=folders, cluster={"slurm": {}, "device": "cpu"}
    )
    Path("planned").mkdir()
    Path("planned").chmod(0o777)
    before = tree()
    done = command(kind, verb, str(recipe))
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "cannot be written" in line]
    assert f"execution.{key}: {path}" in line or str(path) in line
    assert "Traceback" not in done.stderr
    assert tree() == before, "nothing half-made is left"


def test_processes_that_start_together_make_one_folder(tmp_path: Path) -> None:
    for number in range(50):
        folder, start = tmp_path / f"{number}/cache/stores/a", threading.Barrier(4)

        def make(folder: Path = folder, start: threading.Barrier = start) -> None:
            start.wait()
            make_folder(folder, "execution.cache_dir")

        with ThreadPoolExecutor(4) as pool:
            for one in [pool.submit(make) for _ in range(4)]:
                one.result()
        assert folder.is_dir() and not list(folder.iterdir())

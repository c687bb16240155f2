"""What SECURITY.md says of the source and its dependencies."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

REPOSITORY = Path(__file__).parents[1]
# The first versions without the advisories that reach us: loading with torch.load, and transformers' own loaders.
FLOORS = {"torch": "2.10", "transformers": "5.3"}
FORBIDDEN = {
    "pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "eval", "exec", "os.system", "os.popen",
    "torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "torch.hub.load", "numpy.fromregex", "__import__",
}  # fmt: skip


@cache
def nodes() -> list[tuple[str, ast.AST]]:
    """(file:line, node) of everything in the package."""
    return [
        (f"{path.relative_to(REPOSITORY)}:{getattr(node, 'lineno', 0)}", node)
        for path in sorted((REPOSITORY / "src").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    ]


def calls() -> Iterator[tuple[str, ast.Call]]:
    return ((where, node) for where, node in nodes() if isinstance(node, ast.Call))


def test_nothing_unpickles_evaluates_or_calls_a_shell() -> None:
    found = []
    for where, node in nodes():
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
            found += [where for name in names & FORBIDDEN]
    for where, call in calls():
        if ast.unparse(call.func) in FORBIDDEN:
            found.append(where)
        for keyword in call.keywords:
            given = (keyword.arg, ast.unparse(keyword.value))
            if given in {("shell", "True"), ("allow_pickle", "True"), ("trust_remote_code", "True")}:
                found.append(where)
    assert not found


def test_whatever_reads_a_folder_with_transformers_refuses_its_code() -> None:
    count = 0
    for where, call in calls():
        name = ast.unparse(call.func)
        if re.fullmatch(r"Auto\w+\.from_(pretrained|config)", name):
            count += 1
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            assert given.get("trust_remote_code") == "False", where
            assert name.endswith("from_config") or given.get("local_files_only") == "True", where
            weights = name == "AutoModelForCausalLM.from_pretrained"
            assert not weights or given.get("use_safetensors") == "True", where
        if name == "np.load":
            assert "allow_pickle=False" in ast.unparse(call), where
    assert count >= 6


@pytest.mark.parametrize("name", FLOORS)
def test_the_oldest_versions_allowed_have_no_known_advisories(name: str) -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (needed,) = [one for one in map(Requirement, project["dependencies"]) if one.name == name]
    (lowest,) = [Version(part.version) for part in needed.specifier if part.operator == ">="]
    assert lowest >= Version(FLOORS[name])
    assert Version(version(name)) in needed.specifier or Version(version(name)).local  # torch's local builds, +cpu


def test_every_pinned_package_has_hashes_and_setup_requires_them() -> None:
    lock = (REPOSITORY / "requirements.lock").read_text(encoding="utf-8")
    blocks = re.split(r"^(?=[A-Za-z0-9])", lock, flags=re.MULTILINE)[1:]
    assert len(blocks) > 50
    for block in blocks:
        assert re.match(r"[A-Za-z0-9._-]+==\S+", block), block
        hashes = re.findall(r"--hash=sha256:[0-9a-f]{64}\b", block)
        assert hashes and block.count("--hash") == len(hashes), block
    pins = dict(re.findall(r"^([a-z0-9-]+)==(\S+)", lock, re.MULTILINE))
    assert Version(pins["transformers"]) >= Version(FLOORS["transformers"])
    setup = (REPOSITORY / "launch/setup.sh").read_text(encoding="utf-8")
    for line in setup.splitlines():
        if " -r " in line and "install" in line:
            assert "--require-hashes" in line and "--no-deps" in line, line


def test_the_tests_that_security_md_names_are_there() -> None:
    named = re.findall(r"`(tests/\S+\.py)`", (REPOSITORY / "SECURITY.md").read_text(encoding="utf-8"))
    assert len(set(named)) >= 8
    assert not [name for name in named if not (REPOSITORY / name).is_file()]

"""No text of a recipe reaches a shell as code: 40 payloads in every string field are refused or arrive unchanged."""

from __future__ import annotations

import copy
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel

from turbolm.errors import UserError
from turbolm.launch.slurm import write_submission
from turbolm.recipe.load import RecipeError, load_recipe
from turbolm.recipe.schema import Recipe

from .harness import Shell, make_programs, read_directives, run_script

TOUCH = "touch pwned"
PAYLOADS = [
    f"$({TOUCH})", f"`{TOUCH}`", f"; {TOUCH}", f"& {TOUCH} &", f"| {TOUCH}", f"&& {TOUCH}", f"|| {TOUCH}",
    f"x; {TOUCH}; #", f"\n{TOUCH}\n", f"x\n#SBATCH --wrap='{TOUCH}'", f"\r\n{TOUCH}", f"' ; {TOUCH} ; '",
    f'" ; {TOUCH} ; "', f"'\"'; {TOUCH} #", f'"; {TOUCH}; #', f"'$({TOUCH})'", f'"$({TOUCH})"', f"${{x:=$({TOUCH})}}",
    f"$(({TOUCH}))", f"<({TOUCH})", f">({TOUCH})", "> pwned", ">> pwned", "x > pwned", f"\\$({TOUCH})",
    f"\\`{TOUCH}\\`", f"a\\'; {TOUCH}", f"{{{TOUCH},}}", f"$'\\x3b{TOUCH}'", f"x\0{TOUCH}", f"\x1b]0;{TOUCH}\x07",
    f"!{TOUCH}", f"-c {TOUCH}", f"--wrap={TOUCH}", "-o pwned", "*", "~", "$HOME", "a b  c#d%j%%",
    f"é ☃ \u2028 $({TOUCH})",
]  # fmt: skip

_MODEL = {"model_type": "llama", "hidden_size": 32, "_name_or_path": "text"}
_SLURM = {
    "partition": "p", "account": "a", "qos": "q", "mem": "1G", "gpu_type": "t", "constraint": "c", "exclude": "e",
    "nodelist": "n", "reservation": "r", "dependency": "singleton", "modules": ["m"], "environment": {"NAME": "value"},
    "prepare": {"partition": "p", "account": "a", "qos": "q", "mem": "1G"},
}  # fmt: skip
# Recipes that together have every string field.
LAYOUTS: dict[str, dict[str, Any]] = {
    "files": {
        "name": "n",
        "model": {"config": _MODEL, "config_file": _MODEL},
        "tokenizer": {"path": "t", "revision": "v"},
        "data": {
            "seq_len": 64,
            "sources": [
                {"type": "text", "path": ["p"], "label": "l"},
                {"type": "jsonl", "path": ["p"], "field": "f"},
                {"type": "parquet", "path": ["p"], "field": "f"},
            ],
        },
        "train": {"budget": 64000, "global_batch": 1024},
        "cluster": {"num_nodes": 2, "slurm": _SLURM},
        "execution": {"cache_dir": "c", "runs_dir": "r", "store": "file:///store"},
        "logging": {"project": "p"},
        "evaluation": {
            "tasks": [{"name": "n", "path": "p"}],
            "sets": [{"type": "jsonl", "path": ["p"], "field": "f", "label": "s"}],
        },
        "checkpoint": {"mirror": "file:///mirror"},
        "export": {"push_to": "me/it"},
    }
}
_HUB_SET = {"type": "datasets", "path": "p", "name": "n", "split": "s", "revision": "r", "field": "f", "label": "d"}
LAYOUTS["hub"] = LAYOUTS["files"] | {
    "evaluation": {"sets": [_HUB_SET]},
    "model": {"pretrained": "w", "revision": "v"},
    "data": {
        "seq_len": 64,
        "sources": [{"type": "datasets", "path": "p", "name": "n", "split": "s", "revision": "r", "field": "f"}],
    },
    "cluster": {
        "num_nodes": 2,
        "slurm": _SLURM
        | {"container": {"runtime": "apptainer", "image": "i", "mounts": ["m", "m2"], "python": "python3"}},
    },
}
LAYOUTS["pyxis"] = LAYOUTS["hub"] | {
    "cluster": {
        "num_nodes": 2,
        "slurm": _SLURM | {"container": {"runtime": "pyxis", "image": "i", "mounts": ["m", "m2"], "python": "python3"}},
    }
}
CHOICES = {"type", "runtime", "model_type"}
SHELL_BY_DESIGN = {"cluster.slurm.setup"}


def string_fields(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The dotted names of every field of the schema that holds free text, in a list or a mapping as well."""
    for name, field in model.model_fields.items():
        for kind in _kinds(field.annotation):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from string_fields(kind, f"{prefix}{name}.")
            elif kind is str:
                yield f"{prefix}{name}"


def _kinds(annotation: Any) -> Iterator[Any]:
    origin = get_origin(annotation)
    if origin in (Annotated, tuple, Union, UnionType, dict):
        for part in get_args(annotation)[:1] if origin is Annotated else get_args(annotation):
            yield from _kinds(part)
    else:
        yield annotation


def leaves(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of the strings of a layout that a payload may replace."""
    for key, value in data.items() if isinstance(data, dict) else enumerate(data):
        if isinstance(value, (dict, list)):
            yield from leaves(value, (*path, key))
        elif isinstance(value, str) and key not in CHOICES:
            yield (*path, key)


def replaced(data: Any, path: tuple[Any, ...], payload: str) -> Any:
    data = copy.deepcopy(data)
    at = data
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = payload
    return data


def dotted(path: tuple[Any, ...]) -> str:
    return ".".join(str(key) for key in path if isinstance(key, str))


def test_the_layouts_have_every_string_field() -> None:
    placed = {dotted(path) for layout in LAYOUTS.values() for path in leaves(layout)}
    placed = {path.removesuffix(".NAME").removesuffix("._name_or_path") for path in placed}
    assert set(string_fields(Recipe)) - SHELL_BY_DESIGN == placed
    assert len(PAYLOADS) == 40


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_payloads_are_refused_or_arrive_unchanged(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_programs(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # ~ and $HOME in a path
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    monkeypatch.setattr("turbolm.launch.slurm.check_model", lambda *_: ())  # it would ask that program
    monkeypatch.setattr("turbolm.launch.slurm.check_token", lambda _: None)  # of the hub
    recipe_file = tmp_path / "recipe.yaml"
    num_run = 0
    for payload in PAYLOADS:
        data = LAYOUTS[layout]
        for path in leaves(LAYOUTS[layout]):
            try:
                Recipe.model_validate(replaced(LAYOUTS[layout], path, payload))
            except ValueError:
                continue  # refused, and so it does not come into the recipe that is run
            data = replaced(data, path, payload)
        recipe_file.write_text(yaml.safe_dump(data, allow_unicode=True), encoding="utf-8")
        try:
            submission = write_submission(recipe_file)
        except RecipeError as error:
            raise AssertionError("a valid value does not survive its way through YAML") from error
        except UserError as error:
            if "backslash" not in str(error):
                raise
            # Slurm's own rule for the path of its output: try the rest without it.
            data["execution"]["runs_dir"] = "r"
            recipe_file.write_text(yaml.safe_dump(data, allow_unicode=True), encoding="utf-8")
            submission = write_submission(recipe_file)
        shell = run_script(submission.script, tmp_path)
        num_run += 1
        check_arrived(data, submission.text, shell, tmp_path)
        assert submission.prepare is not None
        check_prepare_job(data, submission.prepare.script, tmp_path)
        assert [path for path in tmp_path.rglob("pwned*") if path.is_file()] == [], payload
        shutil.rmtree(runs_of(data, tmp_path))
    assert num_run == len(PAYLOADS)


@pytest.mark.parametrize("payload", PAYLOADS)
def test_environment_names_are_names(payload: str, tmp_path: Path) -> None:
    data = {**LAYOUTS["files"], "cluster": {"slurm": {"environment": {payload: "x"}}}}
    with pytest.raises(ValueError, match="environment"):
        Recipe.model_validate(data)


def check_prepare_job(data: dict[str, Any], script: Path, folder: Path) -> None:
    """The job before it gets the same values, and runs prepare on the same recipe."""
    slurm = data["cluster"]["slurm"]
    options, shell = read_directives(script.read_text(encoding="utf-8")), run_script(script, folder)
    for key in ("partition", "account", "qos", "mem"):
        assert options[key] == slurm["prepare"][key]
    assert options["exclude"] == slurm["exclude"]
    assert shell.code == 0, shell.stderr
    words, environment = next((words, given) for _, words, given in shell.calls if "prepare" in words)
    assert environment["NAME"] == slurm["environment"]["NAME"]
    assert load_recipe(words[-1]) == load_recipe(folder / "recipe.yaml")
    if "container" in slurm:
        assert slurm["container"]["python"] in words


def runs_of(data: dict[str, Any], folder: Path) -> Path:
    """Where the runs are, by the one rule for paths."""
    return folder / os.path.expanduser(os.path.expandvars(data["execution"]["runs_dir"]))


def check_arrived(data: dict[str, Any], script: str, shell: Shell, folder: Path) -> None:
    """What the programs saw is what the recipe says."""
    slurm = data["cluster"]["slurm"]
    container = slurm.get("container", {})
    options = read_directives(script)
    for key in ("partition", "account", "qos", "mem", "constraint", "exclude", "nodelist", "reservation", "dependency"):
        assert options[key] == slurm[key]
    run = runs_of(data, folder) / data["name"]
    assert options["output"].replace("%%", "\0").replace("%j", "7").replace("\0", "%") == f"{run}/slurm-7.out"
    assert shell.of("module") == [["load", module] for module in slurm["modules"]]
    node = next(call for call in shell.calls if call[0] == "srun" and "turbolm.launch.node" in call[1])
    arguments, environment = node[1], node[2]
    assert environment["NAME"] == slurm["environment"]["NAME"]
    recipe_file = Path(arguments[arguments.index("--recipe") + 1])
    assert recipe_file.is_relative_to(run)
    assert load_recipe(recipe_file) == load_recipe(folder / "recipe.yaml")
    if container:
        assert container["python"] in arguments
        image, mounts = container["image"], container["mounts"]
        if container["runtime"] == "apptainer":
            assert image in arguments
            assert all(mount in arguments for mount in mounts)
        else:
            assert f"--container-image={image}" in arguments
            assert f"--container-mounts={','.join(mounts)}" in arguments

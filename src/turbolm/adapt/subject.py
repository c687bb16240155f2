"""Find the MODEL of `turbolm adapt`: a folder, a config.json, a name on the hub, or a model type."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from turbolm.errors import UserError, did_you_mean
from turbolm.hub import Origin, fetch_settings
from turbolm.plan.count import causal_model_types

Task = Literal["pretrain", "continue"]


@dataclass(frozen=True)
class Subject:
    """A model as the user names it."""

    given: str
    name: str  # of the run, without the task
    model_type: str | None  # when nothing but a type was given
    config_file: Path | None  # the config.json
    pretrained: str | None  # what `model.pretrained` may say: a folder or a hub name
    tokenizer: Path | None  # the folder of its own tokenizer
    revision: str | None  # the commit, of a hub name


def find_subject(given: str, task: Task) -> Subject:
    """Find MODEL; of a hub name, download the configuration and the tokenizer but no weights.

    An existing path comes first, then a model type, then a hub name. Raises UserError.
    """
    path = Path(given).expanduser()
    if path.is_dir() or path.is_file():
        found = _of_path(given, path)
    elif given in causal_model_types():
        found = Subject(given, run_name(given), given, None, None, None, None)
    elif Origin("settings", given, None).is_on_hub and "/" in given:
        folder = fetch_settings(given)
        tokenizer = folder if (folder / "tokenizer.json").is_file() else None
        found = Subject(given, run_name(given), None, folder / "config.json", given, tokenizer, folder.name)
    else:
        hint = did_you_mean(given, causal_model_types()).replace("mean", "mean the type")
        raise UserError(
            f"MODEL: {given!r} is no folder or config.json here (in {Path.cwd()}), no model type for which "
            f"Transformers has a causal language model, and no name on the hub such as owner/name{hint}"
        )
    if task == "continue" and found.pretrained is None:
        raise UserError(f"MODEL: --task continue starts from weights; {given} is no folder and no hub name")
    return found


def _of_path(given: str, path: Path) -> Subject:
    folder = path if path.is_dir() else path.parent
    config = path / "config.json" if path.is_dir() else path
    if not config.is_file():
        raise UserError(f"MODEL: {folder} has no config.json; expected a folder in the Hugging Face layout")
    if path.is_file() and path.suffix != ".json":
        raise UserError(f"MODEL: {path} is no config.json; name the config.json of a model, or its folder")
    name = run_name(path.resolve().name if path.is_dir() else path.resolve().parent.name)
    tokenizer = folder if (folder / "tokenizer.json").is_file() else None
    return Subject(given, name, None, config, as_path(path) if path.is_dir() else None, tokenizer, None)


def as_path(path: Path) -> str:
    """Return a path that cannot be taken for a hub name, wherever the recipe is used."""
    return str(path) if path.is_absolute() or path.parts[:1] == ("..",) else f"./{path}"


def run_name(text: str) -> str:
    """Return a name for a run, made of the last part of a path or a hub name."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", text.rstrip("/").rpartition("/")[2]).strip("._-").lower()
    return name[:80] or "model"

"""Find the profile of a recipe's model: shipped, cached, or traced once in a separate process. Torch-free."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from turbolm.errors import UserError
from turbolm.files import write_atomic
from turbolm.plan.count import answer_file, read_model_config
from turbolm.plan.exchange import read_heads
from turbolm.plan.profile import ModelProfile
from turbolm.recipe.contract import canonical_json
from turbolm.recipe.model_config import is_dropout
from turbolm.recipe.schema import Recipe

# Of the recipes' models, by `profile_key`; `python -m tests.models.record_profiles` writes it.
SHIPPED = Path(__file__).with_name("profiles.json")
_TIMEOUT_SEC = 300
_TRACERS = (
    *(f"models/{name}.py" for name in ("attention", "loss", "meter", "profile", "recompute", "stand_ins")),
    "plan/profile.py",
)


def find_profile(
    config: Mapping[str, Any], dropout: float, cache_dir: str | Path, *, may_trace: bool = True
) -> tuple[ModelProfile | None, str]:
    """Return the profile of the model that `config` describes, or None and why there is none.

    `dropout` is that of the recipe, for settings that `config` does not name. Tracing takes some 20 s and needs torch;
    what it finds, a refusal included, is cached under `cache_dir`. A tracer that does not end is asked again next time.
    """
    profile, why = _find_profile(config, dropout, cache_dir, may_trace)
    return profile and replace(profile, heads=read_heads(config, profile)), why


def _find_profile(
    config: Mapping[str, Any], dropout: float, cache_dir: str | Path, may_trace: bool
) -> tuple[ModelProfile | None, str]:
    if shipped := shipped_profile(config, dropout):
        return shipped, ""
    request = profile_request(config, dropout)
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None:
        return None, "torch and transformers, which trace a model, are not installed here"
    path = answer_file(cache_dir, canonical_json(request), ("torch", "transformers"), _TRACERS, ".profile.json")
    try:
        return _parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        pass
    if not may_trace:
        return None, "not traced yet"
    answer, why = _run_tracer(canonical_json(request))
    if answer is None:
        return None, why
    with suppress(OSError):  # traced again next time
        write_atomic(path, answer)
    return _parse(answer)


def profile_of_run(
    recipe: Recipe, recipe_file: str, vocab_size: int, *, may_trace: bool = False
) -> tuple[ModelProfile | None, str]:
    """Return the profile of the model that a run trains on data of `vocab_size`, or None and why. Never raises."""
    try:
        config, _ = read_model_config(recipe, recipe_file, vocab_size)
        if config is None:
            return None, "its configuration is not on this machine"
        return find_profile(config, recipe.model.dropout, recipe.execution.cache_dir, may_trace=may_trace)
    except (UserError, OSError) as error:
        return None, str(error)


def shipped_profile(config: Mapping[str, Any], dropout: float) -> ModelProfile | None:
    """Return the profile of a shipped recipe's model, or None."""
    found = _shipped().get(profile_key(profile_request(config, dropout)))
    return None if found is None else ModelProfile.from_dict(found)


def profile_request(config: Mapping[str, Any], dropout: float) -> dict[str, Any]:
    """Return what a profile depends on: the configuration, with the recipe's dropout where it names none."""
    return {"config": dict(config), "dropout": 0.0 if any(map(is_dropout, config)) else dropout}


def profile_key(request: Mapping[str, Any]) -> str:
    """Return the key of a shipped profile."""
    return hashlib.sha256(canonical_json(request).encode()).hexdigest()[:16]


@cache
def _shipped() -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(SHIPPED.read_text(encoding="utf-8"))
    except OSError:
        return {}
    return found


def _run_tracer(request: str) -> tuple[str | None, str]:
    """Return the tracer's answer, or None and why there is none."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "turbolm.models.profile"],
            input=request,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_SEC,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None, f"tracing takes more than {_TIMEOUT_SEC} s"
    lines = done.stdout.splitlines()
    if done.returncode == 0 and lines:
        return lines[-1], ""
    last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return None, f"the tracer failed: {last[:300]}"


def _parse(answer: str) -> tuple[ModelProfile | None, str]:
    values = json.loads(answer)
    if "problem" in values:
        return None, str(values["problem"])
    return ModelProfile.from_dict(values), ""

"""Trace the recipes' models and write `plan/profiles.json`: python -m tests.models.record_profiles.

`--missing` keeps the profiles that are there and traces those of new models alone.
"""

from __future__ import annotations

import functools
import json
import sys
from typing import Any

from turbolm.plan.count import read_model_config
from turbolm.plan.profiles import SHIPPED, profile_key, profile_request
from turbolm.recipe.load import load_recipe
from turbolm.shipped import recipes_by_name


@functools.cache
def requests() -> dict[str, dict[str, Any]]:
    """Return what is asked for each model of the shipped recipes, by its key in the file."""
    found = {}
    for path in recipes_by_name().values():
        recipe = load_recipe(path)
        config, _ = read_model_config(recipe, path)
        if config is not None:
            request = profile_request(config, recipe.model.dropout)
            found[profile_key(request)] = request
    return found


def trace(request: dict[str, Any]) -> dict[str, Any]:
    """Return the profile of one request as plain JSON types."""
    from turbolm.models.profile import answer

    profile: dict[str, Any] = json.loads(answer(request))
    assert "problem" not in profile, profile
    return profile


def check(request: dict[str, Any]) -> None:
    """Raise where Transformers refuses the configuration: `turbolm plan` does not ask it about a shipped model."""
    from turbolm.models.count import examine

    answer = examine(request["config"], None)
    assert not answer.problems, answer.problems


if __name__ == "__main__":
    kept = json.loads(SHIPPED.read_text(encoding="utf-8")) if sys.argv[1:] == ["--missing"] else {}
    lines = []
    for key, request in sorted(requests().items()):
        if key not in kept:
            print(f"tracing {request['config']['model_type']}", flush=True)
            check(request)
        profile = json.dumps(kept.get(key) or trace(request), separators=(",", ":"))
        lines.append(f"{json.dumps(key)}: {profile}")
    SHIPPED.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    print(f"{len(lines)} profiles, {SHIPPED.stat().st_size} bytes")

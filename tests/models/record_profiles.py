"""Trace the recipes' models and write `plan/profiles.json`: python -m tests.models.record_profiles."""

from __future__ import annotations

import json
from typing import Any

from turbolm.plan.count import read_model_config
from turbolm.plan.profiles import SHIPPED, profile_key, profile_request
from turbolm.recipe.load import load_recipe
from turbolm.shipped import recipes_by_name


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


if __name__ == "__main__":
    lines = [f"{json.dumps(key)}: {json.dumps(trace(request))}" for key, request in sorted(requests().items())]
    SHIPPED.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    print(f"{len(lines)} profiles, {SHIPPED.stat().st_size} bytes")

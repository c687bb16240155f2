"""The JSON Schema (draft 2020-12) of recipe files, for editors: what each key means and may hold."""

from __future__ import annotations

from typing import Any

from turbolm.recipe.scale import RULES
from turbolm.recipe.schema import Recipe
from turbolm.units import Span

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_BOUNDS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
_EXTENDS = {
    "description": "files that this one extends, relative to it; this file overrides them",
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "items": {"type": "string", "minLength": 1}},
    ],
}
_SCALE = {
    "description": "derive batch, learning rates and weight decay from a tuned recipe of another size; none: do not",
    "anyOf": [
        {
            "type": "object",
            "properties": {
                "from": {"description": "the tuned recipe, relative to this file", "type": "string", "minLength": 1},
                "rules": {
                    "description": "which values to derive; others are suggested by `turbolm plan`",
                    "type": "array",
                    "items": {"enum": list(RULES)},
                    "default": list(RULES),
                },
            },
            "additionalProperties": False,
        },
        {"type": "null"},
    ],
}


def recipe_json_schema() -> dict[str, Any]:
    """The schema of one recipe file.

    A section is not complete in a file that extends another, so no key of a section is required here; loading the
    recipe reports missing keys.
    """
    generated = Recipe.model_json_schema()
    for name, definition in (("", generated), *generated["$defs"].items()):
        if not name.endswith("Source"):
            definition.pop("required", None)
    # A file that extends another may omit the name, so more than one alternative may match.
    for section in ("optimizer", "schedule"):
        generated["properties"][section]["anyOf"] = generated["properties"][section].pop("oneOf")
    generated["properties"] = {"extends": _EXTENDS, "scale": _SCALE, **generated["properties"]}
    schema = {"$schema": _DIALECT, **generated, "title": "turbolm recipe"}
    fixed = _fix(schema)
    assert isinstance(fixed, dict)
    return fixed


def _fix(value: Any) -> Any:
    """Fix pydantic's schema of annotated types.

    Defaults of spans become their text; bounds after a validator get JSON Schema's names. Titles and OpenAPI's
    `discriminator` are removed: they are redundant.
    """
    if isinstance(value, list):
        return [_fix(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"amount", "unit"}:
        return str(Span(**value))
    names = _BOUNDS | ({"minLength": "minItems"} if value.get("type") == "array" else {})
    dropped = {"discriminator"} if "$schema" in value else {"discriminator", "title"}
    return {
        names.get(key, key): _fix(entry)
        for key, entry in value.items()
        if key not in dropped or (key == "title" and isinstance(entry, dict))
    }

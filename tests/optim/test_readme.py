"""The table of src/turbolm/optim/README.md is what the classes of the optimizers say."""

from __future__ import annotations

from pathlib import Path

import turbolm.optim
from turbolm.recipe.optimizers import OPTIMIZERS


def test_the_table_follows_from_the_classes() -> None:
    rows = ["| name | what | package | ZeRO | state, bytes a parameter |", "| --- | --- | --- | --- | --- |"]
    for name, kind in OPTIMIZERS.items():
        stages = "0" if kind.zero_stages == (0,) else f"{kind.zero_stages[0]} to {kind.zero_stages[-1]}"
        what = str(kind.__doc__).split(". ")[0].removesuffix(".")
        package = (kind.package or "torch").replace("_", "-")
        rows.append(f"| `{name}` | {what} | {package} | {stages} | {kind.state_bytes:g} |")
    readme = Path(turbolm.optim.__path__[0], "README.md").read_text(encoding="utf-8")
    assert "\n".join(rows) in readme

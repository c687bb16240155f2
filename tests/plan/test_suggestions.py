"""What a plan says besides: a scaling law's batch and rate, worked out by hand here, and packages to install."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.train.harness import make_recipe
from turbolm.errors import UserError
from turbolm.plan.machine import check_machine, detect_machine, missing_package
from turbolm.plan.suggestions import suggest


def test_the_step_law() -> None:
    """A billion parameters on 100 billion tokens, the point its authors check: in logarithms of ten."""
    suggestion = suggest(10**9, 10**11)
    assert suggestion.lr == pytest.approx(1.79 * 10 ** (-0.713 * 9 + 0.307 * 11))
    assert suggestion.lr == pytest.approx(1.63e-3, rel=0.01)
    assert suggestion.global_batch_tokens == pytest.approx(0.58 * 10 ** (0.571 * 11), abs=1)
    assert not suggestion.is_extrapolated
    assert suggest(10**6, 10**7).is_extrapolated


def test_a_package_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_recipe(tmp_path, optimizer={"name": "lion"})
    assert missing_package(recipe) is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"lion needs the package pytorch_optimizer; .* pip install"):
        check_machine(recipe, detect_machine())
    assert missing_package(make_recipe(tmp_path)) is None

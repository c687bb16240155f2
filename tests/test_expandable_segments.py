"""torch's allocator is configured before torch is imported, and as the user says where the user says it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from turbolm.environment import use_expandable_segments


@pytest.mark.parametrize(
    ("given", "added"),
    [
        ({}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, {}),
        ({"PYTORCH_ALLOC_CONF": ""}, {}),
    ],
)
def test_what_the_user_has_set_stays(given: dict[str, str], added: dict[str, str]) -> None:
    environment = dict(given)
    use_expandable_segments(environment)
    assert environment == given | added


def test_a_rank_started_by_hand_sets_it_before_torch_is_imported() -> None:
    script = """
import os, sys
import turbolm.environment
def seen(environment):
    assert "torch" not in sys.modules, "torch reads it when it is imported"
    print("set")
    raise SystemExit(0)
turbolm.environment.use_expandable_segments = seen
sys.argv = ["turbolm.train", "--recipe", "none.yaml"]
import turbolm.train.__main__ as rank
rank.main()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout == "set\n", done.stderr

"""One Slurm of three nodes for all tests of this folder; they run one after the other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from .cluster import SlurmCluster, missing_requirements, slurm_cluster


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.slurm)


@pytest.fixture(scope="session")
def slurm_machine() -> None:
    """Skip where Slurm cannot run; in CI that is a failure, as nobody would see the skip."""
    reason = missing_requirements()
    if reason and os.environ.get("CI") == "true":
        pytest.fail(f"CI must run the Slurm tests: {reason}", pytrace=False)
    if reason:
        pytest.skip(reason)


@pytest.fixture(scope="session")
def cluster(slurm_machine: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with slurm_cluster(num_nodes=3, root=tmp_path_factory.mktemp("slurm")) as started:
        yield started

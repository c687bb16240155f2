"""What one attempt works with, fixed from its start to its end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TextIO

import torch.distributed as dist

from turbolm.checkpoint.mirror_upload import UploadJob
from turbolm.data.store.token_store import TokenStore
from turbolm.plan.machine import Machine
from turbolm.plan.plan import Plan
from turbolm.recipe.schema import Recipe
from turbolm.reliability.stop import StopRequest
from turbolm.train.run_directory import RunDirectory


@dataclass(frozen=True)
class Context:
    """One start of a run, as one rank sees it."""

    plan: Plan
    run: RunDirectory
    store: TokenStore
    machine: Machine
    group: dist.ProcessGroup | None  # host-side agreements go through it
    stop: StopRequest
    terminal: TextIO
    attempt: int = 0
    upload: UploadJob | None = None  # on rank 0 of a run with `checkpoint.mirror`
    contracts: frozenset[str] = frozenset()  # the fingerprints that this run's checkpoints may have

    @property
    def recipe(self) -> Recipe:
        return self.plan.recipe

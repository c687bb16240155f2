"""Which checkpoints stay once a new one is in place. Torch-free."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from turbolm.checkpoint.manifest import discard, list_checkpoints, read_manifest
from turbolm.errors import UserError


@dataclass(frozen=True)
class Kept:
    """What the manifest of a checkpoint says that decides whether it stays."""

    step: int
    tokens_seen: int
    eval_loss: float | None
    path: Path


@dataclass(frozen=True)
class Retention:
    """What stays: the newest `keep_last`, the first of each span of `keep_every_tokens`, and the best evaluated one."""

    keep_last: int
    keep_every_tokens: float | None = None
    keep_best: bool = False

    def keeps(self, checkpoints: Sequence[Kept]) -> set[Path]:
        """Those of `checkpoints` that stay."""
        by_step = sorted(checkpoints, key=lambda one: one.step)
        kept = {one.path for one in by_step[-self.keep_last :]}
        if self.keep_every_tokens:
            milestones: dict[int, Path] = {}
            for one in by_step:
                milestones.setdefault(int(one.tokens_seen // self.keep_every_tokens), one.path)
            milestones.pop(0, None)  # not one span trained yet
            kept.update(milestones.values())
        evaluated = [one for one in by_step if one.eval_loss is not None]
        if self.keep_best and evaluated:
            kept.add(min(evaluated, key=lambda one: (one.eval_loss, one.step)).path)
        return kept


def remove_old(folder: Path, retention: Retention, newest_step: int) -> list[Path]:
    """Remove the checkpoints that the retention does not keep; returns them.

    `newest_step` is the one just put in place. Later ones were abandoned because they were not valid: they do not
    count, and stay for inspection until the run reaches their step and replaces them. One without a readable manifest,
    or with a manifest of another step, does not count either, nor does a link.
    """
    known = []
    for step, path in list_checkpoints(folder):
        try:
            manifest = read_manifest(path)
        except UserError:
            continue
        if step <= newest_step and manifest["step"] == step and not path.is_symlink():
            known.append(Kept(step, manifest["tokens_seen"], manifest.get("eval_loss"), path))
    kept = retention.keeps(known)
    removed = [one.path for one in known if one.path not in kept]
    for path in removed:
        with contextlib.suppress(OSError):  # the next save tries again
            discard(path)
    return removed

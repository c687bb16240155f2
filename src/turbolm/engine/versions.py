"""Refuse to start with a DeepSpeed or Accelerate that turbolm was not tested with. Imports neither of them."""

from __future__ import annotations

import importlib.metadata

from packaging.requirements import Requirement

from turbolm.errors import UserError

_CHECKED = ("deepspeed", "accelerate")  # turbolm uses private parts of both


def check_versions() -> None:
    """Compare the installed versions with the ranges in turbolm's own metadata. Raises UserError."""
    for requirement in map(Requirement, importlib.metadata.requires("turbolm") or ()):
        if requirement.name not in _CHECKED:
            continue
        installed = importlib.metadata.version(requirement.name)
        if not requirement.specifier.contains(installed, prereleases=True):
            raise UserError(
                f"{requirement.name} {installed} is installed, and turbolm was tested with {requirement.specifier}; "
                f"install one of these: pip install '{requirement}'"
            )

"""No rank outlives its launcher: a killed launcher cannot stop what it started. Torch-free."""

from __future__ import annotations

import ctypes
import signal
import sys

END_WITH_PARENT = "TURBOLM_END_WITH_PARENT"  # set in the environment of ranks that a launcher of ours watches over
_PR_SET_PDEATHSIG = 1  # prctl(2)


def end_with_parent() -> None:
    """Have the kernel kill this process when its parent ends (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

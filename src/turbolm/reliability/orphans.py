"""No rank outlives its launcher: a killed launcher cannot stop what it started. Torch-free."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

from turbolm.reliability.processes import parent_of

LAUNCHER = "TURBOLM_LAUNCHER"  # of ranks that a launcher of ours watches over: the number of its process
_PR_SET_PDEATHSIG = 1  # prctl(2)


def end_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent ends (Linux only); end now if `parent` has ended already."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended between the fork and the call above, which tells of later ends only
            os.kill(os.getpid(), signal.SIGKILL)


def end_with_launcher(launcher: int) -> None:
    """The same in a rank: its parent is `accelerate launch`, which is a child of the process `launcher`."""
    parent = os.getppid()
    end_with_parent(parent if parent_of(parent) in (launcher, None) else -1)  # None: /proc does not tell

"""The GPU of a process, for the threads that touch it."""

from __future__ import annotations

import torch


def use_device(device: torch.device) -> None:
    """Make `device` current for the calling thread; call it before the thread touches a GPU.

    Every thread starts on GPU 0, and pinned memory or a stream would leave a context there, about 0.5 GiB for each
    rank of the host.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)

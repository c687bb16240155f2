"""What a process trains on: its GPU, for the threads that touch it, and its precision as torch names it."""

from __future__ import annotations

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def use_device(device: torch.device) -> None:
    """Make `device` current for the calling thread; call it before the thread touches a GPU.

    Every thread starts on GPU 0, and pinned memory or a stream would leave a context there, about 0.5 GiB for each
    rank of the host.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)

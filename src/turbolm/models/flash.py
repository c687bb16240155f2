"""FlashAttention 3 on Hopper and 4 on Blackwell, where their packages are installed: torch holds version 2 alone."""

from __future__ import annotations

import torch
from torch.nn.attention import activate_flash_attention_impl, restore_flash_attention_impl, varlen

from turbolm.models.attention import varlen_keywords

# By the major number of the compute capability: torch's name of the kernels, and the module that brings them (as torch
# 2.11 to 2.13 have them in torch/nn/attention/_fa3.py and _fa4.py). FA3 runs on Hopper alone; FA4 would run there too.
_NEWER = {9: ("FA3", "flash_attn_interface"), 10: ("FA4", "flash_attn.cute.interface")}
_TOLERANCE = 5e-2  # of bf16 sums, relative to the largest value; another document or head moves them by about 1


def start_kernels(attention: str, device: torch.device) -> str:
    """Return the line that names a run's attention; varlen gets the newest kernels that work on `device`, a GPU."""
    if attention != "varlen":
        return f"attention: {attention}"
    return f"attention: varlen, {activate_newest_flash(device)}"


def activate_newest_flash(device: torch.device) -> str:
    """Have torch's flash kernels (varlen attention, and sdpa without a mask) run the newest ones for this GPU.

    Returns what runs, and why not something newer, for the log. The kernels must give what version 2 gives, forward
    and backward, for documents and grouped heads of a small example: what fails to load, to run or to agree is
    switched off again.
    """
    major, _ = torch.cuda.get_device_capability(device)
    if major not in _NEWER:
        return "FlashAttention 2"
    name, module = _NEWER[major]
    expected = _try_out(device)
    try:
        activate_flash_attention_impl(name)
        problem = _difference(_try_out(device), expected)
    except ModuleNotFoundError as error:
        problem = f"{name} is faster on this GPU, and needs {error.name}, which is not installed"
    except Exception as error:  # the package is built for one torch and one CUDA, and raises whatever it finds first
        problem = f"{module} does not work here: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    if problem is None:
        return f"FlashAttention {name[2:]} ({module})"
    restore_flash_attention_impl(_raise_warn=False)
    return f"FlashAttention 2 ({problem})"


def _try_out(device: torch.device) -> list[torch.Tensor]:
    """Return output and gradients of two documents (40 and 56 tokens), whose 4 heads share 2 of keys and values."""
    generator = torch.Generator(device).manual_seed(0)
    query, key, value = (
        torch.randn(96, heads, 64, device=device, dtype=torch.bfloat16, generator=generator).requires_grad_()
        for heads in (4, 2, 2)
    )
    ends = torch.tensor([0, 40, 96], dtype=torch.int32, device=device)
    output = varlen.varlen_attn(query, key, value, ends, ends, 56, 56, window_size=(-1, 0), **varlen_keywords(4, 2))
    return [output.detach(), *torch.autograd.grad(output.square().sum(), (query, key, value))]


def _difference(found: list[torch.Tensor], expected: list[torch.Tensor]) -> str | None:
    moved = max(
        float((one - other).abs().max() / other.abs().max()) for one, other in zip(found, expected, strict=True)
    )
    return None if moved <= _TOLERANCE else f"its results differ from version 2's by {moved:.1e} of the largest"

"""Which kernels of the execution plan work on a device: one table for recipes, plans and starts. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator

from turbolm.recipe.gpus import BF16_CAPABILITY

_FLASH = ("flash", "varlen")  # FlashAttention 2 and torch's varlen_attn, which holds its kernels
_FLASH_CAPABILITY = BF16_CAPABILITY  # github.com/Dao-AILab/flash-attention: Ampere and later, fp16 and bf16


def kernel_problems(
    attention: str | None,
    loss: str | None,
    *,
    device: str,
    precision: str | None,
    gpu: str | None = None,
    capability: tuple[int, int] | None = None,
) -> Iterator[tuple[str, str]]:
    """(key, what is wrong with it) of all that cannot work on a device.

    `device` is cpu or cuda, `gpu` the name to show. An unknown precision or compute capability rules nothing out.
    """
    if device == "cpu" and attention == "flex":
        yield "execution.attention", "flex cannot train on a CPU (no backward pass in torch); set attention: auto"
    elif attention in _FLASH and device == "cpu":
        yield "execution.attention", f"{attention} needs CUDA, and this is a CPU; set attention: auto"
    elif attention in _FLASH and capability is not None and capability < _FLASH_CAPABILITY:
        yield "execution.attention", f"{attention} needs an Ampere GPU or a later one, got {gpu}; set attention: auto"
    elif attention in _FLASH and precision == "fp32":
        yield "execution.attention", f"{attention} computes in bf16 and fp16, not in fp32; set attention: auto"
    if loss == "liger" and device == "cpu":
        yield "execution.loss", "liger needs CUDA, and this is a CPU; set loss: auto"

"""The GPUs a recipe can name in `cluster.gpu`. One line each; the names stand in `turbolm.recipe.schema.GpuName`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """What the driver calls a GPU, and what it can do."""

    driver_name: str  # part of what nvidia-smi prints; peak FLOP/s are found by it (`turbolm.plan.flops`)
    compute_capability: tuple[int, int]
    memory_gb: int  # as sold; the driver keeps some for itself

    @property
    def memory_bytes(self) -> int:
        """Memory in bytes, taking the maker's GB for GiB, which is how HBM and GDDR are sold."""
        return self.memory_gb * 2**30


# Makers' data sheets; compute capabilities from NVIDIA's table of CUDA GPUs.
GPUS = {
    "A10-24GB": Gpu("A10", (8, 6), 24),
    "A10G-24GB": Gpu("A10G", (8, 6), 24),
    "A100-40GB": Gpu("A100", (8, 0), 40),
    "A100-80GB": Gpu("A100", (8, 0), 80),
    "B200-180GB": Gpu("B200", (10, 0), 180),
    "H100-80GB": Gpu("H100", (9, 0), 80),
    "H200-141GB": Gpu("H200", (9, 0), 141),
    "L4-24GB": Gpu("L4", (8, 9), 24),
    "L40S-48GB": Gpu("L40S", (8, 9), 48),
    "RTX4090-24GB": Gpu("RTX 4090", (8, 9), 24),
    "V100-16GB": Gpu("V100", (7, 0), 16),
    "V100-32GB": Gpu("V100", (7, 0), 32),
}

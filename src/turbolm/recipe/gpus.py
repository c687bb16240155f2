"""The table of known GPUs: name in a recipe, driver name, memory, peak rates and power. Torch-free."""

from __future__ import annotations

import re
from dataclasses import dataclass

BF16_CAPABILITY = (8, 0)  # Ampere is the first generation that multiplies in bf16
FP8_CAPABILITY = (9, 0)  # Hopper is the first that also scales by rows


@dataclass(frozen=True)
class Gpu:
    """A GPU's driver name and capabilities. Peaks are dense, with fp32 accumulation, in TFLOP/s."""

    driver_name: str  # a part of what nvidia-smi prints
    compute_capability: tuple[int, int]
    memory_gb: int  # as sold; the driver reserves some
    half_tflops: float  # bf16 and fp16
    bandwidth: int  # of its memory, in GB/s
    nvlink: int  # in GB/s, of all links, both directions together as sold; 0: PCIe
    watts: int  # thermal design power
    fp8_tflops: float | None = None

    @property
    def memory_bytes(self) -> int:
        """Return the memory in bytes; the vendor's GB is a GiB, which is how HBM and GDDR are sold."""
        return self.memory_gb * 2**30

    @property
    def has_bf16(self) -> bool:
        """Return whether it multiplies in bf16."""
        return self.compute_capability >= BF16_CAPABILITY

    @property
    def has_fp8(self) -> bool:
        """Return whether `train.fp8` works on it."""
        return self.compute_capability >= FP8_CAPABILITY

    def matches(self, device_name: str) -> bool:
        """Return whether a driver's device name is this GPU's, including its memory if the name has it."""
        match = re.search(rf"\b{re.escape(self.driver_name)}\b", device_name)
        if match is None:
            return False
        memory = re.search(r"\b(\d+) ?GB", device_name[: match.start()] + device_name[match.end() :])
        return memory is None or int(memory[1]) == self.memory_gb


# NVIDIA's data sheets, halved where they count sparsity; for GeForce the architecture white papers. The driver names a
# GH200 by its CPU's memory, and its power is that of the module. Bridges between PCIe cards are not counted as NVLink.
# Power is the largest of a GPU's variants. Compute capabilities: developer.nvidia.com/cuda-gpus.
GPUS = {
    "A10-24GB": Gpu("A10", (8, 6), 24, 125, 600, 0, 150),
    "A10G-24GB": Gpu("A10G", (8, 6), 24, 70, 600, 0, 300),
    "A100-40GB": Gpu("A100", (8, 0), 40, 312, 1555, 600, 400),
    "A100-80GB": Gpu("A100", (8, 0), 80, 312, 2039, 600, 400),
    "A800-40GB": Gpu("A800", (8, 0), 40, 312, 1555, 400, 400),
    "A800-80GB": Gpu("A800", (8, 0), 80, 312, 2039, 400, 400),
    "B200-180GB": Gpu("B200", (10, 0), 180, 2250, 8000, 1800, 1000, 4500),
    "B300-270GB": Gpu("B300", (10, 3), 270, 2250, 8000, 1800, 1400, 4500),
    "GB200-186GB": Gpu("GB200", (10, 0), 186, 2500, 8000, 1800, 1200, 5000),
    "GB300-279GB": Gpu("GB300", (10, 3), 279, 2500, 8000, 1800, 1400, 5000),
    "GH200-96GB": Gpu("GH200 480GB", (9, 0), 96, 989, 4000, 900, 1000, 1979),
    "GH200-144GB": Gpu("GH200 144G HBM3e", (9, 0), 144, 989, 4900, 900, 1000, 1979),
    "H20-96GB": Gpu("H20", (9, 0), 96, 148, 4000, 900, 400, 296),
    "H100-80GB": Gpu("H100", (9, 0), 80, 989, 3350, 900, 700, 1979),  # SXM
    "H100-PCIe-80GB": Gpu("H100 PCIe", (9, 0), 80, 756, 2000, 0, 350, 1513),
    "H100-NVL-94GB": Gpu("H100 NVL", (9, 0), 94, 835, 3900, 0, 400, 1671),
    "H200-141GB": Gpu("H200", (9, 0), 141, 989, 4800, 900, 700, 1979),  # SXM
    "H200-NVL-141GB": Gpu("H200 NVL", (9, 0), 141, 836, 4800, 0, 600, 1671),
    "H800-80GB": Gpu("H800", (9, 0), 80, 989, 3350, 400, 700, 1979),
    "L4-24GB": Gpu("L4", (8, 9), 24, 121, 300, 0, 72, 242),
    "L40-48GB": Gpu("L40", (8, 9), 48, 181, 864, 0, 300, 362),
    "L40S-48GB": Gpu("L40S", (8, 9), 48, 362, 864, 0, 350, 733),
    "RTX4090-24GB": Gpu("RTX 4090", (8, 9), 24, 165, 1008, 0, 450, 330),
    "RTX5090-32GB": Gpu("RTX 5090", (12, 0), 32, 209, 1792, 0, 575, 419),
    "V100-16GB": Gpu("V100", (7, 0), 16, 125, 900, 300, 300),
    "V100-32GB": Gpu("V100", (7, 0), 32, 125, 900, 300, 350),
}


def find_gpu(device_name: str | None) -> Gpu | None:
    """Return the GPU with this driver name, by the longest match; None if it is not listed."""
    found = [gpu for gpu in GPUS.values() if gpu.matches(device_name or "")]
    return max(found, key=lambda gpu: len(gpu.driver_name), default=None)


def peak_flops(device_name: str | None, precision: str) -> float | None:
    """Return a GPU's peak FLOP/s in bf16, fp16 or fp8; None if it is not listed or does not support the precision."""
    gpu = find_gpu(device_name)
    if gpu is None or precision not in ("bf16", "fp16", "fp8") or (precision == "bf16" and not gpu.has_bf16):
        return None
    tflops = gpu.fp8_tflops if precision == "fp8" else gpu.half_tflops
    return None if tflops is None else tflops * 1e12

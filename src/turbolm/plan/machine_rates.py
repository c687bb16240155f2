"""How fast a kind of machine is: measured by `turbolm calibrate` and kept in the cache, or assumed. Torch-free."""

from __future__ import annotations

import importlib.metadata
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from turbolm.errors import UserError
from turbolm.files import read_json, write_json
from turbolm.plan.work import Unit
from turbolm.recipe.gpus import GPUS, Gpu, find_gpu, peak_flops
from turbolm.recipe.paths import use_path

VERSION = 2  # of the file
MATRIX_EFFICIENCY = 0.7  # of the data sheet's FLOP/s in large products; 0.6 to 0.8 are usual
# FlashAttention 2 reaches 35% on an H100 (arXiv 2407.08608, section 1) and 50 to 73% on an A100 (arXiv 2307.08691).
ATTENTION_EFFICIENCY = {"ampere": 0.55, "later": 0.35}
MEMORY_EFFICIENCY = 0.85  # of the data sheet's bandwidth, by kernels that only read and write
LINK_EFFICIENCY = 0.8  # of NVLink and of the network
LAUNCH_SEC = 1e-3  # host time to start a layer's kernels, forward and backward: some 120 of 8 us
LOGIT_BYTES = 24  # of a logit: made, read for its maximum and sum, turned into its gradient, partly in fp32
PCIE_BYTES_PER_SEC = 20e9  # between GPUs without NVLink
NETWORK_GBIT_PER_GPU = {"ampere": 200, "later": 400}  # one adapter a GPU, as in NVIDIA's DGX A100 and DGX H100
MESSAGE_SEC = {"node": 3.4e-6, "network": 14e-6}  # one hop of a ring: what NCCL itself assumes (hwLat in its tuning)
OFFLOADED_SEC = 1e-10  # of a byte of an update in host memory: 80 GB/s of a node shared by 8 processes, with PCIe
_CPU_LINK = (1e9, 1e-4)  # gloo between processes of a node, where it was not measured


@dataclass(frozen=True)
class Link:
    """A way between processes: its bandwidth is that which a process's share of a ring sees (NCCL's bus bandwidth)."""

    bytes_per_sec: float
    message_sec: float  # for each hop


@dataclass(frozen=True)
class Rates:
    """Seconds per unit of work on one kind of machine."""

    kind: str
    is_calibrated: bool
    sec_per: Mapping[Unit, float]
    node: Link  # within a node
    network: Link  # between nodes
    errors: tuple[float, float] | None = None  # median and worst relative error of the fit, if calibrated
    date: str | None = None

    @property
    def source(self) -> str:
        """Return where they come from, in words."""
        if not self.is_calibrated:
            return f"not calibrated: assumed for {self.kind}; `turbolm calibrate` measures on one such node"
        return f"calibrated on {self.kind}, {self.date}"


def kind_of(device: str, gpu_name: str | None, precision: str, threads: int, root: Path = Path("/")) -> str:
    """Return what machines of the same speed share: the GPU, or the CPU and its threads per process; and the type."""
    if device == "cuda":
        known = next((name for name, gpu in GPUS.items() if gpu == find_gpu(gpu_name)), None)
        return f"{known or gpu_name or 'GPU'}, {precision}"
    return f"{_cpu_name(root)}, {threads} thread{'s' * (threads > 1)}, {precision}"


def _cpu_name(root: Path) -> str:
    try:
        text = (root / "proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    found = {
        key: match[1].strip()
        for key in ("model name", "cpu family", "model", "CPU part")
        if (match := re.search(rf"^{key}\s*:(.*)$", text, re.MULTILINE))
    }
    name = found.pop("model name", "CPU")
    return " ".join([name, *(f"{key} {value}" for key, value in found.items())])


def rates_file(cache_dir: str, kind: str) -> Path:
    """Return where the rates of a kind of machine are kept."""
    name = re.sub(r"[^a-z0-9]+", "-", kind.lower()).strip("-")
    return use_path(cache_dir, "execution.cache_dir") / "rates" / f"{name}.json"


def keep_rates(cache_dir: str, rates: Rates, measured: Mapping[str, Any]) -> Path:
    """Write the rates, with what they were fitted to. Raises UserError if the folder cannot be written."""
    path = rates_file(cache_dir, rates.kind)
    try:
        write_json(path, {"version": VERSION, "torch": _torch(), **asdict(rates), "measured": measured})
    except OSError as error:
        raise UserError(f"execution.cache_dir: {path} cannot be written: {error.strerror or error}") from None
    return path


def read_rates(cache_dir: str, kind: str) -> Rates | None:
    """Return the kept rates of a kind of machine; None without, or if another version wrote them."""
    found = read_json(rates_file(cache_dir, kind))
    if found is None or found.get("version") != VERSION or found.get("kind") != kind:
        return None
    try:
        return Rates(
            kind=kind,
            is_calibrated=True,
            sec_per={unit: float(value) for unit, value in found["sec_per"].items()},
            node=Link(**found["node"]),
            network=Link(**found["network"]),
            errors=(float(found["errors"][0]), float(found["errors"][1])),
            date=found["date"],
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def _torch() -> str:
    return importlib.metadata.version("torch")


def assumed_rates(gpu_name: str | None, precision: str, gpus_per_node: int) -> Rates | None:
    """Return the rates of a GPU from its data sheet and the efficiencies above; None if it is not listed."""
    gpu = find_gpu(gpu_name)
    peak = peak_flops(gpu_name, precision)
    if gpu is None or peak is None:
        return None
    age = "later" if gpu.has_fp8 else "ampere"
    memory = 1 / (gpu.bandwidth * 1e9 * MEMORY_EFFICIENCY)
    sec_per: dict[Unit, float] = {
        "matrix_flops": 1 / (peak * MATRIX_EFFICIENCY),
        "attention_flops": 1 / (peak * ATTENTION_EFFICIENCY[age]),
        "memory_bytes": memory,
        "logits": LOGIT_BYTES * memory,
        "gradient_bytes": memory,
        "optimizer_bytes": memory,
        "offloaded_bytes": OFFLOADED_SEC,
        "layers": LAUNCH_SEC,
    }
    return Rates(
        kind=kind_of("cuda", gpu_name, precision, 1),
        is_calibrated=False,
        sec_per=sec_per,
        node=node_link(gpu),
        network=network_link(gpu, gpus_per_node),
    )


def measured_link(messages: Mapping[int, float], ranks: int, gpu: Gpu | None) -> Link:
    """Return the link that explains the seconds of all-reduces, by bytes; an assumed one without any."""
    if len(messages) < 2:
        return node_link(gpu) if gpu is not None else Link(*_CPU_LINK)
    small, large = min(messages), max(messages)
    sent = 2 * (ranks - 1) / ranks
    sec_per_byte = max((messages[large] - messages[small]) / (sent * (large - small)), 1e-15)
    left = max(messages[small] - sent * small * sec_per_byte, 0.0)
    return Link(1 / sec_per_byte, left / math.ceil(math.log2(ranks)))


def node_link(gpu: Gpu) -> Link:
    """Return the assumed link between the GPUs of a node."""
    nvlink = gpu.nvlink / 2 * 1e9 * LINK_EFFICIENCY
    return Link(nvlink or PCIE_BYTES_PER_SEC, MESSAGE_SEC["node"])


def network_link(gpu: Gpu, gpus_per_node: int) -> Link:
    """Return the assumed network: all adapters of a node carry the ring, which NVLink may limit."""
    adapter = NETWORK_GBIT_PER_GPU["later" if gpu.has_fp8 else "ampere"] / 8 * 1e9 * LINK_EFFICIENCY
    return Link(min(adapter * gpus_per_node, node_link(gpu).bytes_per_sec), MESSAGE_SEC["network"])

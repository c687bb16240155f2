"""What a machine offers is read from /proc, /sys and nvidia-smi; what a recipe's `auto` means follows from it."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from turbolm.errors import UserError
from turbolm.plan.machine import (
    Machine,
    check_machine,
    described_machine,
    detect_machine,
    resolve_device,
    resolve_precision,
    resolve_processes_per_node,
)
from turbolm.recipe.gpus import GPUS, find_gpu, peak_flops
from turbolm.recipe.schema import Recipe

CPU = Machine(num_gpus=0, gpu_name=None, gpu_compute_capability=None, num_cpus=8, cpu_has_bf16=True, memory_bytes=2**34)
H100 = replace(CPU, num_gpus=8, gpu_name="NVIDIA H100", gpu_compute_capability=(9, 0))
V100 = replace(H100, gpu_name="Tesla V100", gpu_compute_capability=(7, 0))


def recipe(**sections) -> Recipe:
    base = {
        "name": "tiny",
        "model": {"config": {"model_type": "llama"}},
        "tokenizer": {"train": {}},
        "data": {"seq_len": 64},
        "train": {"budget": 1000, "global_batch": 128} | sections.pop("train", {}),
    }
    return Recipe.model_validate(base | sections)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine without limits: 16 GiB and an x86 processor without bf16."""
    for name, text in {
        "proc/cpuinfo": "processor\t: 0\nflags\t\t: fpu avx2 avx512f\n",
        "proc/meminfo": "MemTotal:       16777216 kB\nMemFree: 1 kB\n",
        "proc/self/cgroup": "0::/job/step\n",
    }.items():
        put(tmp_path, name, text)
    return tmp_path


@pytest.fixture(autouse=True)
def no_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def put(root: Path, name: str, text: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)


def fake_nvidia_smi(root: Path, query: str, listing: str = "", code: int = 0) -> None:
    script = f"""#!/bin/sh
case $1 in
    -L) printf '%s' '{listing}' ;;
    *) printf '%s' '{query}'; exit {code} ;;
esac
"""
    put(root, "bin/nvidia-smi", script)
    (root / "bin/nvidia-smi").chmod(0o755)


def test_a_plain_machine(root):
    machine = detect_machine(root)
    assert (machine.num_gpus, machine.gpu_name, machine.gpu_compute_capability) == (0, None, None)
    assert machine.num_cpus == len(os.sched_getaffinity(0))
    assert machine.memory_bytes == 16 * 2**30
    assert not machine.cpu_has_bf16


@pytest.mark.parametrize("line", ["flags\t: fpu avx512_bf16", "flags : amx_bf16 amx_tile", "Features\t: fp asimd bf16"])
def test_processors_with_bf16(root, line):
    put(root, "proc/cpuinfo", f"processor : 0\n{line}\n")
    assert detect_machine(root).cpu_has_bf16


def test_limits_of_any_control_group_above_hold(root):
    put(root, "sys/fs/cgroup/job/cpu.max", "100000 100000\n")
    put(root, "sys/fs/cgroup/job/step/cpu.max", "max 100000\n")
    put(root, "sys/fs/cgroup/job/memory.max", f"{2**30}\n")
    put(root, "sys/fs/cgroup/memory.max", "max\n")
    machine = detect_machine(root)
    assert machine.num_cpus == 1
    assert machine.memory_bytes == 2**30


def test_gpus_by_nvidia_smi(root):
    fake_nvidia_smi(root, "NVIDIA H100 80GB HBM3, 9.0\nNVIDIA H100 80GB HBM3, 9.0\n")
    machine = detect_machine(root)
    assert (machine.num_gpus, machine.gpu_name) == (2, "NVIDIA H100 80GB HBM3")
    assert machine.gpu_compute_capability == (9, 0)


@pytest.mark.parametrize(
    ("visible", "count"),
    [("", 0), ("-1", 0), ("1", 1), ("0,1", 2), ("0, 1", 2), ("0,7", 1), ("1,-1,0", 1), ("GPU-abc,GPU-def", 2)],
)
def test_cuda_visible_devices_is_respected(root, monkeypatch, visible, count):
    fake_nvidia_smi(root, "A100, 8.0\nA100, 8.0\n")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert detect_machine(root).num_gpus == count


def test_an_old_driver_tells_the_number_only(root):
    fake_nvidia_smi(root, 'Field "compute_cap" is not a valid field', listing="GPU 0: V100\nGPU 1: V100\n", code=2)
    machine = detect_machine(root)
    assert (machine.num_gpus, machine.gpu_compute_capability) == (2, None)


def test_gpus_without_nvidia_smi_are_counted_by_their_devices(root):
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        put(root, f"dev/{name}", "")
    assert detect_machine(root).num_gpus == 2


def test_device_follows_the_gpus():
    assert resolve_device(recipe(), CPU) == "cpu"
    assert resolve_device(recipe(), H100) == "cuda"
    assert resolve_device(recipe(cluster={"device": "cpu"}), H100) == "cpu"
    with pytest.raises(UserError, match=r"cluster\.device"):
        resolve_device(recipe(cluster={"device": "cuda"}), CPU)


def test_processes():
    assert resolve_processes_per_node(recipe(), H100, "cuda") == 8
    assert resolve_processes_per_node(recipe(), CPU, "cpu") == 2
    assert resolve_processes_per_node(recipe(), replace(CPU, num_cpus=1), "cpu") == 1
    assert resolve_processes_per_node(recipe(cluster={"processes_per_node": 3}), CPU, "cpu") == 3
    with pytest.raises(UserError, match="only 8 GPUs"):
        resolve_processes_per_node(recipe(cluster={"processes_per_node": 9}), H100, "cuda")


@pytest.mark.parametrize(
    ("machine", "device", "stage", "precision"),
    [
        (CPU, "cpu", 2, "bf16"),
        (replace(CPU, cpu_has_bf16=False), "cpu", 2, "fp32"),
        (H100, "cuda", 3, "bf16"),
        (H100, "cuda", 0, "fp32"),
        (V100, "cuda", 2, "fp32"),
        (replace(V100, gpu_compute_capability=None), "cuda", 2, "fp32"),
    ],
)
def test_auto_precision(machine, device, stage, precision):
    assert resolve_precision(recipe(execution={"zero_stage": stage}), machine, device) == precision


def test_a_precision_that_cannot_work_is_refused():
    bf16, fp16 = recipe(train={"precision": "bf16"}), recipe(train={"precision": "fp16"})
    assert resolve_precision(bf16, CPU, "cpu") == "bf16"
    assert resolve_precision(fp16, V100, "cuda") == "fp16"
    with pytest.raises(UserError, match=r"capability 8\.0"):
        resolve_precision(bf16, V100, "cuda")
    with pytest.raises(UserError, match="needs a GPU"):
        resolve_precision(fp16, CPU, "cpu")


A100_NODES = {"cluster": {"gpu": "A100-80GB", "gpus_per_node": 8}}


def test_a_described_cluster_needs_no_machine():
    machine = described_machine(recipe(**A100_NODES))
    assert machine is not None
    assert (machine.num_gpus, machine.gpu_compute_capability) == (8, (8, 0))
    assert resolve_device(recipe(**A100_NODES), machine) == "cuda"
    assert resolve_precision(recipe(**A100_NODES), machine, "cuda") == "bf16"
    assert described_machine(recipe()) is None
    assert described_machine(recipe(cluster=A100_NODES["cluster"] | {"device": "cpu"})) is None


def test_every_gpu_that_a_recipe_can_name_is_known():
    for name, gpu in GPUS.items():
        described = described_machine(recipe(cluster={"gpu": name, "gpus_per_node": 8}))
        assert described is not None
        check_machine(recipe(cluster={"gpu": name, "gpus_per_node": 8}), described)
        assert peak_flops(described.gpu_name, "fp16") == gpu.half_tflops * 1e12
        assert name.endswith(f"-{gpu.memory_gb}GB")


@pytest.mark.parametrize(
    ("device_name", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100-80GB"),
        ("NVIDIA H100 PCIe", "H100-PCIe-80GB"),
        ("NVIDIA H100 NVL", "H100-NVL-94GB"),
        ("NVIDIA H200", "H200-141GB"),
        ("NVIDIA GH200 480GB", "GH200-96GB"),
        ("NVIDIA GH200 144G HBM3e", "GH200-144GB"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("NVIDIA A100 80GB PCIe", "A100-80GB"),
        ("NVIDIA A800-SXM4-80GB", "A800-80GB"),
        ("NVIDIA B300 SXM6 AC", "B300-270GB"),
        ("NVIDIA GB200", "GB200-186GB"),
        ("NVIDIA A10G", "A10G-24GB"),
        ("NVIDIA L40S", "L40S-48GB"),
        ("Tesla V100-SXM2-32GB", "V100-32GB"),
        ("NVIDIA GeForce RTX 5090", "RTX5090-32GB"),
        ("NVIDIA H100X", None),
        (None, None),
    ],
)
def test_a_gpu_is_found_by_what_the_driver_calls_it(device_name, name):
    assert find_gpu(device_name) == (name and GPUS[name])


def test_a_peak_is_of_a_precision():
    assert peak_flops("NVIDIA H100 80GB HBM3", "bf16") == 989e12
    assert peak_flops("NVIDIA H100 80GB HBM3", "fp8") == 1979e12
    assert peak_flops("NVIDIA H100 80GB HBM3", "fp32") is None
    assert peak_flops("Tesla V100-SXM2-32GB", "fp16") == 125e12
    assert peak_flops("Tesla V100-SXM2-32GB", "bf16") is None


@pytest.mark.parametrize("name", ["NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe", None])
def test_a_node_as_described(name):
    check_machine(recipe(**A100_NODES), replace(H100, gpu_name=name))


@pytest.mark.parametrize(
    ("machine", "message"),
    [
        (replace(H100, gpu_name="NVIDIA A100-SXM4-80GB", num_gpus=4), "gpus_per_node is 8, but 4 GPUs are visible"),
        (CPU, "gpus_per_node is 8, but 0 GPUs are visible"),
        (replace(H100, gpu_name="NVIDIA A100-SXM4-40GB"), "A100-80GB, but this node has NVIDIA A100-SXM4-40GB"),
        (H100, "A100-80GB, but this node has NVIDIA H100"),
        (replace(H100, gpu_name="NVIDIA A10"), "but this node has NVIDIA A10;"),
    ],
)
def test_a_node_that_is_not_as_described(machine, message):
    with pytest.raises(UserError, match=message):
        check_machine(recipe(**A100_NODES), machine)
    check_machine(recipe(), machine)
    check_machine(recipe(cluster=A100_NODES["cluster"] | {"device": "cpu"}), machine)

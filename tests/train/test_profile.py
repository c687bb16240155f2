"""A profile says where the time of steps goes, and changes nothing else."""

from __future__ import annotations

import gzip
import inspect
import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.train.harness import make_recipe, train_in_world
from turbolm.data.prepare.build import prepare
from turbolm.files import read_json
from turbolm.recipe.schema import Recipe
from turbolm.train import profile as profile_module
from turbolm.train.profile import _record_memory, profiled
from turbolm.train.trace import WAIT, classify, read_trace, summarize

GPU_TRACE = Path(__file__).parents[1] / "fixtures" / "gpu_trace.json"

# Names as traces of torch 2.11 to 2.13 have them, on CPUs and on A100, H100 and B200.
KNOWN = {
    "matrix products": (
        "aten::addmm", "aten::mm", "aten::bmm", "aten::linear", "aten::_scaled_mm",
        "ampere_bf16_s16816gemm_bf16_128x256_ldg8_f2f_stages_64x3_tn", "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n",
        "nvjet_tst_128x256_64x4_1x2_h_bz_coopB_TNT", "void cublasLt::splitKreduce_kernel<32, 16, int, float>",
        "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x128_32x3_nn_align8>",
        "void gemv2T_kernel_val<int, int, __nv_bfloat16>", "triton_tem_fused_addmm_relu_3",
    ),
    "attention": (
        "aten::scaled_dot_product_attention", "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
        "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd_kernel_traits<64>>",
        "void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnFwdSm90<flash::CollectiveMainloopFwdSm90>>>",
        "fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel)",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_6_64x128x128_4x1x1_kernel0_0",
        "triton_tem_fused_flex_attention_backward_2",
    ),
    "communication": (
        "c10d::allreduce_", "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
        "ncclKernel_ReduceScatter_Sum_f32", "nccl:all_gather", WAIT,
    ),
    "optimizer": (
        "Optimizer.step#AdamW.step", "aten::_fused_adamw_",
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor<float, 4>>",
    ),
    "other operators": (
        "aten::mul", "aten::_softmax", "autograd::engine::evaluate_function: MmBackward0",
        "triton_poi_fused_mul_silu_1",
        "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16>>",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in KNOWN.items() for name in names])
def test_kernels_and_operators_are_known_by_name(kind: str, name: str) -> None:
    assert classify(name) == kind


def test_each_moment_of_a_gpu_counts_once() -> None:
    """By hand, in microseconds of 1000: product 1000-1050, attention 1050-1200, a product of Muon 1200-1300, an
    element-wise kernel 1300-1500 that hides half of a reduction until 1600, a copy until 1650 of which 10 are hidden, a
    gather from 1900 to the end. The host waits from 1300 to 1550; what another thread waits for does not count."""
    found = summarize(json.loads(GPU_TRACE.read_text())["traceEvents"])
    assert (found.num_steps, found.step_sec, found.on_gpu) == (2, 500e-6, True)
    expected = {
        "optimizer": 0.10, "attention": 0.15, "matrix products": 0.05, "communication": 0.30, "other operators": 0.10,
        "copies": 0.05, "idle": 0.25,
    }  # fmt: skip
    assert found.shares == pytest.approx(expected)
    assert (found.communication, found.host_waits) == pytest.approx((0.30, 0.25))


def test_hidden_communication_is_told_apart() -> None:
    events = json.loads(GPU_TRACE.read_text())["traceEvents"]
    product = next(event for event in events if event["name"].startswith("nvjet_hsh_128"))
    found = summarize([*events, {**product, "ts": 1400, "dur": 150}])  # now 150 of the 300 are behind a product
    assert found.shares["communication"] == pytest.approx(0.15)
    assert "hidden communication 15.0%; the host waits 25.0% of the time" in str(found)


def test_on_a_cpu_the_main_thread_counts_and_the_outermost_name() -> None:
    def event(name: str, start: float, end: float, thread: int = 1, cat: str = "cpu_op") -> dict[str, Any]:
        return {"ph": "X", "cat": cat, "name": name, "tid": thread, "ts": start, "dur": end - start}

    found = summarize(
        [
            event("ProfilerStep#7", 0, 100, cat="user_annotation"),
            event("autograd::engine::evaluate_function: AddmmBackward0", 0, 40),
            event("aten::mm", 10, 30),
            event("aten::scaled_dot_product_attention", 40, 55),
            event("aten::bmm", 42, 50),  # of the attention
            event("Optimizer.step#Muon.step", 60, 70, cat="user_annotation"),
            event("aten::mm", 61, 69),  # of the optimizer
            event(WAIT, 80, 90, cat="user_annotation"),
            event("aten::mm", 70, 80, thread=2),
        ]
    )
    shares = {"optimizer": 0.1, "attention": 0.15, "matrix products": 0.2, "communication": 0.1, "copies": 0}
    assert found.shares == pytest.approx({**shares, "other operators": 0.2, "host": 0.25})
    with pytest.raises(ValueError, match="the trace has no step"):
        summarize([event("aten::mm", 0, 1)])


class FakeSession:
    """Ten steps without a model, which multiply matrices."""

    def __init__(self, folder: Path, *, step: int = 0, profile: dict[str, Any] | None = None):
        recipe = make_recipe(folder, logging={"profile": {"at": "4 steps", "steps": 2, **(profile or {})}})
        steps_for = lambda tokens: -(-tokens // recipe.train.global_batch)  # noqa: E731
        self.plan = SimpleNamespace(
            recipe=recipe, num_steps=10, curriculum=SimpleNamespace(steps_for=steps_for), evaluate_every_steps=6,
            checkpoint_every_steps=9,
        )  # fmt: skip
        self.engine = SimpleNamespace(device=torch.device("cpu"))
        self.context = SimpleNamespace(run=SimpleNamespace(attempt=lambda number: folder), attempt=1)
        self.said: list[str] = []
        self.log = SimpleNamespace(say=self.said.append, reset_clock=lambda: None)
        self.step = step
        self.matrices = torch.ones(300, 300)

    def train(self, until: int = 10) -> None:
        for batch in profiled(self, iter(range(self.step, 10))):  # type: ignore[arg-type]
            if batch == until:
                break
            self.matrices @ self.matrices
            self.step += 1

    def profiled_products(self, folder: Path) -> int:
        return sum(event["name"] == "aten::mm" for event in read_trace(folder / "profile" / "rank0.trace.json.gz"))


@pytest.fixture
def rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)


@pytest.mark.usefixtures("rank_0")
@pytest.mark.parametrize(("resumed_at", "evaluates"), [(0, True), (7, False)])
def test_the_steps_after_at_are_traced_or_the_first_after_a_resume(
    tmp_path: Path, resumed_at: int, evaluates: bool
) -> None:
    session = FakeSession(tmp_path, step=resumed_at)
    session.train()
    assert session.profiled_products(tmp_path) == 2
    assert len(session.said) == 1 and session.said[0].startswith("profile: 2 steps of ")
    assert ("with an evaluation" in session.said[0]) == evaluates  # after step 6, the second one
    assert ("a checkpoint" in session.said[0]) != evaluates  # after step 9


@pytest.mark.usefixtures("rank_0")
def test_what_goes_wrong_costs_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "profile").write_text("a file where the folder belongs")
    session, wait = FakeSession(tmp_path), torch.distributed.Work.wait
    session.train()
    assert session.step == 10
    assert len(session.said) == 1 and session.said[0].startswith("profile: failed: FileExistsError")
    assert torch.distributed.Work.wait is wait
    late = FakeSession(tmp_path, profile={"at": "9 steps"})
    late.train()
    assert late.said == ["profile: does not run: it would end with step 11, and the run has 10"]
    stopped = FakeSession(tmp_path)
    stopped.train(until=5)
    assert stopped.said == ["profile: has not ended: the run stopped before"]
    monkeypatch.setattr(profile_module, "summarize", lambda events: 1 / 0)
    (tmp_path / "profile").unlink()
    broken = FakeSession(tmp_path)
    broken.train()
    assert broken.step == 10 and broken.said[0].startswith("profile: failed: ZeroDivisionError")


def test_memory_is_recorded_with_arguments_that_torch_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its function is private and takes anything; what it passes them to says what it accepts."""
    accepted = inspect.signature(torch.cuda.memory._record_memory_history_impl)
    calls: list[dict[str, Any]] = []
    record = lambda *args, **keywords: calls.append(accepted.bind(*args, **keywords).arguments)  # noqa: E731
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", record)
    _record_memory()
    assert calls[0]["enabled"] == "all"
    assert callable(torch.cuda.memory._dump_snapshot)


def test_a_profiled_run_learns_bit_for_bit_the_same(tmp_path: Path) -> None:
    """Two ranks: losses and gradient norms of every step, and the SHA-256 of every file of the last checkpoint."""
    recipe = make_recipe(tmp_path, logging={"sample_tokens": 0}, checkpoint={"every": "100%"})
    prepare(recipe)
    outcomes = {}
    for name, profile in (("plain", None), ("profiled", {"at": "3 steps", "steps": 2})):
        logging = recipe.logging.model_dump(mode="json") | {"profile": profile}
        own = Recipe.model_validate(recipe.model_dump(mode="json") | {"name": name, "logging": logging})
        assert train_in_world(own) == 0
        run = tmp_path / "runs" / name
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses = [(line["step"], line["train/loss"], line["train/grad_norm"]) for line in lines if "train/loss" in line]
        files = (read_json(run / "checkpoints" / "step-00000010" / "manifest.json") or {})["files"]
        weights = {name: about for name, about in files.items() if name.endswith(".safetensors")}
        assert len(losses) == 10 and weights
        outcomes[name] = losses, weights
    assert outcomes["plain"] == outcomes["profiled"]
    attempt = tmp_path / "runs" / "profiled" / "attempts" / "1"
    for rank in range(2):
        found = summarize(read_trace(attempt / "profile" / f"rank{rank}.trace.json.gz"))
        assert found.num_steps == 2 and sum(found.shares.values()) == pytest.approx(1)
        assert all(found.shares[kind] > 0 for kind in ("matrix products", "attention", "optimizer", "communication"))
        assert read_json(attempt / "profile" / f"rank{rank}.summary.json") == asdict(found)
        assert "profile: 2 steps of " in (attempt / f"log.rank{rank}.txt").read_text()
    with gzip.open(attempt / "profile" / "rank0.trace.json.gz") as file:
        assert WAIT.encode() in file.read()

"""Time and price of a plan, against values computed by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from turbolm.plan.estimate import COMPILED, cut, estimate, step_work
from turbolm.plan.machine import described_machine
from turbolm.plan.machine_rates import (
    Link,
    Rates,
    assumed_rates,
    keep_rates,
    kind_of,
    measured_link,
    rates_file,
    read_rates,
)
from turbolm.plan.parameters import head_dim_of
from turbolm.plan.plan import Plan, build_plan
from turbolm.plan.profile import Activations, Cost, Heads, LayerKind, ModelProfile, Peak, Tensor
from turbolm.plan.time import OVERLAP, Exchange, StepWork, bill, exchange_sec, step_time, time_lines
from turbolm.plan.work import Shape, head_amounts, micro_batch_amounts
from turbolm.recipe.load import load_recipe

RECIPE = Path(__file__).parents[2] / "recipes/llama3.1-8b/pretrain/config.yaml"
UNIT_RATES = Rates(
    kind="test",
    is_calibrated=True,
    sec_per={"matrix_flops": 1e-12, "attention_flops": 2e-12, "memory_bytes": 1e-9, "layers": 1e-3},
    node=Link(100e9, 1e-6),
    network=Link(10e9, 1e-5),
    errors=(0.01, 0.05),
    date="2026-01-01",
)


def activations(mode: str, kernel: str = "flash", backward: float = 30.0) -> Activations:
    return Activations(mode, kernel, 2, Cost(0), Peak(()), Cost(10.0), Cost(backward))  # type: ignore[arg-type]


def small_profile() -> ModelProfile:
    """Two layers of one 8 x 4 matrix, a head of 16 x 4."""
    tensors = (
        Tensor("embed", (16, 4), "embedding"),
        *(Tensor(f"layers.{number}.weight", (8, 4), "matrix") for number in range(2)),
        Tensor("norm", (4,), "vector"),
        Tensor("head", (16, 4), "head"),
    )
    ways = (activations("none"), activations("full", backward=40.0), activations("selective", backward=38.0))
    layer = LayerKind("full_attention", 2, 32, "full", None, 64.0, 32.0, ways)
    return ModelProfile(
        "llama", tensors, 0, False, 128.0, (layer,), (activations("none"), activations("none", "sdpa")), (), {}
    )


def work_of(recomputation: str) -> dict[str, float]:
    shape = Shape(100, 10, "flash", 2, 4, (10,), recomputation)  # type: ignore[arg-type]
    return dict(micro_batch_amounts(small_profile(), shape))


def test_amounts_of_a_micro_batch_are_those_counted_by_hand() -> None:
    found = work_of("none")
    assert found["matrix_flops"] == 3 * 100 * 2 * (2 * 32 + 64), "forward 2 FLOPs a weight, backward twice that"
    pairs = 100 * 5.5  # documents of 10 tokens: 1 + ... + 10 keys over 10 queries
    assert found["attention_flops"] == 3 * 2 * 32 * pairs
    assert found["attention_pairs"] == 3 * 2 * 2 * pairs, "2 heads of size 4 take 4 x 4 FLOPs a pair each"
    assert found["memory_bytes"] == 3 * (10 + 30) * 100, "two layers and what stands around them"
    assert found["layers"] == 2
    assert found["logits"] == 1600
    assert found["products"] == 3 * 3
    assert found["matrix_bytes"] == 3 * 2 * (2 * (100 * 12 + 32) + 100 * 20 + 64)


def test_the_gradient_of_the_head_counts_for_each_chunk_of_the_loss() -> None:
    """1,024 tokens in 4 chunks, on a CPU: in fp32 cleared 4, added to 4 times 10, scaled 8, rounded 6; tied 6."""
    found = head_amounts(1024, (4096, 576), 2, "chunked", "cpu", True)
    assert found["memory_bytes"] == 4096 * 576 * (4 + 4 * 10 + 8 + 6 + 6)
    assert found["products"] == 4 * 3
    assert found["matrix_bytes"] == 4 * 3 * 2 * (256 * (4096 + 576) + 4096 * 576)
    whole = head_amounts(1024, (4096, 576), 2, "full", "cpu", False)
    assert (whole["memory_bytes"], whole["products"]) == (0, 3)


def test_full_recomputation_repeats_a_forward_pass_of_the_layers_and_not_of_the_head() -> None:
    plain, full, selective = (work_of(mode) for mode in ("none", "full", "selective"))
    assert full["matrix_flops"] - plain["matrix_flops"] == 100 * 2 * 64
    assert full["attention_flops"] - plain["attention_flops"] == pytest.approx(2 * 32 * 550)
    assert full["memory_bytes"] - plain["memory_bytes"] == 2 * 10 * 100
    assert selective["matrix_flops"] == plain["matrix_flops"]
    assert selective["memory_bytes"] - plain["memory_bytes"] == 2 * 8 * 100


def step_of(device: str, *exchanges: Exchange, layers: float = 0.0, micro_batches: int = 2) -> StepWork:
    plain = {"matrix_flops": 2e12, "memory_bytes": 1e9, "layers": layers}
    return StepWork(device, micro_batches, plain, {"matrix_flops": 0.5e12}, {"memory_bytes": 1e9}, exchanges)  # type: ignore[arg-type]


def test_a_step_is_its_micro_batches_and_the_update() -> None:
    found = step_time(step_of("cuda"), UNIT_RATES)
    assert (found.matrix, found.memory, found.recomputation, found.optimizer) == (4.0, 2.0, 1.0, 1.0)
    assert found.total == 8.0


def test_the_host_counts_on_a_gpu_only_where_it_is_slower() -> None:
    assert step_time(step_of("cuda", layers=3000), UNIT_RATES).host == 0.0
    assert step_time(step_of("cuda", layers=5000), UNIT_RATES).host == pytest.approx(2 * (5 - 3.5))
    assert step_time(step_of("cpu", layers=3000), UNIT_RATES).host == pytest.approx(2 * 3)


def test_communication_is_exposed_beyond_what_it_hides_behind() -> None:
    backward = 2 * (3 * 2 / 3 + 0.5)  # of both micro-batches, with recomputation
    hidden = Exchange("gradients", 10e9, 1, 8, 1, "backward")
    sec = exchange_sec(hidden, UNIT_RATES)
    assert sec == pytest.approx(0.1 + 7e-6)
    found = step_time(step_of("cuda", hidden), UNIT_RATES)
    assert found.communication == 0 and found.hidden_communication == pytest.approx(sec)
    long = Exchange("gradients", 60e9, 1, 16, 2, "backward")  # at the network's 10 GB/s
    found = step_time(step_of("cuda", long), UNIT_RATES)
    assert found.communication == pytest.approx(6 + 14e-6 + 1e-5 - OVERLAP * backward)
    bare = Exchange("weights", 10e9, 1, 8, 1, "none")
    assert step_time(step_of("cuda", bare), UNIT_RATES).communication == pytest.approx(sec)


def test_the_hops_of_a_tree_grow_with_the_logarithm() -> None:
    empty = Exchange("norm", 0, 1, 64, 8, "none", is_ring=False)
    assert exchange_sec(empty, UNIT_RATES) == pytest.approx(3 * 1e-6 + 3 * 1e-5)
    cut = Exchange("weights", 1e9, 1, 64, 8, "none", messages=5)
    assert exchange_sec(cut, UNIT_RATES) == pytest.approx(0.1 + 5 * (56e-6 + 7e-5))


def test_the_bill_is_arithmetic() -> None:
    step = step_time(step_of("cuda"), UNIT_RATES)  # 8 s
    made = bill(
        step,
        global_batch_tokens=8_000,
        run_tokens=3_600_000,
        training_flops_per_token=1e9,
        peak_flops=1e12,
        num_gpus=4,
        price_per_gpu_hour=2.5,
        watts=700,
    )
    assert made.tokens_per_sec == 1000
    assert made.run_sec == 3600
    assert made.mfu == 0.25
    assert (made.gpu_hours, made.price_usd, made.energy_kwh) == (4.0, 10.0, 2.8)
    text = "\n".join(time_lines(made, UNIT_RATES))
    assert "8.0s a step, 1k tokens/s, MFU 25% (calibrated on test, 2026-01-01)" in text
    assert (
        "1h00m of training" in text
        and "4 GPU-hours, 10 USD, at most 2.8 kWh of the GPUs (700 W each by data sheet)" in text
    )


def h100_plan(*overrides: str) -> Plan:
    recipe = load_recipe(RECIPE, ["cluster.price_per_gpu_hour=2", *overrides])
    machine = described_machine(recipe)
    assert machine is not None
    return build_plan(recipe, machine)


def test_an_estimate_without_calibration_says_so(tmp_path: Path) -> None:
    plan = h100_plan(f"execution.cache_dir={tmp_path}")
    machine = described_machine(plan.recipe)
    assert machine is not None
    found = estimate(plan, small_profile(), machine)
    assert found is not None and "not calibrated" in found.rates.source
    assert found.bill.price_usd == pytest.approx(2 * found.bill.run_sec / 3600 * 64)
    assert found.bill.energy_kwh == pytest.approx(0.7 * found.bill.run_sec / 3600 * 64)
    work = step_work(plan, small_profile(), head_dim=4, documents=(8192,))
    assert work.micro_batches == 8
    assert work.recomputed["matrix_flops"] == 8192 * 2 * 64


def test_what_deepspeed_does_for_each_weight_counts_by_stage() -> None:
    """Stage 2 in bf16 on 64 GPUs, 8 micro-batches; stage 3 with the update in host memory."""
    weights, tensors = 16 * 4 * 2 + 2 * 32 + 4, 5
    found = step_work(h100_plan(), small_profile(), head_dim=4, documents=(8192,)).update
    assert found["gradient_bytes"] == pytest.approx(weights * (8 * (24 + 18 / 64) + 4 / 64))
    assert found["optimizer_bytes"] == pytest.approx(weights * 70 / 64)
    assert found["gradients"] == tensors * 9
    offloaded = h100_plan("execution.zero_stage=3", "execution.offload_optimizer=true")
    found = step_work(offloaded, small_profile(), head_dim=4, documents=(8192,)).update
    assert found["gradient_bytes"] == pytest.approx(weights * (8 * (22 + 16 / 64) + 7 * 4 / 64))
    assert found["offloaded_bytes"] == pytest.approx(weights * 70 / 64) and "optimizer_bytes" not in found


def test_kept_rates_are_read_for_the_same_machine_only(tmp_path: Path) -> None:
    plan = h100_plan(f"execution.cache_dir={tmp_path}")
    machine = described_machine(plan.recipe)
    assert machine is not None
    kind = kind_of("cuda", machine.gpu_name, "bf16", 1)
    assert kind == "H100-80GB, bf16"
    kept = Rates(kind, True, UNIT_RATES.sec_per, UNIT_RATES.node, UNIT_RATES.network, (0.01, 0.05), "2026-01-01")
    keep_rates(str(tmp_path), kept, {})
    assert read_rates(str(tmp_path), kind) == kept
    assert read_rates(str(tmp_path), "A100-80GB, bf16") is None
    found = estimate(plan, small_profile(), machine)
    assert found is not None and found.rates.sec_per.items() >= kept.sec_per.items() and found.rates.is_calibrated
    file = rates_file(str(tmp_path), kind)
    for broken in ("", "[]", json.dumps({**json.loads(file.read_text()), "version": 0}), '{"version": 1}'):
        file.write_text(broken)
        assert read_rates(str(tmp_path), kind) is None


def test_a_link_is_solved_from_two_all_reduces() -> None:
    sent = 2 * 3 / 4  # of four ranks, a byte
    link = Link(2e9, 1e-5)
    messages = {size: sent * size / link.bytes_per_sec + 2 * link.message_sec for size in (1000, 10**8)}
    found = measured_link(messages, 4, None)
    assert found.bytes_per_sec == pytest.approx(2e9) and found.message_sec == pytest.approx(1e-5)


def test_assumed_rates_come_from_the_data_sheet() -> None:
    found = assumed_rates("NVIDIA H100 80GB HBM3", "bf16", 8)
    assert found is not None and not found.is_calibrated
    assert math.isclose(1 / found.sec_per["matrix_flops"], 0.7 * 989e12)
    assert math.isclose(1 / found.sec_per["memory_bytes"], 0.85 * 3.35e12)
    assert math.isclose(found.node.bytes_per_sec, 0.8 * 450e9)
    assert math.isclose(found.network.bytes_per_sec, 0.8 * 8 * 50e9)
    assert assumed_rates("a GPU nobody knows", "bf16", 8) is None


def test_documents_are_cut_as_sequences_are() -> None:
    assert cut((3, 20_000), h100_plan()) == [3, 8192, 8192, 3616]
    assert head_dim_of({"n_embd": 768, "n_head": 12}) == 64
    assert head_dim_of({"hidden_size": 64, "num_attention_heads": 4, "head_dim": 128}) == 128
    assert head_dim_of({"model_type": "qwen3", "hidden_size": 64, "num_attention_heads": 4}) == 128, "its default"
    assert head_dim_of({"model_type": "gpt2", "n_embd": 64, "n_head": 4, "head_dim": 8}) == 16, "it has no such setting"
    assert head_dim_of({}) == 128


def test_gradients_hide_behind_the_backward_pass_and_gathered_weights_do_not() -> None:
    """Stage 2 on 64 GPUs: each gathers the updated weights after the step, and reduces gradients within it."""
    work = step_work(h100_plan(), small_profile(), head_dim=4, documents=(8192,))
    windows = {one.what: one.window for one in work.exchanges}
    assert windows["gradients"] == "backward" and windows["weights"] == "none"
    assert {one.nodes for one in work.exchanges if one.what == "gradients"} == {8}
    sharded = step_work(h100_plan("execution.zero_stage=3"), small_profile(), head_dim=4, documents=(8192,))
    assert {one.what: one.window for one in sharded.exchanges}["small weights"] == "none", "gathered after the update"


def test_processes_that_share_sequences_have_a_part_of_the_work_and_wait_for_the_exchange() -> None:
    """By hand: 2 layers of 2 heads of 4 elements, slices of 4,096 tokens in bf16, 16 micro-batches."""
    profile = replace(small_profile(), heads=Heads(2, 2, 2, 4))

    def work_of_group(size: int, recomputation: str = "none", heads: Heads | None = None) -> StepWork:
        asked = (f"execution.sequence_parallel={size}", f"execution.activation_checkpointing={recomputation}")
        shared = replace(profile, heads=heads or profile.heads)
        return step_work(h100_plan(*asked), shared, head_dim=4, documents=(8192,))

    whole, halves, again = work_of_group(1), work_of_group(2), work_of_group(2, "full")
    for unit in ("matrix_flops", "attention_flops", "attention_pairs", "attention_rows", "logits"):
        assert halves.micro_batch[unit] == whole.micro_batch[unit] / 2  # type: ignore[index]
    tensor, messages = 4096 * 2 * 4 * 2, 4 * 2  # bytes; of both layers in one pass
    copied = 2 * 2 * tensor * messages
    head = COMPILED * (4 + 8 + 4 + 2 + 8 + 2) * 64  # bytes of its gradient, whatever the tokens
    halved = (whole.micro_batch["memory_bytes"] - head) / 2 + head
    assert halves.micro_batch["memory_bytes"] == pytest.approx(halved + 2 * copied)
    plain_again = work_of_group(1, "full").recomputed["memory_bytes"] / 2
    assert again.recomputed["memory_bytes"] == pytest.approx(plain_again + copied)
    (sent,) = (one for one in halves.exchanges if one.what == "sequences")
    assert (sent.sent_bytes, sent.calls, sent.window, sent.nodes) == (tensor / 2, 2 * messages * 16, "none", 1)
    (sent,) = (one for one in again.exchanges if one.what == "sequences")
    assert sent.calls == 3 * messages * 16
    # Of 16 parts 8 go to the other node, whose network they wait for; 7 stay, over faster links at the same time.
    (over,) = (one for one in work_of_group(16, heads=Heads(2, 16, 16, 4)).exchanges if one.what == "sequences")
    assert (over.nodes, over.sent_bytes) == (2, 512 * 16 * 4 * 2 * 8 / 16)

"""The planned collectives are those of real steps: gloo ranks, the project's engine and step, c10d's operators."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from tests.plan.traffic_cells import cell, grid, record
from tests.train.harness import SEQ_LEN, make_recipe
from tests.world import run_world
from turbolm.data.prepare.build import prepare
from turbolm.plan.machine import detect_machine
from turbolm.plan.plan import Plan, build_plan
from turbolm.plan.profile import Heads, Tensor
from turbolm.plan.traffic import Collective, collectives, step_traffic, traffic_lines


def test_steps_of_two_ranks_do_what_is_planned(tmp_path: Path) -> None:
    small: dict[str, Any] = {"execution": {"communication_bucket": 20_000}}
    three = {"name": "muon", "soap": {}, "hyperball": True}
    cells = [
        cell("ZeRO-0", 2, 3, zero_stage=0),
        cell("ZeRO-1 bf16", 2, 3, zero_stage=1, precision="bf16"),
        cell("ZeRO-2 Muon", 2, 3, zero_stage=2, optimizer={"name": "muon"}, **small),
        cell("ZeRO-1 bf16 Muon that sends three tensors", 2, 1, zero_stage=1, precision="bf16", optimizer=three),
        cell("ZeRO-3", 2, 1, zero_stage=3, precision="bf16"),
        cell("shared sequences", 2, 3, zero_stage=2, execution={"sequence_parallel": 2}),
    ]
    for name, recorded in record(tmp_path, 2, cells).items():
        assert not recorded.differences(), name
        # What a run counts to be compared with its plan: by torch's flight recorder, not by operators.
        sent = [sum(key[1] for key in keys if key[0] not in ("broadcast", "barrier")) for keys in recorded.by_rank]
        assert recorded.counted == sent and min(sent) > 100_000, name


@pytest.mark.slow
def test_steps_of_four_ranks_do_what_is_planned(tmp_path: Path) -> None:
    wanted = ("hpZ fp32, accumulation 3", "ZeRO-3 fp32 Muon, accumulation 1", "ZeRO-2 bf16 offloaded, accumulation 3")
    cells = [one for one in grid(4) if one.name in wanted or ("shared" in one.name and "accumulation 1" in one.name)]
    assert len(cells) == len(wanted) + 5
    for name, recorded in record(tmp_path, 4, cells).items():
        assert not recorded.differences(), name


def _train_and_record(recipe: Any, first: int, last: int) -> list[Any]:
    from tests.plan.recorder import Recorder
    from turbolm.train import loop
    from turbolm.train.worker import run_worker

    recorder, agree = Recorder(), loop.agree_to_stop

    def agree_to_stop(session: Any, batch: Any) -> Any:
        if session.step == first:
            recorder.__enter__()
        if session.step == last:
            recorder.__exit__(None, None, None)
        return agree(session, batch)

    with patch.object(loop, "agree_to_stop", agree_to_stop):
        assert run_worker(recipe) == 0
    return recorder.seen


@pytest.mark.slow
def test_the_loop_of_the_trainer_does_what_is_planned(tmp_path: Path) -> None:
    """With its own messages: 10 steps of a run, in which metrics are written once."""
    tokens = 2 * SEQ_LEN
    recipe = make_recipe(
        tmp_path,
        data={"validation": "0%"},
        train={"global_batch": tokens, "budget": 31 * tokens},
        execution={"zero_stage": 2, "micro_batch": SEQ_LEN},
        anomalies={"spikes": "skip"},
        checkpoint={"every": "31 steps"},
        logging={"every_steps": 10, "sample_tokens": 0},
    )
    prepare(recipe)
    plan = build_plan(recipe, detect_machine(), 2)
    expected = Counter[Any]()
    for one in collectives(llama_tensors(), plan):
        expected[one.kind, one.bytes, one.dtype, one.ranks] += round(10 * one.calls)
    for seen in run_world(2, _train_and_record, recipe, 15, 25):
        assert Counter(seen) == expected


def llama_tensors(hidden: int = 48, inner: int = 96, layers: int = 2, vocabulary: int = 300) -> list[Tensor]:
    """The parameters of `harness.MODELS["llama"]`, written by hand."""
    found = [Tensor("model.embed_tokens.weight", (vocabulary, hidden), "embedding")]
    for layer in range(layers):
        shapes = {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (hidden // 2, hidden),
            "self_attn.v_proj": (hidden // 2, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }
        for name, shape in shapes.items():
            kind: Any = "matrix" if len(shape) > 1 else "vector"
            found.append(Tensor(f"model.layers.{layer}.{name}.weight", shape, kind))
    found.append(Tensor("model.norm.weight", (hidden,), "vector"))
    return [*found, Tensor("lm_head.weight", (vocabulary, hidden), "head")]


def planned(folder: Path, world_size: int, nodes: int, **execution: Any) -> Plan:
    tokens = world_size * SEQ_LEN
    recipe = make_recipe(
        folder,
        train={"global_batch": tokens, "budget": tokens, "precision": "bf16"},
        cluster={"device": "cpu", "num_nodes": nodes},
        execution={"micro_batch": SEQ_LEN, **execution},
    )
    return build_plan(recipe, detect_machine(), world_size)


def test_bytes_inside_nodes_and_between_them(tmp_path: Path) -> None:
    """A ring through 8 ranks on 2 nodes: of its 8 links 2 leave a node."""
    tensors = [Tensor("weight", (1024, 1024), "matrix")]
    traffic = step_traffic(tensors, planned(tmp_path, 8, 2, zero_stage=2))
    elements = 1024 * 1024
    sent = 2 * 7 / 8 * 4 * elements + 7 / 8 * 2 * elements  # gradients in fp32, all-reduced; weights in bf16, gathered
    assert traffic.inside_bytes + traffic.between_bytes == pytest.approx(sent, rel=1e-3)
    assert traffic.between_bytes / (traffic.inside_bytes + traffic.between_bytes) == pytest.approx(2 / 8)
    assert traffic.node_bytes == 4 * traffic.between_bytes

    one_node = step_traffic(tensors, planned(tmp_path, 8, 1, zero_stage=2))
    assert one_node.between_bytes == 0
    one_rank_a_node = step_traffic(tensors, planned(tmp_path, 8, 8, zero_stage=2))
    assert one_rank_a_node.inside_bytes == 0
    assert collectives(tensors, planned(tmp_path, 1, 1, zero_stage=2)) == ()
    assert list(traffic_lines(step_traffic(tensors, planned(tmp_path, 1, 1)))) == []


def test_hpz_gathers_for_the_backward_pass_inside_a_node(tmp_path: Path) -> None:
    tensors = [Tensor("weight", (1024, 1024), "matrix")]
    weights = 2 * 1024 * 1024
    flat = step_traffic(tensors, planned(tmp_path, 8, 2, zero_stage=3))
    hpz = step_traffic(tensors, planned(tmp_path, 8, 2, zero_stage=3, hierarchical_partition=4))
    assert flat.between_bytes - hpz.between_bytes == pytest.approx(7 / 8 * weights * 2 / 8)
    gathers = {one.ranks: one for one in hpz.collectives if one.what == "weights"}
    assert gathers[4].sent_between == 0
    assert gathers[4].sent_inside == 3 / 4 * weights


def test_groups_that_share_sequences_send_inside_their_node_first(tmp_path: Path) -> None:
    """By hand: 2 layers of 4 heads, 2 of keys, of 12 elements; 4 x 32 tokens shared by 4, and 3 micro-batches."""
    tokens = 8 // 4 * 3 * 4 * SEQ_LEN

    def exchanged(per_node: int, shared_by: int, **execution: Any) -> list[Collective]:
        recipe = make_recipe(
            tmp_path,
            train={"global_batch": tokens, "budget": tokens, "precision": "bf16"},
            cluster={"device": "cpu", "num_nodes": 8 // per_node},
            execution={"micro_batch": 4 * SEQ_LEN, "sequence_parallel": shared_by, **execution},
        )
        plan = build_plan(recipe, detect_machine(), 8)
        tensors = [Tensor("weight", (1024, 1024), "matrix")]
        assert all(one.group != "sequence" for one in collectives(tensors, plan))
        return [one for one in collectives(tensors, plan, Heads(2, 4, 2, 12)) if one.group == "sequence"]

    (alike,) = exchanged(8, 4)  # keys and values are repeated: 2 heads for 4 ranks
    assert alike.bytes == 32 * 4 * 12 * 2
    assert alike.calls == 4 * 2 * 2 * 3, "queries, keys, values, output; both passes; layers; micro-batches"
    assert alike.sent_inside == alike.bytes * 3 / 4 and alike.sent_between == 0
    (recomputed,) = exchanged(8, 4, activation_checkpointing="full")
    assert recomputed.calls == 4 * 3 * 2 * 3
    (over_two,) = exchanged(2, 4)
    assert over_two.sent_inside == over_two.bytes * 1 / 4 and over_two.sent_between == over_two.bytes * 2 / 4
    pairs = exchanged(8, 2)  # 2 heads of keys need no repetition
    assert sorted(one.bytes for one in pairs) == [64 * 2 * 12 * 2, 64 * 4 * 12 * 2]


def test_lines_say_what_is_sent_for_what(tmp_path: Path) -> None:
    """Small: a norm of 4 bytes and a flag of 1; our own 16, and every 10 steps (10 + 2 x 8) x 8 and 8."""
    tensors = [Tensor("weight", (8192, 8192), "matrix")]
    assert list(traffic_lines(step_traffic(tensors, planned(tmp_path, 8, 2, zero_stage=2)))) == [
        "gradients (all_reduce)       448 MiB",
        "weights (all_gather)         112 MiB",
        "small messages                  75 B",
        "together                     420 MiB inside the node, 140 MiB to other nodes (560 MiB out of each node)",
    ]

"""The launcher of each node: its place, its address, its port, and the meeting before any rank starts."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from turbolm.errors import UserError
from turbolm.files import read_json, write_json
from turbolm.launch import network, node
from turbolm.launch.network import free_port, interface_of, own_address, probe, resolve
from turbolm.launch.node import Place, build_extensions, check_same, find_place, meet, node_command
from turbolm.plan.machine import Machine
from turbolm.plan.plan import build_plan
from turbolm.recipe.schema import Recipe
from turbolm.reliability import late

from .harness import RECIPE

MACHINE = Machine(0, None, None, 4, False, 10**9)


def recipe_of(num_nodes: int) -> Recipe:
    return Recipe.model_validate(RECIPE | {"cluster": {"num_nodes": num_nodes, "processes_per_node": 3}})


def addresses(monkeypatch: pytest.MonkeyPatch, table: dict[str, str]) -> None:
    def look_up(host: str, *_: Any, **__: Any) -> list[Any]:
        if host not in table:
            raise socket.gaierror("Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (table[host], 0))]

    monkeypatch.setattr(network.socket, "getaddrinfo", look_up)


def test_the_place_is_read_inside_the_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_NODEID", raising=False)
    with pytest.raises(UserError, match="SLURM_NODEID is not set"):
        find_place(recipe_of(2), "a,b")
    monkeypatch.setenv("SLURM_NODEID", "1")
    assert find_place(recipe_of(2), "a,b") == Place(1, ("a", "b"))
    for hosts in ("", "a", "a,b,c"):  # never a world of its own
        with pytest.raises(UserError, match="cluster.num_nodes is 2"):
            find_place(recipe_of(2), hosts)


def test_the_head_is_never_the_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    addresses(monkeypatch, {"a": "127.0.1.1", "b": "192.0.2.7"})
    assert resolve("b") == "192.0.2.7"
    with pytest.raises(UserError, match="a resolves to 127.0.1.1, which is this machine"):
        own_address(1, ("a", "b"))
    with pytest.raises(UserError, match="c has no address here"):
        own_address(0, ("a", "c"))
    assert own_address(0, ("a",)) == "127.0.0.1"


def test_ports_are_spread_and_below_those_of_outgoing_connections() -> None:
    ports = {free_port() for _ in range(50)}
    assert len(ports) > 40
    assert 10_000 <= min(ports) <= max(ports) < 32_768  # Linux takes ports for outgoing connections from there on


def test_a_port_in_use_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("", free_port()))
        taken = other.getsockname()[1]
        monkeypatch.setattr(network.random, "sample", lambda ports, count: [taken, taken + 1, taken + 2])
        assert free_port() in (taken + 1, taken + 2)
        monkeypatch.setattr(network.random, "sample", lambda ports, count: [taken])
        with pytest.raises(UserError, match="no free port"):
            free_port()


def test_probe_and_interface() -> None:
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        door.listen()
        port = door.getsockname()[1]
        assert probe("127.0.0.1", port) == "open"
    assert probe("127.0.0.1", port) == "closed"
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("192.0.2.77") is None


def test_the_nodes_meet_or_say_who_is_missing(tmp_path: Path) -> None:
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        door.listen()
        head = {"node": 0, "host": "a", "address": "127.0.0.1", "port": door.getsockname()[1]}
        write_json(tmp_path / "0.json", head)
        with pytest.raises(TimeoutError, match="no sign of b, c within 0 s"):
            meet(tmp_path, Place(0, ("a", "b", "c")), timeout_sec=0)
        with pytest.raises(TimeoutError, match="no sign of b, c within 0 s"):  # by the head's word
            meet(tmp_path, Place(1, ("a", "b", "c")), timeout_sec=60)
        write_json(tmp_path / "1.json", {"node": 1, "host": "b"})
        for number in (0, 1):
            assert meet(tmp_path, Place(number, ("a", "b")), timeout_sec=0) == [head, {"node": 1, "host": "b"}]
        write_json(tmp_path / "1.json", {"node": 1, "host": "b", "refused": "b has 7 GPUs"})
        for number in (0, 2):
            with pytest.raises(UserError, match="b has 7 GPUs"):
                meet(tmp_path, Place(number, ("a", "b", "c")), timeout_sec=60)
    write_json(tmp_path / "met.json", {"nodes": [head, {"node": 1, "host": "b"}]})
    with pytest.raises(TimeoutError, match="b cannot reach a"):
        meet(tmp_path, Place(1, ("a", "b")), timeout_sec=60)
    (tmp_path / "met.json").unlink()
    write_json(tmp_path / "0.json", {**head, "refused": "a has no GPU"})
    with pytest.raises(UserError, match="a has no GPU"):
        meet(tmp_path, Place(1, ("a", "b")), timeout_sec=60)


def test_64_nodes_meet_in_a_few_reads_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each record is read once, by the head; another node reads one file, however many nodes there are."""
    hosts, read, slept = tuple(f"n{node:02}" for node in range(64)), [], []
    records = [{"node": node, "host": host, "address": "a", "port": 1} for node, host in enumerate(hosts)]
    monkeypatch.setattr(node, "probe", lambda *_: "open")
    monkeypatch.setattr(node, "read_json", lambda path: read.append(path.name) or read_json(path))
    write_json(tmp_path / "0.json", records[0])

    def sleep(_: float) -> None:
        """One more node comes at each look."""
        slept.append(None)
        write_json(tmp_path / f"{len(slept)}.json", records[len(slept)])

    monkeypatch.setattr(node.time, "sleep", sleep)
    assert meet(tmp_path, Place(0, hosts), timeout_sec=60) == records
    assert sorted(read) == sorted(f"{number}.json" for number in range(64)) and len(slept) == 63
    read.clear()
    assert meet(tmp_path, Place(63, hosts), timeout_sec=60) == records
    assert read == ["met.json"]


def test_the_head_says_which_nodes_are_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(late, "_FIRST_NOTICE_SEC", 0)
    write_json(tmp_path / "0.json", {"node": 0, "host": "a"})
    hosts = ("a", *(f"n{number}" for number in range(63)))
    monkeypatch.setattr(node.time, "sleep", lambda _: None)
    with pytest.raises(TimeoutError, match="no sign of n0, n1, n2, n3, n4, n5, n6, n7 and 55 more within 0 s"):
        meet(tmp_path, Place(0, hosts), timeout_sec=0.05)
    first = capsys.readouterr().err.splitlines()[0]
    assert first == "turbolm: 63 of 64 nodes have not come after 0 s: n0, n1, n2, n3, n4, n5, n6, n7 and 55 more"


def test_nodes_that_differ_are_an_error() -> None:
    same = {"device": "cuda", "precision": "bf16"}
    nodes = [{"host": "a", "processes": 8, **same}, {"host": "b", "processes": 7, **same}]
    with pytest.raises(UserError, match=r"number of processes \(a: 8, b: 7\)"):
        check_same(nodes)


def test_the_command_of_each_node(tmp_path: Path) -> None:
    plan = build_plan(recipe_of(2), MACHINE)
    nodes = [{"address": "192.0.2.1", "main_port": 12345}, {}]
    command = node_command(tmp_path, plan, "r.yaml", 4, Place(1, ("a", "b")), nodes)
    assert command[: command.index("turbolm.train") + 1] == [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *("--config_file", str(tmp_path / "accelerate.node1.yaml")),
        *("--num_processes", "6", "--num_machines", "2", "--main_process_port", "12345"),
        *("--deepspeed_multinode_launcher", "standard", "--machine_rank", "1"),
        *("--main_process_ip", "192.0.2.1", "--rdzv_backend", "static", "--same_network"),
        *("-m", "turbolm.train"),
    ]
    assert command[-5:] == ["--recipe", "r.yaml", "--attempt", "4", f"train.precision={plan.precision}"]
    one = node_command(tmp_path, build_plan(recipe_of(1), MACHINE), "r.yaml", 4, Place(0, ("a",)), nodes[:1])
    assert "--machine_rank" not in one


def test_what_is_started_ignores_signals_and_ends_with_its_launcher(tmp_path: Path) -> None:
    """torchelastic would kill ranks that save for more than 30 s; a killed launcher must leave nothing behind."""
    launcher = (
        "import os, sys; from pathlib import Path; from turbolm.launch.local import start_ranks\n"
        "child = start_ranks(['sleep', '600'], dict(os.environ), Path(sys.argv[1])); print(child.pid, flush=True)\n"
        "child.wait()"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", launcher, str(tmp_path / "log")], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    time.sleep(0.2)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
        os.kill(child, number)
    time.sleep(0.2)
    os.kill(child, 0)  # still there
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}/stat").exists() and " Z " not in Path(f"/proc/{child}/stat").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("execution", "builder"),
    [
        ({}, None),
        ({"adam_kernel": "torch", "offload_optimizer": True}, None),
        ({"offload_optimizer": True}, "CPUAdamBuilder"),
        ({"adam_kernel": "deepspeed"}, "CPUAdamBuilder"),
    ],
)
def test_what_a_node_compiles_before_its_ranks_start(
    execution: dict[str, Any], builder: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe.model_validate(RECIPE | {"execution": execution, "cluster": {"device": "cpu"}})
    started: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        started.append(command)
        return subprocess.CompletedProcess(command, 1 if len(started) == 2 else 0, "", "no compiler")

    monkeypatch.setattr(node.subprocess, "run", run)
    build_extensions(build_plan(recipe, MACHINE), {})
    assert [command[2] for command in started] == (
        [f"from deepspeed.ops.op_builder import {builder}; {builder}().load()"] if builder else []
    )
    if builder:
        with pytest.raises(UserError, match="no compiler"):
            build_extensions(build_plan(recipe, MACHINE), {})

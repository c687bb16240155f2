"""Nodes that have IPv6 addresses only meet and train."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

from tests.train.harness import SEQ_LEN, make_recipe
from turbolm.data.prepare.build import prepare
from turbolm.errors import UserError
from turbolm.files import write_json
from turbolm.launch import network
from turbolm.launch.network import free_port, interface_of, own_address, probe, resolve
from turbolm.launch.node import Place, meet, open_door
from turbolm.recipe.load import dump_recipe
from turbolm.reliability.outcome import read_outcome
from turbolm.train.run_directory import open_attempt, run_directory


def addresses(monkeypatch: pytest.MonkeyPatch, *found: str) -> None:
    rows = [(socket.AF_INET6 if ":" in one else socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, 0)) for one in found]
    monkeypatch.setattr(network.socket, "getaddrinfo", lambda *_, **__: rows)


@pytest.mark.parametrize(
    ("found", "right"),
    [
        (["2001:db8::7"], "2001:db8::7"),
        (["fe80::1%eth0", "2001:db8::7"], "2001:db8::7"),
        (["2001:db8::7", "192.0.2.7"], "192.0.2.7"),
        (["::1", "2001:db8::7"], "2001:db8::7"),
        (["::1"], UserError("a resolves to ::1, which is this machine")),
        (["fe80::1%eth0"], UserError("a has only the link-local address fe80::1%eth0")),
    ],
)
def test_which_address_of_a_node_is_used(found: list[str], right: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    addresses(monkeypatch, *found)
    if isinstance(right, str):
        assert resolve("a") == right
    else:
        with pytest.raises(UserError, match=str(right)):
            resolve("a")


def test_a_door_a_probe_a_port_and_an_interface(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        addresses(patch, "::1")
        with pytest.raises(UserError, match="is this machine"):
            own_address(0, ("a", "b"))
    with open_door("::1") as door:
        port = door.getsockname()[1]
        assert probe("::1", port) == "open"
        head = {"node": 0, "host": "a", "address": "::1", "port": port}
        write_json(tmp_path / "0.json", head)
        assert meet(tmp_path, Place(0, ("a",)), timeout_sec=0) == [head]
        with socket.socket(socket.AF_INET6) as other, pytest.raises(OSError, match="in use"):
            other.bind(("::", port))
    assert probe("::1", port) == "closed"
    assert free_port("::1") > 0
    assert interface_of("::1") == "lo"
    assert interface_of("2001:db8::99") is None


@pytest.mark.parametrize("address", ["2001:db8::7", "::1", "192.0.2.7", "[2001:db8::7]"])
def test_torch_reads_the_address_as_accelerate_hands_it_over(address: str) -> None:
    """Accelerate passes --main_process_ip as --master-addr, to which torchrun adds a colon and the port."""
    assert parse_rendezvous_endpoint(f"{address}:29500", -1) == (address.strip("[]"), 29500)


@pytest.fixture
def nodes() -> Iterator[list[list[str]]]:
    """Two network namespaces with a cable and no IPv4 but on the loopback; for each, what runs a command in it."""
    if os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("network namespaces need root and iproute2")
    names = [f"tl6-{os.getpid()}-{number}" for number in (0, 1)]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    try:
        for name in names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("link", "add", "eth6", "netns", names[0], "type", "veth", "peer", "name", "eth6", "netns", names[1])
        for number, name in enumerate(names):
            ip("-n", name, "addr", "add", f"fd00:6::{number + 1}/64", "dev", "eth6", "nodad")
            ip("-n", name, "link", "set", "eth6", "up")
        yield [["ip", "netns", "exec", name, "unshare", "--mount", "--uts"] for name in names]
    finally:
        for name in names:
            with suppress(subprocess.CalledProcessError):
                ip("netns", "delete", name)


@pytest.mark.slow
def test_two_nodes_without_ipv4_train(nodes: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = make_recipe(
        tmp_path,
        train={"budget": 3 * 5 * SEQ_LEN},
        cluster={"num_nodes": 2, "processes_per_node": 1, "slurm": {}},
        execution={"zero_stage": 1, "process_group_timeout": 120},
        logging={"every_steps": 1, "sample_tokens": 0},
    )
    prepare(recipe)
    Path("recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    Path("hosts").write_text("127.0.0.1 localhost\n::1 localhost\nfd00:6::1 six-a\nfd00:6::2 six-b\n")
    attempt = open_attempt(run_directory(recipe))
    launchers = []
    for number, inside in enumerate(nodes):
        launch = [sys.executable, "-m", "turbolm.launch.node", "--recipe", "recipe.yaml", "--attempt", str(attempt)]
        shell = f'mount --bind hosts /etc/hosts && hostname six-{"ab"[number]} && exec "$@"'
        environment = {**os.environ, "SLURM_NODEID": str(number), "SLURM_JOB_ID": "6"}
        launchers.append(
            subprocess.Popen(
                [*inside, "sh", "-c", shell, "sh", *launch, "--hosts", "six-a,six-b"],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )  # fmt: skip
        )
    outputs = [process.communicate(timeout=240)[0] for process in launchers]
    assert [process.returncode for process in launchers] == [0, 0], outputs
    outcome = read_outcome(run_directory(recipe).attempt(attempt))
    assert outcome is not None and outcome.status == "finished"
    records = [json.loads((run_directory(recipe).attempt(attempt) / f"nodes/{n}.json").read_text()) for n in (0, 1)]
    assert [record["address"] for record in records] == ["fd00:6::1", "fd00:6::2"]
    config = yaml.safe_load((run_directory(recipe).attempt(attempt) / "accelerate.node1.yaml").read_text())
    assert config["machine_rank"] == 1

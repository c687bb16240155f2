"""A real Slurm of several nodes on one machine, for the tests of everything that runs under Slurm.

    with slurm_cluster(num_nodes=3, root=tmp_path) as cluster:
        job_id = cluster.sbatch("--nodes=3", script="#!/bin/bash\\nsrun hostname\\n")
        cluster.wait(job_id, timeout_sec=30)
        print(cluster.output(job_id))

Every node is one slurmd with a network namespace, a host name, an address and an /etc/hosts of its own; file system,
processes and /dev/shm are shared. Controller, munge daemon and bridge live in one more namespace:

    test process                   namespace <id>-ctl                    namespace <id>-1 (host <id>1)
    <id>host 10.77.x.253 --------- bridge br0 10.77.x.254 -- port1 ----- eth0 10.77.x.1
                                   slurmctld, munged      \\- port2 ... (1 Gbit/s each way)

The host itself gains one interface and nothing else: no bridge (whose traffic a host firewall could drop), no routes,
no edit of /etc/hosts, no use of the system's munge key. Everything a cluster started is found again through its
namespaces, so `close` and the clean-up after a killed test run need no list of processes.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

_COMMANDS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "munged", "ip", "tc", "nsenter", "unshare")
_PACKAGES = "slurmctld slurmd slurm-client munge iproute2"
_NETNS_DIR = Path("/run/netns")
_STATE_DIR = Path(tempfile.gettempdir()) / "turbolm-slurm"  # <id>.json per cluster: who owns it
_CONTROLLER_HOST, _TEST_HOST = 254, 253  # last byte of their addresses; nodes count from 1
_MAX_SOCKET_PATH = 107  # sun_path of Linux, without the final zero
_TERMINAL_STATES = frozenset(
    ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT")
)

# cred_expire is also the wait of a requeued job before it may start again (slurm.conf(5)): 120 s by default, and in
# place of less than 5 s (_slurm_cred_init in slurm_cred.c).
_SLURM_CONF = """\
ClusterName={id}
SlurmctldHost={id}ctl({network}.254)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={root}/munge.socket,cred_expire={requeue_delay_sec}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=1,bf_interval=1
SlurmdParameters=config_overrides
JobRequeue=1
KillWait=5
MinJobAge=3600
SlurmdTimeout={slurmd_timeout_sec}
MailProg=/bin/true
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/%h.log
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/%h.pid
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%h
GresTypes=gpu
{nodes}
PartitionName=main Nodes={id}[1-{num_nodes}] Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
"""


def missing_requirements() -> str | None:
    """Why no cluster can be started here, or None."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "a Slurm cluster in network namespaces needs Linux and root"
    missing = [command for command in _COMMANDS if shutil.which(command) is None]
    if missing:
        return f"commands {', '.join(missing)} not found: apt-get install {_PACKAGES}"
    return None


@dataclass(frozen=True)
class Node:
    name: str
    address: str
    netns: str
    interface: str = "eth0"  # inside the node; its other end is `port<i>` of the controller's bridge
    port: str = ""


@contextmanager
def slurm_cluster(num_nodes: int, root: Path, **options: int) -> Iterator[SlurmCluster]:
    """A started cluster, closed at the end; `options` as in SlurmCluster."""
    cluster = SlurmCluster(num_nodes, root, **options)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.close()


class SlurmCluster:
    """Slurm with `num_nodes` nodes; its files (logs, job outputs) stay in `root` after `close`."""

    def __init__(
        self,
        num_nodes: int,
        root: Path,
        *,
        cpus_per_node: int = 4,  # what Slurm hands out, whatever the machine has
        gpus_per_node: int = 8,  # the same, so that `--gpus-per-node` is accepted: no device stands behind them
        link_mbit: int = 1000,
        slurmd_timeout_sec: int = 10,  # a silent node is down after this
        requeue_delay_sec: int = 5,
    ) -> None:
        if not 1 <= num_nodes <= 250:
            raise ValueError(f"num_nodes must be 1 to 250, not {num_nodes}")
        if requeue_delay_sec < 5:
            raise ValueError(f"Slurm takes a requeue delay of less than 5 s for 120 s: {requeue_delay_sec}")
        self.root = root.resolve()
        if len(str(self.root / "munge.socket")) > _MAX_SOCKET_PATH:
            raise ValueError(f"{self.root} is too long a path for a socket")
        self.id = "tl" + "".join(random.choices(string.ascii_lowercase, k=5))
        self.network = _free_network()
        self.nodes = tuple(
            Node(f"{self.id}{i}", f"{self.network}.{i}", f"{self.id}-{i}", port=f"port{i}")
            for i in range(1, num_nodes + 1)
        )
        self.env = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_"))}
        self.env["SLURM_CONF"] = str(self.root / "slurm.conf")
        self._cpus_per_node = cpus_per_node
        self._gpus_per_node = gpus_per_node
        self._link_mbit = link_mbit
        self._slurmd_timeout_sec = slurmd_timeout_sec
        self._requeue_delay_sec = requeue_delay_sec
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}  # by host name, and "munged"
        self._controller_netns = f"{self.id}-ctl"

    # Life

    def start(self, timeout_sec: float = 30) -> None:
        remove_stale_clusters()
        _STATE_DIR.mkdir(exist_ok=True)
        owner = {"pid": os.getpid(), "start_time": _start_time(os.getpid())}
        (_STATE_DIR / f"{self.id}.json").write_text(json.dumps(owner))
        self._write_files()
        self._make_network()
        munge_files = [f"--{name}-file={self.root}/munge.{name}" for name in ("key", "pid", "log", "seed")]
        # --force: pytest's folders are closed to other users, which munged takes for a mistake.
        munged = ["munged", "--foreground", "--force", f"--socket={self.root}/munge.socket", *munge_files]
        self._spawn("munged", self._controller_netns, f"{self.id}ctl", munged)
        _wait_for(lambda: (self.root / "munge.socket").exists(), timeout_sec, "munged to listen")
        self._spawn(f"{self.id}ctl", self._controller_netns, f"{self.id}ctl", ["slurmctld", "-D"])
        for node in self.nodes:
            self.start_slurmd(node)
        for node in self.nodes:
            self.wait_node(node, timeout_sec, until={"IDLE"})

    def close(self) -> None:
        """Kill and remove everything the cluster made, also after a `start` that failed half-way."""
        _remove(self.id)
        for daemon in self._daemons.values():
            daemon.wait(timeout=10)
        self._daemons.clear()

    def _write_files(self) -> None:
        for folder in ("log", "run", "state", "spool", "jobs"):
            (self.root / folder).mkdir(parents=True, exist_ok=True)
        (self.root / "munge.key").touch(mode=0o600)
        (self.root / "munge.key").write_bytes(os.urandom(128))
        hosts = [f"{node.address} {node.name}" for node in self.nodes]
        hosts += ["127.0.0.1 localhost", f"{self.network}.{_CONTROLLER_HOST} {self.id}ctl"]
        (self.root / "hosts").write_text("\n".join(hosts) + "\n")
        nodes = "\n".join(
            f"NodeName={node.name} NodeAddr={node.address} CPUs={self._cpus_per_node} RealMemory=8000 "
            f"Gres=gpu:{self._gpus_per_node} Feature=ib,ssd"
            for node in self.nodes
        )
        for i in range(self._gpus_per_node):
            (self.root / f"gpu{i}").touch()  # Slurm wants a file for each
        (self.root / "gres.conf").write_text("".join(f"Name=gpu File={path}\n" for path in self.root.glob("gpu*")))
        (self.root / "slurm.conf").write_text(
            _SLURM_CONF.format(
                id=self.id,
                network=self.network,
                root=self.root,
                nodes=nodes,
                num_nodes=len(self.nodes),
                slurmd_timeout_sec=self._slurmd_timeout_sec,
                requeue_delay_sec=self._requeue_delay_sec,
            )
        )

    def _make_network(self) -> None:
        control, host_interface = self._controller_netns, f"{self.id}host"
        for netns in (control, *(node.netns for node in self.nodes)):
            _run("ip", "netns", "add", netns)
            _run("ip", "-n", netns, "link", "set", "lo", "up")
        _run("ip", "-n", control, "link", "add", "br0", "type", "bridge")
        _run("ip", "-n", control, "address", "add", f"{self.network}.{_CONTROLLER_HOST}/24", "dev", "br0")
        _run("ip", "-n", control, "link", "set", "br0", "up")
        _run("ip", "link", "add", host_interface, "type", "veth", "peer", "name", "host", "netns", control)
        _run("ip", "-n", control, "link", "set", "host", "master", "br0", "up")
        _run("ip", "address", "add", f"{self.network}.{_TEST_HOST}/24", "dev", host_interface)
        _run("ip", "link", "set", host_interface, "up")
        for node in self.nodes:
            peer = ("peer", "name", node.port, "netns", control)
            _run("ip", "-n", node.netns, "link", "add", node.interface, "type", "veth", *peer)
            _run("ip", "-n", control, "link", "set", node.port, "master", "br0", "up")
            _run("ip", "-n", node.netns, "address", "add", f"{node.address}/24", "dev", node.interface)
            _run("ip", "-n", node.netns, "link", "set", node.interface, "up")
            for netns, interface in ((node.netns, node.interface), (control, node.port)):
                limit = ("rate", f"{self._link_mbit}mbit", "burst", "256kb", "latency", "50ms")
                _run("tc", "-n", netns, "qdisc", "add", "dev", interface, "root", "tbf", *limit)

    def _spawn(self, key: str, netns: str, host_name: str, command: list[str]) -> None:
        with (self.root / "log" / f"{key}.out").open("ab") as output:
            self._daemons[key] = subprocess.Popen(
                self._command_in(netns, host_name, command),
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _command_in(self, netns: str, host_name: str, command: list[str]) -> list[str]:
        # Not `ip netns exec`: it mounts a new /sys, which hides /sys/fs/cgroup, and slurmd fails.
        # Every program of the chain replaces the one before, so that the process id is the daemon's.
        script = 'mount --bind "$1" /etc/hosts && hostname "$2" && shift 2 && exec "$@"'
        enter = ["nsenter", f"--net={_NETNS_DIR / netns}", "unshare", "--uts", "--mount"]
        return [*enter, "sh", "-c", script, "sh", str(self.root / "hosts"), host_name, *command]

    # Jobs

    def run(self, *command: str, cwd: Path | None = None, input: str | None = None) -> str:
        """Standard output of a Slurm command, run outside the nodes as on a login node."""
        return _run(*command, env=self.env, cwd=cwd, input=input)

    def run_on(self, node: Node, *command: str) -> str:
        """Standard output of a command with the network, host name and /etc/hosts of a node, outside any job."""
        return _run(*self._command_in(node.netns, node.name, list(command)), env=self.env)

    def sbatch(self, *arguments: str, script: str | None = None, cwd: Path | None = None) -> int:
        """Submit `script`, or the script file named in `arguments`; its output goes to `cwd`, else <root>/jobs."""
        answer = self.run("sbatch", "--parsable", *arguments, input=script, cwd=cwd or self.root / "jobs")
        return int(answer.split(";")[0])

    def job(self, job_id: int) -> dict[str, str]:
        """The fields of `scontrol show job`, such as JobState, Reason, Restarts, NodeList, StdOut."""
        return _parse_record(self.run("scontrol", "show", "--oneliner", "job", str(job_id)))

    def output(self, job_id: int) -> str:
        path = Path(self.job(job_id)["StdOut"])
        return path.read_text() if path.exists() else ""

    def wait(self, job_id: int, timeout_sec: float, until: Collection[str] = ("COMPLETED",)) -> str:
        """Wait for one of the states `until`; a job that ends in another state is an error."""
        deadline = time.monotonic() + timeout_sec
        while (state := self.job(job_id)["JobState"]) not in until:
            if state in _TERMINAL_STATES and not self._will_restart(job_id):
                raise RuntimeError(f"job {job_id} ended as {state}:\n{self._describe(job_id)}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"job {job_id} is {state} after {timeout_sec} s:\n{self._describe(job_id)}")
            time.sleep(0.2)
        return state

    def _will_restart(self, job_id: int) -> bool:
        # A job being requeued shows its old end (CANCELLED, NODE_FAIL) for a moment.
        time.sleep(1)
        return self.job(job_id)["JobState"] not in _TERMINAL_STATES

    def _describe(self, job_id: int) -> str:
        record = self.run("scontrol", "show", "job", str(job_id))
        return f"{record}\n--- output ---\n{self.output(job_id)[-4000:]}"

    # Nodes

    def node_state(self, node: Node) -> frozenset[str]:
        """State and flags, such as {"DOWN", "NOT_RESPONDING"}."""
        record = _parse_record(self.run("scontrol", "show", "--oneliner", "node", node.name))
        return frozenset(record["State"].replace("*", "+NOT_RESPONDING").split("+"))

    def wait_node(self, node: Node, timeout_sec: float, until: Collection[str]) -> None:
        """Wait for one of the states `until` without the flag NOT_RESPONDING, unless that is asked for."""

        def reached() -> bool:
            try:
                state = self.node_state(node)
            except subprocess.CalledProcessError:  # the controller is not up yet
                return False
            return bool(state & set(until)) and ("NOT_RESPONDING" not in state or "DOWN" in state)

        _wait_for(reached, timeout_sec, f"{node.name} to be {' or '.join(until)}; logs in {self.root}/log")

    def start_slurmd(self, node: Node) -> None:
        self._spawn(node.name, node.netns, node.name, ["slurmd", "-D"])

    def kill_slurmd(self, node: Node) -> None:
        """SIGKILL the daemon only: job steps on the node live on, as after a crash of the daemon."""
        self._daemons[node.name].kill()
        self._daemons[node.name].wait()

    def crash(self, node: Node) -> None:
        """SIGKILL everything on the node, as after a loss of power; `start_slurmd` brings it back."""
        _kill_all_in([node.netns])
        self._daemons[node.name].wait()

    def declare_down(self, node: Node) -> None:
        """What `crash` leads to half a minute later: its jobs end or are requeued; the node itself soon returns."""
        self.run("scontrol", "update", f"nodename={node.name}", "state=down", "reason=test")

    def link_down(self, node: Node) -> None:
        """Pull the node's cable at the switch."""
        _run("ip", "-n", self._controller_netns, "link", "set", node.port, "down")

    def link_up(self, node: Node) -> None:
        _run("ip", "-n", self._controller_netns, "link", "set", node.port, "up")

    @contextmanager
    def slow_link(self, node: Node, mbit: int) -> Iterator[None]:
        """Both directions of the node's link carry only so much within the block."""
        ends = ((node.netns, node.interface), (self._controller_netns, node.port))

        def limit(rate_mbit: int) -> None:
            for netns, interface in ends:
                rate = ("tbf", "rate", f"{rate_mbit}mbit", "burst", "256kb", "latency", "50ms")
                _run("tc", "-n", netns, "qdisc", "replace", "dev", interface, "root", *rate)

        limit(mbit)
        try:
            yield
        finally:
            limit(self._link_mbit)

    @contextmanager
    def full_disk(self, node: Node, folder: Path) -> Iterator[None]:
        """On this node alone, `folder` is a disk without room within the block."""
        enter = ("nsenter", f"--target={self._daemons[node.name].pid}", "--mount")
        _run(*enter, "mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder))
        try:
            _run(*enter, "sh", "-c", 'head -c 65536 /dev/zero >"$0/full"', str(folder))
            yield
        finally:
            _run(*enter, "umount", "--lazy", str(folder))

    def processes_in(self, node: Node) -> list[tuple[int, str]]:
        """(pid, command line) of every process in the node's network namespace."""
        return [(pid, _command_line(pid)) for pid in _processes_in([node.netns])]

    def bytes_on_wire(self, node: Node) -> tuple[int, int]:
        """(received, sent) by the node's interface since the start."""
        answer = _run("ip", "-n", node.netns, "-json", "-stats", "link", "show", node.interface)
        stats = json.loads(answer)[0]["stats64"]
        return stats["rx"]["bytes"], stats["tx"]["bytes"]


def remove_stale_clusters() -> None:
    """Remove what test runs left that were killed before `close`; clusters of live ones stay."""
    for state_file in _STATE_DIR.glob("*.json"):
        try:
            owner = json.loads(state_file.read_text())
        except (FileNotFoundError, json.JSONDecodeError):  # just removed, or just being written, by its owner
            continue
        if _start_time(owner["pid"]) != owner["start_time"]:
            _remove(state_file.stem)


def _remove(cluster_id: str) -> None:
    namespaces = [path.name for path in _NETNS_DIR.glob(f"{cluster_id}-*")]
    _kill_all_in(namespaces)
    # The host's end first: with the namespace alone it would go a little later.
    subprocess.run(["ip", "link", "delete", f"{cluster_id}host"], capture_output=True, check=False)
    for netns in namespaces:
        _run("ip", "netns", "delete", netns)
    (_STATE_DIR / f"{cluster_id}.json").unlink(missing_ok=True)


def _kill_all_in(namespaces: Collection[str], timeout_sec: float = 10) -> None:
    def none_left() -> bool:
        pids = _processes_in(namespaces)
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return not pids

    _wait_for(none_left, timeout_sec, f"the processes in {', '.join(namespaces)} to end")


def _processes_in(namespaces: Collection[str]) -> list[int]:
    wanted = {(_NETNS_DIR / netns).stat().st_ino for netns in namespaces}
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "ns/net").stat().st_ino in wanted:  # zombies have none
                found.append(int(process.name))
        except OSError:
            continue
    return sorted(found)


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def _start_time(pid: int) -> int | None:
    """When the process started, in clock ticks since boot, which tells it from a later one with its number."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])  # field 22 of proc(5)
    except OSError:
        return None


def _free_network() -> str:
    """The first three bytes of a network no interface of this machine has."""
    taken = _run("ip", "-4", "-o", "address")
    return random.choice([f"10.77.{x}" for x in range(1, 255) if f" 10.77.{x}." not in taken])


def _parse_record(line: str) -> dict[str, str]:
    return dict(re.findall(r"(?:^| )([A-Za-z:/_]+)=(.*?)(?= [A-Za-z:/_]+=|\s*$)", line.splitlines()[0]))


def _wait_for(condition: Callable[[], bool], timeout_sec: float, what: str) -> None:
    deadline = time.monotonic() + timeout_sec
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout_sec} s for {what}")
        time.sleep(0.1)


def _run(*command: str, env: Mapping[str, str] | None = None, cwd: Path | None = None, input: str | None = None) -> str:
    """Standard output; what the command said goes into the error when it fails."""
    result = subprocess.run(command, capture_output=True, text=True, env=env, cwd=cwd, input=input)
    if result.returncode != 0:
        error = subprocess.CalledProcessError(result.returncode, command, result.stdout, result.stderr)
        error.add_note(result.stderr.strip())
        raise error
    return result.stdout

"""launch/ssh.sh with an ssh that runs what it is given here, as a login shell there would."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "launch" / "ssh.sh"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout whose programs write down their arguments, with zeros between them."""
    (tmp_path / "launch").mkdir()
    shutil.copy(SCRIPT, tmp_path / "launch" / "ssh.sh")
    bin_folder = tmp_path / ".venv" / "bin"
    bin_folder.mkdir(parents=True)
    note = f'printf "%s\\0" "$(basename "$0")" "$@" >"{tmp_path}/call.$$"\n'
    bodies = {
        "torchrun": note + 'case " $* " in *wait*) sleep 2 ;; *fail*) exit 3 ;; esac\n',
        "turbolm": note,
        "python": 'echo "runs/a run"\n',
        "ssh": f'printf "%s\\0" ssh "$2" >>"{tmp_path}/hosts"; exec sh -c "$3"\n',
    }
    for name, body in bodies.items():
        path = bin_folder / name
        path.write_text(f"#!/bin/bash\n{body}")
        path.chmod(0o755)
    return tmp_path


def start(checkout: Path, hosts: str, *arguments: str) -> subprocess.Popen[str]:
    (checkout / "hosts.txt").write_text(hosts)
    return subprocess.Popen(
        [checkout / "launch" / "ssh.sh", "hosts.txt", *arguments],
        cwd=checkout,
        env=os.environ | {"PATH": f"{checkout}/.venv/bin:/usr/bin:/bin", "NUM_PROCESSES": "4"},
        stderr=subprocess.PIPE,
        text=True,
        # A shell cannot trap what was ignored when it began, as it is under `nohup` or `&`.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def calls(checkout: Path, program: str) -> list[list[str]]:
    texts = [path.read_text().split("\0")[:-1] for path in checkout.glob("call.*")]
    return sorted(words[1:] for words in texts if words[:1] == [program])


def test_every_host_gets_its_rank_and_the_words_as_they_are(checkout: Path) -> None:
    nasty = 'name=it\'s a "$HOME" `touch pwned`; touch pwned'
    assert start(checkout, "# the rack\nme@n1\n\nn2\n", "my recipe.yaml", nasty).wait() == 0
    ranks = calls(checkout, "torchrun")
    assert [call[:5] for call in ranks] == [
        ["--nnodes=2", f"--node-rank={rank}", "--nproc-per-node=4", "--rdzv-backend=static", "--master-addr=n1"]
        for rank in (0, 1)
    ]
    tail = ["--recipe", "my recipe.yaml", nasty, "cluster.num_nodes=2"]
    assert all(call[-4:] == tail for call in ranks)
    assert calls(checkout, "turbolm") == [["prepare", "my recipe.yaml", nasty, "cluster.num_nodes=2"]]
    assert not (checkout / "pwned").exists()


def test_a_failed_node_is_a_failure(checkout: Path) -> None:
    assert start(checkout, "n1\nn2\n", "fail.yaml").wait() == 3


def test_interrupted_it_asks_the_run_to_stop_and_waits(checkout: Path) -> None:
    process = start(checkout, "n1\nn2\n", "wait.yaml")
    while len(calls(checkout, "torchrun")) < 2:
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait() == 0
    assert ["stop", "runs/a run"] in calls(checkout, "turbolm")


@pytest.mark.parametrize("host", ["-oProxyCommand=touch pwned", "$(touch pwned)", "a b", "a;touch pwned"])
def test_a_host_must_look_like_one(host: str, checkout: Path) -> None:
    process = start(checkout, f"n1\n{host}\n", "r.yaml")
    assert process.wait() == 2
    assert process.stderr is not None
    assert "not a host" in process.stderr.read()
    assert not (checkout / "pwned").exists()
    assert calls(checkout, "turbolm") == []

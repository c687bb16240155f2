"""Run a node's examination in processes of its own, within a time limit. Torch-free."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from typing import Any

from turbolm.doctor.task import Task
from turbolm.reliability.orphans import end_with_parent

_SLACK_SEC = 60  # to import torch on a slow file system, and to tell


def examine(task: Task, interface: str | None) -> dict[str, Any]:
    """The report of all nodes, as every node gets it. Raises TimeoutError where the first node gives none.

    `interface`: the network interface of the task's address, which gloo would otherwise guess.
    """
    environment = {**os.environ, "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    if interface is not None:
        environment.setdefault("GLOO_SOCKET_IFNAME", interface)
    me = os.getpid()
    process = subprocess.Popen(
        [sys.executable, "-m", "turbolm.doctor", task.dump()],
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
        start_new_session=True,  # Ctrl-C reaches this process alone, which ends them
        preexec_fn=lambda: end_with_parent(me),
    )
    try:
        output, _ = process.communicate(timeout=task.meet_sec + task.measure_sec + _SLACK_SEC)
    except subprocess.TimeoutExpired:
        output = ""
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if not output.strip():
        raise TimeoutError(
            f"doctor: {task.hosts[task.node]} got no report from {task.hosts[0]}; is {task.head} port {task.port} open "
            "between the nodes?"
        )
    report: dict[str, Any] = json.loads(output)
    return report

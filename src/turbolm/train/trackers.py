"""Send the lines of metrics.jsonl to TensorBoard, W&B, trackio and MLflow, through Accelerate's trackers.

metrics.jsonl stays the record of a run; a tracker is a view of it that may fail. Each tracker lives in a thread of its
own on rank 0, so that a server that does not answer neither delays a step nor ends the run.
"""

from __future__ import annotations

import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from turbolm.files import read_json, write_json
from turbolm.recipe.contract import contract_of, fingerprint
from turbolm.redaction import redact
from turbolm.train.context import Context

Line = dict[str, Any]
_CLOSE_SEC = 30.0  # how long the end of a run waits for what is still on its way
_CONNECT_SEC = 5.0  # for W&B's server to answer; without it the run is kept offline, for `wandb sync`
_MAX_WAITING = 10_000  # lines; beyond that the tracker is behind for good and loses the newest


@dataclass(frozen=True)
class Target:
    """What trackers are opened for: the run's name and folder, the project it belongs to, and its settings."""

    name: str
    folder: Path
    project: str
    settings: Mapping[str, bool | int | float | str]

    def id_file(self, tracker: str) -> Path:
        """Holds the id that a tracker gave to this run, so that a later attempt continues the same one."""
        return self.folder / f"{tracker}.json"


class Trackers:
    """The trackers of a run, on rank 0. `say` tells people; it is called from the trackers' threads."""

    def __init__(self, names: Iterable[str], target: Target, say: Callable[[str], None]):
        self._feeds = [_Feed(name, target, say) for name in names]

    def log(self, lines: Iterable[Line]) -> None:
        """Queue lines of metrics.jsonl; returns at once."""
        for line in lines:
            for feed in self._feeds:
                feed.put(line)

    def close(self, timeout_sec: float = _CLOSE_SEC) -> None:
        """Send what is queued and close the trackers; one that takes longer is given up."""
        for feed in self._feeds:
            feed.put(None)
        deadline = time.monotonic() + timeout_sec
        for feed in self._feeds:
            feed.join(max(0.0, deadline - time.monotonic()))


def build_trackers(context: Context, say: Callable[[str], None]) -> Trackers | None:
    """The recipe's trackers, opened with the first line that is logged. For rank 0."""
    recipe, plan = context.recipe, context.plan
    if not recipe.logging.trackers:
        return None
    contract = contract_of(recipe)
    execution = recipe.execution.model_dump(mode="json")
    about = {"fingerprint": fingerprint(contract), "world_size": plan.world_size, "device": plan.device}
    settings = flatten({**contract, "execution": execution, **about})
    target = Target(recipe.name, context.run.path / "trackers", recipe.logging.project, settings)
    return Trackers(recipe.logging.trackers, target, say)


class _Feed:
    """One tracker in its thread: opened with the first line, closed by None."""

    def __init__(self, name: str, target: Target, say: Callable[[str], None]):
        self.name, self._target, self._say = name, target, say
        self._lines: queue.Queue[Line | None] = queue.Queue(_MAX_WAITING)
        self._num_lost = 0
        self._thread = threading.Thread(target=self._run, name=f"turbolm-{name}", daemon=True)
        self._thread.start()

    def put(self, line: Line | None) -> None:
        if not self._thread.is_alive():
            return  # it failed and said so
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._num_lost += 1

    def join(self, timeout_sec: float) -> None:
        self._thread.join(timeout_sec)
        if self._thread.is_alive():
            self._say(f"tracker {self.name} does not finish; given up. metrics.jsonl has every step")
        elif self._num_lost:
            self._say(f"tracker {self.name} was too slow and lost {self._num_lost} lines; metrics.jsonl has every step")

    def _run(self) -> None:
        tracker = None
        try:
            while (line := self._lines.get()) is not None:
                if tracker is None:
                    tracker = open_tracker(self.name, self._target, first_step=int(line["step"]))
                log_line(tracker, line)
            if tracker is not None:
                tracker.finish()
        except Exception as error:  # whatever a third-party client raises must not end the run
            reason = redact(f"{type(error).__name__}: {error}".partition("\n")[0])
            self._say(f"tracker {self.name} failed ({reason}); the run continues, and metrics.jsonl has every step")


def open_tracker(name: str, target: Target, first_step: int) -> GeneralTracker:
    """Accelerate's tracker of this name, started, as a continuation of what an earlier attempt logged.

    `first_step` is the first step that will be logged: what TensorBoard has from there on is hidden.
    """
    target.folder.mkdir(parents=True, exist_ok=True)
    known = read_json(target.id_file(name)) or {}
    tracker = LOGGER_TYPE_TO_CLASS[name](**_arguments(name, target, known.get("id"), first_step))
    tracker.start()
    if name == "wandb":
        # W&B drops a step lower than its newest, which a resumed or rolled-back run has: the step is a separate value
        tracker.tracker.define_metric("*", step_metric="step")
    if not known:
        write_json(target.id_file(name), {"id": _run_id(name, tracker, target)})
        tracker.store_init_configuration(dict(target.settings))
    return tracker


def _arguments(name: str, target: Target, run_id: str | None, first_step: int) -> dict[str, Any]:
    folder = str(target.folder)
    match name:
        case "tensorboard":
            return {"run_name": "tensorboard", "logging_dir": folder, "purge_step": first_step}
        case "wandb":
            known = {"id": run_id, "resume": "allow"} if run_id else {}
            mode = {"mode": "offline"} if not _reaches_wandb() else {}
            # The console and the code may hold what nobody meant to send
            private = {"console": "off", "disable_git": True, "disable_code": True}
            names = {"run_name": target.project, "name": target.name, "dir": folder}
            return {**names, **known, **mode, "settings": private}
        case "trackio":
            # Its configuration must be there when it starts: what is stored later is not sent
            settings = {"config": dict(target.settings), "resume": "allow", "embed": False}
            return {"run_name": target.project, "name": run_id or target.name, **settings}
        case "mlflow":
            return {"experiment_name": target.project, "run_name": target.name, "run_id": run_id}
    raise AssertionError(name)


def _run_id(name: str, tracker: GeneralTracker, target: Target) -> str:
    """What continues this run in a later attempt."""
    match name:
        case "wandb":
            return str(tracker.tracker.id)
        case "mlflow":
            return str(tracker.tracker.info.run_id)
    return target.name


def _reaches_wandb(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether W&B may send: its mode is set, or it has a login and its server answers.

    Otherwise it would ask for a login on a terminal, or fail and lose the lines.
    """
    if "WANDB_MODE" in environment:
        return True
    server = urlsplit(environment.get("WANDB_BASE_URL") or "https://api.wandb.ai")
    netrc = Path(environment.get("NETRC") or os.path.expanduser("~/.netrc"))
    has_login = netrc.is_file() and str(server.hostname) in netrc.read_text(encoding="utf-8", errors="replace")
    if "WANDB_API_KEY" not in environment and not has_login:
        return False
    try:
        port = server.port or (80 if server.scheme == "http" else 443)
        socket.create_connection((str(server.hostname), port), _CONNECT_SEC).close()
    except OSError:
        return bool(environment.get("HTTPS_PROXY") or environment.get("https_proxy"))
    return True


def log_line(tracker: GeneralTracker, line: Line) -> None:
    """Send one line under its own names, at its own step; lists as one value for each entry."""
    step, values = int(line["step"]), numbers(line)
    if tracker.name == "wandb":
        tracker.log({**values, "step": step})
    else:
        tracker.log(values, step=step)


def numbers(line: Line) -> Line:
    """The values of a line that a tracker can plot, by name, and the texts of an event. Lists and mappings become one
    value for each entry; the digest of the samples is for no plot."""
    values: Line = {}
    for key, value in line.items():
        if isinstance(value, (list, Mapping)):
            entries = value.items() if isinstance(value, Mapping) else enumerate(value)
            values |= numbers({f"{key}/{name}": entry for name, entry in entries})
        elif value in ("nan", "inf", "-inf"):  # as metrics.jsonl writes them
            values[key] = float(value)
        elif value is not None and key not in ("step", "data/samples"):
            values[key] = value
    return values


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """Nested settings as {'train.budget': ...}, without secrets: what trackers take as hyperparameters."""
    flat: dict[str, bool | int | float | str] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        elif isinstance(value, (bool, int, float)):
            flat[prefix + key] = value
        elif value is not None:
            flat[prefix + key] = redact(str(value))
    return flat

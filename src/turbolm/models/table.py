"""Keep the table of model types: which train packed, which one document per sequence, which are refused and why.

The table is in `README.md` beside this file, so showing it needs neither torch nor time. Trials (trial.py) run in child
processes: a type that crashes, hangs or needs too much memory costs only itself.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import PIPE
from typing import IO, Any

from turbolm.errors import UserError, did_you_mean
from turbolm.plan.count import causal_model_types

README = Path(__file__).with_name("README.md")
HEADING = "## Every causal language model of Transformers"
OUTCOMES = {"packed": "packed", "single": "one document per sequence", "refused": "refused", "failed": "FAILED"}
COMMAND = [sys.executable, "-m", "turbolm.models.trial"]
TIMEOUT_SEC = 600  # of one type; most take less than one second, but imports take minutes on a busy machine


def read_table() -> str:
    """Return the table as last written, with its heading."""
    text = README.read_text(encoding="utf-8")
    return text[text.index(HEADING) :]


def write_table(trials: Iterable[Mapping[str, Any]]) -> None:
    """Replace the table at the end of README.md."""
    text = README.read_text(encoding="utf-8")
    before = text[: text.index(HEADING)] if HEADING in text else text + "\n"
    README.write_text(before + render_table(trials), encoding="utf-8")


def render_table(trials: Iterable[Mapping[str, Any]]) -> str:
    """Return Markdown: what was tried, how many types had each outcome, and a row per type."""
    trials = sorted(trials, key=lambda trial: str(trial["model_type"]))
    counts = Counter(trial["outcome"] for trial in trials)
    told = ", ".join(f"{counts[outcome]} {name}" for outcome, name in OUTCOMES.items() if counts[outcome])
    rows = [f"| {trial['model_type']} | {OUTCOMES[trial['outcome']]} | {_reason(trial)} |" for trial in trials]
    return (
        f"{HEADING}\n\n"
        f"Transformers {importlib.metadata.version('transformers')}, {len(trials)} types: {told}. Each was built small "
        "in fp32, from its default configuration (`is_decoder: true` where there is such a key), with documents of "
        "different lengths and padding in a micro-batch. Loss and gradient norm of those that train equal those of "
        "Transformers' own model and loss, given each document alone, to 1e-6 and 1e-5. `turbolm models TYPE` tries a "
        "type on this machine, `make models` writes this table again.\n\n"
        "| model type | documents | why not packed |\n|---|---|---|\n" + "\n".join(rows) + "\n"
    )


def _reason(trial: Mapping[str, Any]) -> str:
    """Return the first clause of a message without its key and measurements, or the last line of a traceback."""
    if trial["outcome"] == "failed":
        return str(trial["reason"]).strip().splitlines()[-1].replace("|", "\\|")
    text = re.sub(r"^[\w.]+: ", "", " ".join(str(trial["reason"]).split()))
    text = re.sub(
        r" \((changing|one of|logits differ)[^)]*\)", "", text
    )  # numbers that other machines round differently
    text = re.split(r"; choose|; set `?data|, so packed|, with that type", text)[0]
    return text.replace("|", "\\|")


def show_or_try(types: Sequence[str], write: bool) -> bool:
    """Print the table; or try `types`, or with `write` try all and replace the table. Returns whether none failed."""
    if not types and not write:
        print(read_table(), end="")
        return True
    known = causal_model_types()
    for model_type in types:
        if model_type not in known:
            hint = did_you_mean(model_type, known)
            raise UserError(f"Transformers has no causal language model {model_type!r}{hint}")
    trials = try_types(known if write else types, num_processes=2)
    if write:
        write_table(trials)
    return all(trial["outcome"] != "failed" for trial in trials)


def try_types(types: Sequence[str], num_processes: int) -> list[dict[str, Any]]:
    """Try each type and print a line about it; the keys are those of `turbolm.models.trial.Trial`."""
    numbers = itertools.count(1)

    def report(trial: dict[str, Any]) -> None:
        said = [OUTCOMES[trial["outcome"]], *filter(None, [trial["reason"]])]
        print(f"{next(numbers)}/{len(types)} {trial['model_type']}: {': '.join(said)}", flush=True)

    with ThreadPoolExecutor(num_processes) as pool:
        shares = [types[first::num_processes] for first in range(num_processes)]
        return [trial for trials in pool.map(_try_in_process, shares, itertools.repeat(report)) for trial in trials]


def _try_in_process(types: Sequence[str], report: Callable[[dict[str, Any]], None]) -> list[dict[str, Any]]:
    """Try one type after another in a child process; when it dies, start a new one for the remaining types."""
    trials: list[dict[str, Any]] = []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    while len(trials) < len(types):
        with subprocess.Popen(
            COMMAND, stdin=PIPE, stdout=PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
        ) as process:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write("\n".join(types[len(trials) :]))
            process.stdin.close()
            while answer := _read_line(process, process.stdout):
                trials.append(json.loads(answer))
                report(trials[-1])
        if len(trials) < len(types):
            reason = f"its process died with code {process.returncode}"
            trials.append({"model_type": types[len(trials)], "outcome": "failed", "reason": reason})
            report(trials[-1])
    return trials


def _read_line(process: subprocess.Popen[str], stream: IO[str]) -> str:
    timer = threading.Timer(TIMEOUT_SEC, process.kill)
    timer.start()
    line = stream.readline()
    timer.cancel()
    return line

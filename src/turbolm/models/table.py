"""The table of model types: which are trained packed, which one document a row, which are refused and why.

`README.md` beside this file holds it, so that showing it needs neither torch nor time. Trials (trial.py) run in
processes of their own: a type that crashes, hangs or wants too much memory costs only itself.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import itertools
import json
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from turbolm.errors import UserError
from turbolm.plan.count import causal_model_types

README = Path(__file__).with_name("README.md")
HEADING = "## Every causal language model of Transformers"
OUTCOMES = {"packed": "packed", "single": "one document a row", "refused": "refused", "failed": "FAILED"}
COMMAND = [sys.executable, "-m", "turbolm.models.trial"]
TIMEOUT_SEC = 600  # of one type; most take less than one second, but imports take minutes on a busy machine


def read_table() -> str:
    """The table as it was last written, with its heading."""
    text = README.read_text(encoding="utf-8")
    return text[text.index(HEADING) :]


def write_table(trials: Iterable[Mapping[str, Any]]) -> None:
    """Replace the table in README.md, which it ends."""
    text = README.read_text(encoding="utf-8")
    before = text[: text.index(HEADING)] if HEADING in text else text + "\n"
    README.write_text(before + render_table(trials), encoding="utf-8")


def render_table(trials: Iterable[Mapping[str, Any]]) -> str:
    """Markdown: what was tried, how many came out how, and a line for each type."""
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
        "type on this machine, `make models` writes this table anew.\n\n"
        "| model type | documents | why not packed |\n|---|---|---|\n" + "\n".join(rows) + "\n"
    )


def _reason(trial: Mapping[str, Any]) -> str:
    """The first clause of a message, without its key and what was measured; the last line of a traceback."""
    if trial["outcome"] == "failed":
        return str(trial["reason"]).strip().splitlines()[-1].replace("|", "\\|")
    text = re.sub(r"^[\w.]+: ", "", " ".join(str(trial["reason"]).split()))
    text = re.sub(
        r" \((changing|one of|logits differ)[^)]*\)", "", text
    )  # numbers that another machine rounds otherwise
    text = re.split(r"; choose|; set `?data|, so packed|, with that type", text)[0]
    return text.replace("|", "\\|")


def show_or_try(types: Sequence[str], write: bool) -> bool:
    """Print the table; or try `types`, or with `write` all of them, and replace it. Whether none failed."""
    if not types and not write:
        print(read_table(), end="")
        return True
    known = causal_model_types()
    for model_type in types:
        if model_type not in known:
            near = difflib.get_close_matches(model_type, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"Transformers has no causal language model {model_type!r}{hint}")
    trials = try_types(known if write else types, num_processes=2)
    if write:
        write_table(trials)
    return all(trial["outcome"] != "failed" for trial in trials)


def try_types(types: Sequence[str], num_processes: int) -> list[dict[str, Any]]:
    """Try each type and print a line about each; the keys are those of `turbolm.models.trial.Trial`."""
    workers: SimpleQueue[_Worker] = SimpleQueue()
    for _ in range(num_processes):
        workers.put(_Worker())
    numbers = itertools.count(1)

    def ask(model_type: str) -> dict[str, Any]:
        worker = workers.get()
        result = worker.ask(model_type)
        workers.put(worker)
        told = [OUTCOMES[result["outcome"]], *filter(None, [result["reason"]])]
        print(f"{next(numbers)}/{len(types)} {model_type}: {': '.join(told)}", flush=True)
        return result

    with ThreadPoolExecutor(num_processes) as pool:
        results = list(pool.map(ask, types))
    for _ in range(num_processes):
        workers.get().close()
    return results


class _Worker:
    """A process that tries one type after another, with others after it where it dies."""

    process: subprocess.Popen[str] | None = None

    def ask(self, model_type: str) -> dict[str, Any]:
        if self.process is None:
            self.process = subprocess.Popen(
                COMMAND,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
            )
        assert self.process.stdin is not None and self.process.stdout is not None
        timer = threading.Timer(TIMEOUT_SEC, self.process.kill)
        timer.start()
        try:
            print(model_type, file=self.process.stdin, flush=True)
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        timer.cancel()
        if answer:
            result: dict[str, Any] = json.loads(answer)
            return result
        return {"model_type": model_type, "outcome": "failed", "reason": f"its process died with code {self.close()}"}

    def close(self) -> int:
        """End the process; returns its exit code."""
        if self.process is None:
            return 0
        self.process.communicate()
        code, self.process = self.process.returncode, None
        return code

"""Render a recipe's Slurm script, and run it under bash with programs that only write down how they were called."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from turbolm.launch.slurm import Submission, write_submission

RECIPE: dict[str, Any] = {
    "name": "tiny",
    "model": {"config": {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 2}},
    "tokenizer": {"train": {}},
    "data": {"seq_len": 64},
    "train": {"budget": 64000, "global_batch": 1024},
}

# Writes its name, arguments and chosen variables to $CALLS, one JSON line a call, and acts as $BEHAVIOUR says.
_FAKE = f"""#!{sys.executable}
import json, os, pathlib, signal, sys, time
name, arguments = pathlib.Path(sys.argv[0]).name, sys.argv[1:]
behaviour = json.loads(os.environ.get("BEHAVIOUR", "{{}}"))
with open(os.environ["CALLS"], "a") as calls:
    calls.write(json.dumps([name, arguments, dict(os.environ)]) + "\\n")
text = " ".join(arguments)
if "hostnames" in arguments:
    print("n1\\nn2")
elif "--oneliner" in arguments:
    print(f"JobId=7 JobName=x JobState={{behaviour.get('state', 'RUNNING')}} Reason=None")
elif "turbolm.launch.job" in arguments and "open" in arguments:
    run = pathlib.Path(arguments[arguments.index("--recipe") + 1]).parents[2]
    (run / "attempts" / "3").mkdir(parents=True, exist_ok=True)
    print(3)
    sys.exit(behaviour.get("open", 0))
elif "turbolm.launch.job" in arguments:
    sys.exit(behaviour.get("settle", 0))
elif "turbolm.launch.node" in arguments:
    signal_number = behaviour.get("signal_while_training")
    if signal_number:
        os.kill(os.getppid(), signal_number)
        run = pathlib.Path(behaviour["run"])
        for _ in range(200):
            if (run / "attempts" / "3" / "stop").exists():
                break
            time.sleep(0.05)
elif "prepare" in arguments:
    if behaviour.get("signal_while_preparing"):
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        os.kill(os.getppid(), behaviour["signal_while_preparing"])
        time.sleep(10)
    sys.exit(behaviour.get("prepare", 0))
"""


@dataclass
class Shell:
    """How a script ended under bash: its exit code, standard error, and the calls of other programs."""

    code: int
    stderr: str
    calls: list[tuple[str, list[str], dict[str, str]]]

    def of(self, name: str) -> list[list[str]]:
        """The argument lists of the calls of one program."""
        return [arguments for called, arguments, _ in self.calls if called == name]


def write_recipe(folder: Path, **sections: Any) -> Path:
    """A recipe file; `sections` replace whole sections."""
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, **sections}, allow_unicode=True), encoding="utf-8")
    return path


def render(folder: Path, monkeypatch: pytest.MonkeyPatch, **sections: Any) -> Submission:
    """The submission of a recipe, with a Python that is one of the fakes below."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "executable", str(folder / "bin" / "python"))
    return write_submission(write_recipe(folder, **sections))


def make_programs(folder: Path) -> None:
    """The fakes, in `folder`/bin."""
    (folder / "bin").mkdir(exist_ok=True)
    for name in ("python", "srun", "scontrol", "apptainer", "module"):
        path = folder / "bin" / name
        path.write_text(_FAKE)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)


def run_script(script: Path, folder: Path, **behaviour: Any) -> Shell:
    """Run a rendered script as Slurm's batch shell would."""
    calls = folder / "calls"
    calls.write_text("")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")} | {
        "PATH": f"{folder / 'bin'}:/usr/bin:/bin",
        "CALLS": str(calls),
        "BEHAVIOUR": json.dumps(behaviour),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n[1-2]",
    }
    done = subprocess.run(
        ["bash", str(script)], env=environment, cwd=folder, capture_output=True, text=True, timeout=60, check=False
    )
    return Shell(done.returncode, done.stderr, [tuple(json.loads(line)) for line in calls.read_text().splitlines()])


def read_directives(script: str) -> dict[str, str]:
    """The `#SBATCH` options as sbatch reads them (_get_next_opt in opt.c): quotes and backslashes are taken off."""
    options = {}
    for line in script.splitlines():
        if line.startswith("#SBATCH "):
            option, _, value = _unquote(line.removeprefix("#SBATCH ")).partition("=")
            options[option.removeprefix("--")] = value
    return options


def _unquote(text: str) -> str:
    word, quote, escaped = "", "", False
    for char in text:
        if escaped:
            word, escaped = word + char, False
        elif char == "\\":
            escaped = True
        elif quote:
            quote, word = ("", word) if char == quote else (quote, word + char)
        elif char in "\"'":
            quote = char
        elif char.isspace() or (char == "#" and not word):
            break
        else:
            word += char
    return word

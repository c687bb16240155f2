"""`turbolm evaluate`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from typer import Option


def evaluate(
    model: Annotated[
        Path, typer.Argument(metavar="RUN|CHECKPOINT|EXPORT", help="a run's export, a checkpoint, or an exported model")
    ],
    tasks: Annotated[str, Option(help="names of the harness's tasks, or of --include, with commas between")],
    include: Annotated[
        Path | None, Option(metavar="FOLDER", help="a folder with more tasks; the Python code that they name is run")
    ] = None,
    limit: Annotated[int | None, Option(min=1, help="only the first examples of each task")] = None,
    num_fewshot: Annotated[int | None, Option(min=0, help="examples before each question; default: the task's")] = None,
    batch_size: Annotated[int, Option(min=1, help="sequences of one forward pass")] = 16,
) -> None:
    """Evaluate a model with lm-evaluation-harness; results go beside it, into its model card and the run's report."""
    from turbolm.evaluate.run import Options, evaluate_model

    names = tuple(name.strip() for name in tasks.split(",") if name.strip())
    command = shlex.join(["turbolm", *sys.argv[1:]])
    evaluate_model(model, Options(names, include, limit, num_fewshot, batch_size, command), print)

"""Run tasks of lm-evaluation-harness on an exported model."""

from __future__ import annotations

import importlib.metadata
import logging
import math
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

from turbolm.checkpoint.export import tokenizer
from turbolm.errors import UserError, did_you_mean
from turbolm.evaluate.run import Options
from turbolm.redaction import redact

SEED = 1234  # of Python, numpy, torch and the choice of few-shot examples; that of the harness, but for Python's 0
_BOOTSTRAPS = 1000  # for the standard errors of metrics that are no means
_OFFLINE = ("offline", "couldn't reach", "connection", "not found", "doesn't exist", "max retries", "resolve")


def run_tasks(folder: Path, options: Options) -> dict[str, Any]:
    """Return what the harness measures of the model in `folder`: settings, and by task its metrics. Raises UserError.

    No code of the model's folder or of a data set is run; that of the harness's tasks is, and of `options.include`.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = _tasks(options)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = _load_model(folder, device)
    text_tokenizer = _from_the_start_of_a_document(tokenizer(folder), folder)
    lm = _Model(pretrained=model, tokenizer=text_tokenizer, backend="causal", batch_size=options.batch_size)
    try:
        found = lm_eval.simple_evaluate(
            model=lm,
            tasks=list(options.tasks),
            task_manager=manager,
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            bootstrap_iters=_BOOTSTRAPS,
            log_samples=False,
            confirm_run_unsafe_code=False,
            random_seed=SEED,
            numpy_random_seed=SEED,
            torch_random_seed=SEED,
            fewshot_random_seed=SEED,
        )
    except UserError:
        raise
    except Exception as error:  # whatever tasks, data sets and their dependencies raise
        raise UserError(_why(error, options)) from error
    return {
        "lm_eval": importlib.metadata.version("lm_eval"),
        "device": device,
        "dtype": str(model.dtype).removeprefix("torch."),
        "batch_size": options.batch_size,
        "limit": options.limit,
        "seed": SEED,
        "tasks": {name: _task(found, name, measured) for name, measured in found["results"].items()},
    }


class _Model(HFLM):
    """The harness's model, where rolling losses get the first token once."""

    add_bos_token: bool | None

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """Score whole texts; the harness puts the first token before each itself, so the tokenizer must not."""
        before, self.add_bos_token = self.add_bos_token, False
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
        finally:
            self.add_bos_token = before


def _tasks(options: Options) -> TaskManager:
    """Return the tasks that can be named. Raises UserError for a name that none has."""
    try:
        manager = TaskManager(include_path=str(options.include) if options.include else None)
    except Exception as error:  # YAML that is none, in the folder
        raise UserError(f"--include: {options.include} cannot be read: {_first_line(error)}") from error
    unknown = [name for name in options.tasks if name not in manager.all_tasks]
    if unknown:
        hint = did_you_mean(unknown[0], manager.all_tasks) or "; `lm-eval ls tasks` lists them"
        raise UserError(f"--tasks: lm-evaluation-harness knows no task {unknown[0]!r}{hint}")
    return manager


def _load_model(folder: Path, device: str) -> Any:
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
    except (OSError, ValueError, TypeError, ImportError, RuntimeError) as error:
        raise UserError(f"{folder}: Transformers cannot load the model: {_first_line(error)}") from None
    return model.to(device).eval()


def _from_the_start_of_a_document(given: Any, folder: Path) -> Any:
    """Let every text begin with the token that begins each document in training, unless the tokenizer does so itself.

    A model has seen no text without it, and the harness adds it only to empty contexts.
    """
    token = given.bos_token or given.eos_token
    first = given.convert_tokens_to_ids(token) if token else None
    if first is None:
        raise UserError(f"{folder}: the tokenizer has neither bos_token nor eos_token")
    if given("a").input_ids[0] != first:
        given.backend_tokenizer.post_processor = TemplateProcessing(
            single=[token, "$A"], pair=[token, "$A", "$B"], special_tokens=[(token, first)]
        )
        assert given("a").input_ids[0] == first
    return given


def _task(found: dict[str, Any], name: str, measured: dict[str, Any]) -> dict[str, Any]:
    """Return version, examples and metrics of a task or a group of tasks."""
    counts = found.get("n-samples", {}).get(name, {})
    metrics = {}
    for key, value in measured.items():
        metric, _, of_filter = key.partition(",")
        if of_filter and not metric.endswith("_stderr") and isinstance(value, (int, float)):
            error = measured.get(f"{metric}_stderr,{of_filter}")
            label = metric if of_filter == "none" else f"{metric} ({of_filter})"
            metrics[label] = {"value": _finite(value), "stderr": _finite(error)}
    return {
        "version": found.get("versions", {}).get(name),
        "num_fewshot": found.get("n-shot", {}).get(name),
        "examples": counts.get("effective"),
        "of": counts.get("original"),
        "metrics": metrics,
    }


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _why(error: Exception, options: Options) -> str:
    """Return one line about a failure, with what to do about it."""
    text = _first_line(error)
    advice = ""
    if any(word in text.lower() for word in _OFFLINE):
        advice = "; its data are on the Hub: fetch them once where it can be reached, or use a task with local files"
    return f"--tasks {','.join(options.tasks)}: {type(error).__name__}: {text}{advice}"


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return redact(lines[0][:300]) if lines else type(error).__name__

"""Write the products of a finished run: results, then the export with its model card, a sample and a report.

Once results.json and the outcome are written, the run is finished. A later failure costs only that product and a line
in the log.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from turbolm.checkpoint.export import export_checkpoint, generate_sample, short_card
from turbolm.checkpoint.export_folder import Origin
from turbolm.checkpoint.manifest import TRAINER_STATE, list_checkpoints
from turbolm.checkpoint.push import push_export
from turbolm.data.batch.loader import recipe_evaluation_set
from turbolm.data.batch.scored import TaskScore
from turbolm.data.store.token_store import TokenStore, unigram_entropy
from turbolm.errors import EXIT_OK, RunError, UserError
from turbolm.files import read_json, write_json
from turbolm.plan.plan import Plan
from turbolm.redaction import redact
from turbolm.reliability.outcome import FINISHED, Outcome, write_outcome
from turbolm.report.evaluations import card_section, evaluations_in, read_evaluations, whole
from turbolm.report.html import write_report
from turbolm.report.metrics import read_metrics, values
from turbolm.report.planned import compare, planned_line
from turbolm.train.context import Context
from turbolm.train.evaluation import EvaluationResult
from turbolm.train.run_directory import RunDirectory
from turbolm.units import format_count

T = TypeVar("T")
Say = Callable[[str], None]
_MAX_REASON = 300  # characters of an error's message
_MAX_SAMPLED_PARAMETERS = 3 * 10**9  # the first node's CPU draws the sample, while all nodes are held
# To export, one process hashes the checkpoint (12 bytes a parameter), reads the weights, writes them, and reads both to
# compare (10 more): at 1 GB/s 5 minutes, for which all nodes wait. The ranks do not share this work: only Transformers
# knows how a model's weights are named and fused in its files, so `turbolm export` on one node does it afterwards.
_MAX_EXPORTED_PARAMETERS = 15 * 10**9
_CURVE_POINTS = 10
_MAX_EXPONENT = 700.0  # math.exp raises beyond 709

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [turbolm, pretraining]
---
# {name}

A causal language model of {parameters} parameters, pretrained with turbolm on {tokens} tokens.

| | |
| --- | --- |
{rows}

{curve}## Data
{data}

{held_out}

## Recipe
```yaml
{recipe}```
"""


def finish_run(context: Context, evaluation: EvaluationResult | None, num_parameters: int, say: Say) -> dict[str, Any]:
    """Write results.json and the outcome, then call `add_products`; return the results.

    `evaluation` is None if there is nothing to evaluate on. Raises RunError if results.json or the outcome cannot be
    written.
    """
    plan, run = context.plan, context.run
    checkpoint, recipe = list_checkpoints(run.checkpoints)[-1][1], plan.recipe
    results: dict[str, Any] = {
        "name": recipe.name,
        "parameters": num_parameters,
        "budget_tokens": recipe.train.budget,
        "tokens_seen": plan.curriculum.tokens_seen(plan.num_steps),
        "steps": plan.num_steps,
        **(_measured(context, evaluation, say) if evaluation else {}),
        "precision": plan.precision,
        "checkpoint": str(checkpoint),
        "export": None,
    }
    state = read_json(checkpoint / TRAINER_STATE) or {}
    if state.get("restarts"):
        results["restarts"] = state["restarts"]
    if state.get("weight_average"):
        of_average = evaluation.average if evaluation else None
        results["weight_average"] = {**state["weight_average"], **(_figures(of_average) if of_average else {})}
    if evaluations := read_evaluations(run.path):
        results["evaluations"] = evaluations
    planned = _attempt("the comparison with the plan", lambda: compare(run.path), say)
    if planned is not None and planned[0]:
        results["planned"] = {row.figure: {"planned": row.planned, "measured": row.measured} for row in planned[0]}
        results["planned"]["notes"] = list(planned[1])
    try:
        write_json(run.results, results)
        conclude(context, FINISHED, f"trained and saved; the export did not end: {_cure(context, checkpoint)}")
    except OSError as error:
        raise RunError(
            f"the results of {run.path} cannot be written: {error}; {checkpoint} is saved, and the same command tries "
            "again"
        ) from error
    results = add_products(context, results, say)
    failed = f"trained and saved; the export failed: {_cure(context, checkpoint)}" if _lacks(results) else ""
    _attempt("outcome.json", lambda: conclude(context, FINISHED, failed), say)
    return results


def conclude(context: Context, status: str, message: str = "") -> None:
    """Record that the run is trained: whatever happens to its export, this attempt has not failed. Raises OSError."""
    write_outcome(context.run.attempt(context.attempt), Outcome(status, EXIT_OK, message))


def _lacks(results: dict[str, Any]) -> bool:
    return results.get("export", "") is None


def _cure(context: Context, checkpoint: Path) -> str:
    return f"`{_export_command(context, checkpoint)}` makes one"


def _export_command(context: Context, checkpoint: Path, out: object = "OUT") -> str:
    return f"turbolm export {checkpoint} {out}" + (" --average" if _exports_average(context, checkpoint) else "")


def _exports_average(context: Context, checkpoint: Path) -> bool:
    return _is_average_wanted(context) and _has_average(checkpoint)


def _is_average_wanted(context: Context) -> bool:
    average = context.recipe.evaluation.weight_average
    return average is not None and average.export


def _has_average(checkpoint: Path) -> bool:
    return bool((read_json(checkpoint / TRAINER_STATE) or {}).get("weight_average"))


def add_products(context: Context, results: dict[str, Any], say: Say) -> dict[str, Any]:
    """Export the last checkpoint with a model card, sample from it and write report.html; returns the results.

    A failure affects only that product, and `say` gets the reason. `export` of the results stays None where the export
    failed; a model too large to export while several nodes wait has none, and `export_command` says how to make it.
    """
    run, recipe = context.run, context.recipe
    checkpoint, out = list_checkpoints(run.checkpoints)[-1][1], run.path / "export"

    def add(key: str, value: str) -> None:
        results[key] = value
        if evaluations := read_evaluations(run.path):  # more may have been made since
            results["evaluations"] = evaluations
        _attempt("results.json", lambda: write_json(run.results, results), say)

    averaged = _exports_average(context, checkpoint)
    if _is_average_wanted(context) and not averaged:
        say(
            f"{checkpoint.name} has no mean of the weights (evaluation.weight_average.export): it was saved without "
            "it; the last weights are exported"
        )
    if "weight_average" in results:
        results["weight_average"]["exported"] = averaged
    made = _attempt("the model card", lambda: model_card(run, results, context.store), say)
    card = made or short_card(run.path, checkpoint, averaged=averaged)
    advice = f"; {checkpoint} is safe: the same command tries again, and {_cure(context, checkpoint)}"
    if out.exists():
        advice += f"; {out} is that of an earlier budget"

    def make_export() -> Path:
        precision = context.plan.precision
        return export_checkpoint(checkpoint, run.model, out, precision=precision, card=card, averaged=averaged)

    is_left = _is_left_for_later(context, results["parameters"])
    if is_left:
        results.pop("export", None)
        add("export_command", _export_command(context, checkpoint, out))
        say(
            f"no export: {context.recipe.cluster.num_nodes} nodes would wait for one process that writes more than "
            f"{format_count(_MAX_EXPORTED_PARAMETERS)} parameters; on one node, run `{results['export_command']}`"
        )
    export = None if is_left else _attempt("the export", make_export, say, advice)
    if export is not None:
        add("export", str(export))
    num_tokens, seed = recipe.logging.sample_tokens, recipe.train.seed
    if export is not None and num_tokens and results["parameters"] > _MAX_SAMPLED_PARAMETERS:
        say(f"no sample: the CPU would take long for more than {format_count(_MAX_SAMPLED_PARAMETERS)} parameters")
    elif export is not None and num_tokens:
        sample = _attempt("the sample", lambda: generate_sample(export, num_tokens, seed=seed), say)
        if sample:
            add("sample", sample)
    pushed = None if export is None else _push(context, export, say)
    if pushed is not None:
        add("pushed_to", pushed)
    report = _attempt("report.html", lambda: write_report(run.path), say)
    return results if report is None else {**results, "report": str(report)}


def _push(context: Context, export: Path, say: Say) -> str | None:
    """Upload the export where the recipe asks for it; returns its address on the hub."""
    settings = context.recipe.export
    repository, private = settings.push_to, settings.private
    if repository is None:
        return None
    advice = f"; `turbolm push {export} {repository}{' --private' * private}` tries again"
    return _attempt(
        "the push to the hub",
        lambda: push_export(export, repository, private=private, key="export.push_to"),
        say,
        advice,
    )


def _is_left_for_later(context: Context, num_parameters: int) -> bool:
    return context.recipe.cluster.num_nodes > 1 and num_parameters > _MAX_EXPORTED_PARAMETERS


def _attempt(what: str, make: Callable[[], T], say: Say, advice: str = "") -> T | None:
    """Return the result of `make`, or None and a line if it fails in any way: the run is trained and saved."""
    try:
        return make()
    except Exception as error:
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        reason = " ".join(redact(str(error)).split())[:_MAX_REASON]
        say(f"{what} failed: {kind}{reason}{advice}")
        return None


def _measured(context: Context, evaluation: EvaluationResult, say: Say) -> dict[str, Any]:
    """Return the results of the last evaluation, without unknown ones."""
    found = _figures(evaluation)
    if evaluation.loss is not None:
        entropy = _attempt("the unigram entropy", lambda: validation_entropy(context.plan, context.store), say)
        found |= {"unigram_entropy": entropy, "eval_targets": evaluation.num_targets}
    return {key: value for key, value in found.items() if value is not None}


def _figures(evaluation: EvaluationResult) -> dict[str, Any]:
    """Return what was measured of the weights, or of their mean, without what is unknown or not evaluated."""
    found: dict[str, Any] = {"eval_loss": evaluation.loss, "bits_per_byte": evaluation.bits_per_byte}
    for key, parts in (("eval_losses", evaluation.losses), ("eval_tasks", evaluation.tasks)):
        found[key] = {name: asdict(part) for name, part in parts.items()} or None
    return {key: value for key, value in found.items() if value is not None}


def validation_entropy(plan: Plan, store: TokenStore) -> float:
    """Return the entropy of the evaluated tokens' distribution, in nats: no model without context can do better."""
    ranges = recipe_evaluation_set(plan.recipe, store).documents
    counts = [store.token_counts("validation", None, *documents) for documents in ranges]
    return unigram_entropy(np.sum(counts, axis=0))


def model_card(run: RunDirectory, results: dict[str, Any], store: TokenStore) -> str:
    """Return the README.md of the export."""
    about = {"precision": results["precision"], "token store": f"`{store.fingerprint}`"}
    rows = {**_card_rows(results), **about}
    held_out = "No documents were held out for evaluation."
    if "eval_targets" in results:
        held_out = (
            "Documents were held out for evaluation by content hash, and no text is in both splits; evaluated on "
            f"{results['eval_targets']:,} of their tokens."
        )
    is_averaged = bool(results.get("weight_average", {}).get("exported"))
    name = str(Origin(run.path.name, Path(results["checkpoint"]).name, is_averaged))
    evaluated = card_section([one for one in whole(evaluations_in(results)) if one["model"] == name])
    card = _CARD.format(
        name=results["name"],
        parameters=format_count(results["parameters"]),
        tokens=format_count(results["tokens_seen"]),
        rows="\n".join(f"| {key} | {value} |" for key, value in rows.items()),
        curve=_curve(run),
        data="\n".join(f"- `{json.dumps(source)}`" for source in store.manifest["sources"]),
        held_out=held_out,
        recipe=(run.path / "recipe.yaml").read_text(encoding="utf-8"),
    )
    return f"{card}\n{evaluated}" if evaluated else card


def _curve(run: RunDirectory) -> str:
    """Return the loss over the run as a section of the model card: held out where it was evaluated, else in training.

    Some points, evenly in tokens, with the first and the last.
    """
    metrics = read_metrics(run.metrics)
    name, points = "held-out loss", values(metrics, "eval/loss")
    if len(points) < 2:
        name, points = "training loss", values(metrics, "train/loss")
    if not points:
        return ""
    last = len(points) - 1
    kept = sorted({round(last * index / (_CURVE_POINTS - 1)) for index in range(_CURVE_POINTS)})
    rows = "\n".join(f"| {format_count(points[index][0])} | {points[index][1]:.4f} |" for index in kept)
    return f"## Loss\n| tokens | {name} (nats/token) |\n| --- | --- |\n{rows}\n\n"


def summary(results: dict[str, Any]) -> str:
    """Return the summary that a finished run prints."""
    rows = {
        **(_measured_rows(results) or {"eval loss": "none: data.validation is 0"}),
        **_average_rows(results),
        "checkpoint": results["checkpoint"],
        "export": results.get("export") or _why_no_export(results),
    }
    if results.get("restarts"):
        restarts = results["restarts"]
        rows["random restarts"] = (
            f"candidate {restarts['chosen'] + 1} of {len(restarts['losses'])}; the others took "
            f"{format_count(restarts['extra_tokens'])} tokens on top"
        )
    if results.get("planned"):
        rows["planned"] = planned_line(results["planned"])
    if results.get("pushed_to"):
        rows["pushed to"] = results["pushed_to"]
    if results.get("report"):
        rows["report"] = results["report"]
    lines = [
        f"finished  {format_count(results['parameters'])} parameters, {format_count(results['tokens_seen'])} tokens, "
        f"{results['steps']} steps",
        *(f"  {name:<16} {value}" for name, value in rows.items()),
    ]
    if results.get("sample"):
        indented = "\n".join(f"    | {line}" for line in results["sample"].splitlines()[:20])
        lines.append(f"  a sample the model wrote:\n{indented}")
    return "\n".join(lines)


def _why_no_export(results: dict[str, Any]) -> str:
    command = results.get("export_command")
    return f"left to `{command}`" if command else "none: it failed, see above"


def _measured_rows(results: dict[str, Any]) -> dict[str, str]:
    """Return the last evaluation's lines in summary and model card; empty if there was none."""
    rows = {}
    if "eval_loss" in results:
        loss = results["eval_loss"]
        perplexity = math.exp(min(loss, _MAX_EXPONENT))
        rows["eval loss"] = f"{loss:.4f} nats/token (perplexity {perplexity:.1f})"
    if "unigram_entropy" in results:
        entropy = results["unigram_entropy"]
        where = "below" if loss <= entropy else "above"
        rows["unigram entropy"] = f"{entropy:.4f} nats/token: the model is {abs(entropy - loss):.2f} {where} it"
    if "bits_per_byte" in results:
        rows["bits per byte"] = f"{results['bits_per_byte']:.4f}"
    for name, part in results.get("eval_losses", {}).items():
        rows[f"loss of {name}"] = f"{part['loss']:.4f} nats/token over {part['targets']:,} tokens"
    for name, score in results.get("eval_tasks", {}).items():
        rows[f"task {name}"] = str(TaskScore(**score))
    return rows


def _average_rows(results: dict[str, Any]) -> dict[str, str]:
    """Return the lines about the mean of the weights, if there is one."""
    average = results.get("weight_average")
    if average is None:
        return {}
    loss = f"{average['eval_loss']:.4f} nats/token; " if "eval_loss" in average else ""
    exported = "; the export has these" if average.get("exported") else ""
    others = {f"{key}, averaged": value for key, value in _measured_rows(average).items() if key != "eval loss"}
    return {"averaged weights": f"{loss}{_mean_of(average)}{exported}", **others}


def _card_rows(results: dict[str, Any]) -> dict[str, str]:
    """Return the model card's lines about the weights that are exported."""
    average = results.get("weight_average", {})
    if not average.get("exported"):
        return {**_measured_rows(results), **_average_rows(results)}
    measured = dict(average)
    last, curve = "", "the curve below is of the weights in training"
    if "eval_loss" in average and "unigram_entropy" in results:
        measured["unigram_entropy"] = results["unigram_entropy"]
    if "eval_loss" in results:
        last = f", and the last of these have an eval loss of {results['eval_loss']:.4f}"
    what = f"{_mean_of(average)} (evaluation.weight_average); the figures of this table are the mean's; {curve}{last}"
    return {"weights": what, **_measured_rows(measured)}


def _mean_of(average: dict[str, Any]) -> str:
    return f"the mean of {average['count']} from step {average['first_step']} on"

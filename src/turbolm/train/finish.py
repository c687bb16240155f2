"""Write the products of a finished run: results, then the export with its model card, a sample and a report; push it.

Once results.json and the outcome are written, the run is finished. A later failure costs only that product and a line
in the log. A later start of the run makes the export and the push that it lacks.
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
from turbolm.data.batch.loader import recipe_evaluation_set
from turbolm.data.batch.scored import TaskScore
from turbolm.data.store.token_store import TokenStore, unigram_entropy
from turbolm.errors import EXIT_FAILED, EXIT_OK, RunError, UserError
from turbolm.files import read_json, write_json
from turbolm.plan.plan import Plan
from turbolm.redaction import redact
from turbolm.reliability import heartbeat
from turbolm.reliability.outcome import COMPLETE, FINISHED, Outcome, write_outcome
from turbolm.report.evaluations import card_section, evaluations_in, read_evaluations, whole
from turbolm.report.html import write_report
from turbolm.report.metrics import read_metrics, values
from turbolm.report.planned import compare, planned_line
from turbolm.train.context import Context
from turbolm.train.evaluation import EvaluationResult
from turbolm.train.run_directory import RunDirectory, lacks_export
from turbolm.train.run_export import (
    export_command,
    exports_average,
    is_average_wanted,
    lacks_push,
    push_command,
    push_run,
)
from turbolm.units import format_count

T = TypeVar("T")
Say = Callable[[str], None]
_MAX_REASON = 300  # characters of a library's message
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
    """Write results.json and the outcome, then call `add_products` and push the export; return the results.

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
        conclude(context, FINISHED, _unmade(context, results, "did not end"))
    except OSError as error:
        raise RunError(
            f"the results of {run.path} cannot be written: {error}; {checkpoint} is saved, and the same command tries "
            "again"
        ) from error
    results = add_products(context, results, say)
    if results.get("export") and lacks_push(recipe, results):
        _attempt("outcome.json", lambda: conclude(context, FINISHED, _unmade(context, results, "did not end")), say)
        results = _push(context, results, say)
    _attempt("outcome.json", lambda: conclude(context, FINISHED, _unmade(context, results, "failed")), say)
    return results


def complete_run(context: Context, say: Say) -> int:
    """Make the export and the push that a finished run lacks; return the exit code of the start, which does only that.

    Raises OSError if the outcome cannot be written.
    """
    results = read_json(context.run.results) or {}

    def end(how: str) -> int:
        unmade = _unmade(context, results, how)
        code = EXIT_FAILED if unmade else EXIT_OK
        conclude(context, COMPLETE, unmade, code)
        return code

    end("did not end")
    if lacks_export(context.run):
        say("exporting the model")
        with heartbeat.phase(heartbeat.EXPORTING):
            results = add_products(context, results, say)
        say(summary(results))
        end("did not end")
    if lacks_push(context.recipe, results) and results.get("export", "") is not None:
        say("pushing the export")
        with heartbeat.phase(heartbeat.EXPORTING):
            results = _push(context, results, say)
    code = end("failed")
    if code == EXIT_OK:
        say(f"{context.run.path} is complete; see {context.run.results}")
    return code


def conclude(context: Context, status: str, message: str = "", code: int = EXIT_OK) -> None:
    """Record that the run is trained: an attempt that trained has not failed, whatever its export does.

    Raises OSError.
    """
    write_outcome(context.run.attempt(context.attempt), Outcome(status, code, message))


def _unmade(context: Context, results: dict[str, Any], how: str) -> str:
    """Return what a trained run lacks, its export or its push, which did not end or failed, and what makes it."""
    recipe, push = context.recipe, f"`{push_command(context.recipe, context.run.export)}`"
    if results.get("export", "") is None:
        return f"trained and saved; the export {how}: {_cure(context, results)}"
    if not lacks_push(recipe, results):
        return ""
    if "export_command" in results:
        return f"trained and saved; not pushed: run `{results['export_command']}` on one node, then {push}"
    return f"trained, saved and exported; the push {how}: {push} does it, and so does the same command"


def _cure(context: Context, results: dict[str, Any]) -> str:
    push = f", and `{push_command(context.recipe, 'OUT')}` uploads it" if lacks_push(context.recipe, results) else ""
    return f"`{_export_command(context, results, 'OUT')}` makes one{push}"


def _export_command(context: Context, results: dict[str, Any], out: object) -> str:
    checkpoint = list_checkpoints(context.run.checkpoints)[-1][1]
    return export_command(checkpoint, out, averaged=exports_average(context.recipe, results))


def add_products(context: Context, results: dict[str, Any], say: Say) -> dict[str, Any]:
    """Export the last checkpoint with a model card, sample from it and write report.html; returns the results.

    A failure affects only that product, and `say` gets the reason. `export` of the results stays None where the export
    failed; a model too large to export while several nodes wait has none, and `export_command` says how to make it.
    """
    run, recipe = context.run, context.recipe
    checkpoint, out = list_checkpoints(run.checkpoints)[-1][1], run.export
    averaged = exports_average(recipe, results)

    def add(key: str, value: str) -> None:
        results[key] = value
        if evaluations := read_evaluations(run.path):  # more may have been made since
            results["evaluations"] = evaluations
        _attempt("results.json", lambda: write_json(run.results, results), say)

    if is_average_wanted(recipe) and not averaged:
        say(
            f"{checkpoint.name} has no mean of the weights (evaluation.weight_average.export): it was saved without "
            "it; the last weights are exported"
        )
    if "weight_average" in results:
        results["weight_average"]["exported"] = False
    made = _attempt("the model card", lambda: model_card(run, results, context.store, averaged=averaged), say)
    card = made or short_card(run.path, checkpoint, averaged=averaged)
    advice = f"; {checkpoint} is safe: the same command tries again, and {_cure(context, results)}"
    if out.exists():
        advice += f"; {out} is that of an earlier budget"

    def make_export() -> Path:
        precision = context.plan.precision
        return export_checkpoint(checkpoint, run.model, out, precision=precision, card=card, averaged=averaged)

    is_left = _is_left_for_later(context, results["parameters"])
    if is_left:
        results.pop("export", None)
        add("export_command", _export_command(context, results, out))
        push = f", then `{push_command(recipe, out)}`" if lacks_push(recipe, results) else ""
        say(
            f"no export: {recipe.cluster.num_nodes} nodes would wait for one process that writes more than "
            f"{format_count(_MAX_EXPORTED_PARAMETERS)} parameters; on one node, run `{results['export_command']}`{push}"
        )
    export = None if is_left else _attempt("the export", make_export, say, advice)
    if export is not None:
        if "weight_average" in results:
            results["weight_average"]["exported"] = averaged
        add("export", str(export))
    num_tokens, seed = recipe.logging.sample_tokens, recipe.train.seed
    if export is not None and num_tokens and results["parameters"] > _MAX_SAMPLED_PARAMETERS:
        say(f"no sample: the CPU would take long for more than {format_count(_MAX_SAMPLED_PARAMETERS)} parameters")
    elif export is not None and num_tokens:
        sample = _attempt("the sample", lambda: generate_sample(export, num_tokens, seed=seed), say)
        if sample:
            add("sample", sample)
    report = _attempt("report.html", lambda: write_report(run.path), say)
    return results if report is None else {**results, "report": str(report)}


def _push(context: Context, results: dict[str, Any], say: Say) -> dict[str, Any]:
    """Upload the export to where the recipe says; returns the results."""
    pushed = _attempt("the push to the hub", lambda: push_run(context.run, context.recipe), say)
    return results if pushed is None else {**results, "pushed_to": pushed}


def _is_left_for_later(context: Context, num_parameters: int) -> bool:
    return context.recipe.cluster.num_nodes > 1 and num_parameters > _MAX_EXPORTED_PARAMETERS


def _attempt(what: str, make: Callable[[], T], say: Say, advice: str = "") -> T | None:
    """Return the result of `make`, or None and a line if it fails in any way: the run is trained and saved."""
    try:
        return make()
    except Exception as error:
        reason = " ".join(redact(str(error)).split())
        if not isinstance(error, UserError):
            reason = f"{type(error).__name__}: {reason[:_MAX_REASON]}"
        say(f"{what} failed: {reason}{advice}")
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


def model_card(run: RunDirectory, results: dict[str, Any], store: TokenStore, *, averaged: bool) -> str:
    """Return the README.md of an export of the last weights, or of their mean."""
    about = {"precision": results["precision"], "token store": f"`{store.fingerprint}`"}
    rows = {**_card_rows(results, averaged=averaged), **about}
    held_out = "No documents were held out for evaluation."
    if "eval_targets" in results:
        held_out = (
            "Documents were held out for evaluation by content hash, and no text is in both splits; evaluated on "
            f"{results['eval_targets']:,} of their tokens."
        )
    name = str(Origin(run.path.name, Path(results["checkpoint"]).name, averaged))
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


def _card_rows(results: dict[str, Any], *, averaged: bool) -> dict[str, str]:
    """Return the model card's lines about the weights that are exported."""
    if not averaged:
        return {**_measured_rows(results), **_average_rows(results)}
    average = results["weight_average"]
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

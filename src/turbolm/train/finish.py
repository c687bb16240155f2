"""What a finished run leaves behind: results, export with model card, sample, report."""

from __future__ import annotations

import json
import math
from typing import Any

from turbolm.checkpoint.export import export_checkpoint, generate_sample
from turbolm.checkpoint.manifest import TRAINER_STATE, list_checkpoints
from turbolm.data.loader import evaluation_set
from turbolm.data.store import TokenStore, unigram_entropy
from turbolm.plan.plan import Plan
from turbolm.report.html import write_report
from turbolm.train.evaluation import EvaluationResult
from turbolm.train.run_directory import RunDirectory, read_json, write_json
from turbolm.units import format_count

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

## Data
{data}

Documents were held out for evaluation by content hash; no text is on both sides.

## Recipe
```yaml
{recipe}```
"""


def finish_run(
    run: RunDirectory, plan: Plan, store: TokenStore, evaluation: EvaluationResult, num_parameters: int
) -> dict[str, Any]:
    """Export the last checkpoint, sample from it, write results.json and report.html; returns the results."""
    checkpoint = list_checkpoints(run.checkpoints)[-1][1]
    recipe = plan.recipe
    results: dict[str, Any] = {
        "name": recipe.name,
        "parameters": num_parameters,
        "budget_tokens": recipe.train.budget,
        "tokens_seen": plan.curriculum.tokens_seen(plan.num_steps),
        "steps": plan.num_steps,
        "eval_loss": evaluation.loss,
        "bits_per_byte": evaluation.bits_per_byte,
        "unigram_entropy": validation_entropy(plan, store),
        "eval_targets": evaluation.num_targets,
        "precision": plan.precision,
        "checkpoint": str(checkpoint),
        "export": str(run.path / "export"),
    }
    restarts = (read_json(checkpoint / TRAINER_STATE) or {}).get("restarts")
    if restarts:
        results["restarts"] = restarts
    card = model_card(run, results, store)
    export = export_checkpoint(checkpoint, run.model, run.path / "export", precision=plan.precision, card=card)
    if recipe.logging.sample_tokens:
        results["sample"] = generate_sample(export, recipe.logging.sample_tokens, seed=recipe.train.seed)
    write_json(run.results, results)
    results["report"] = str(write_report(run.path))
    return results


def validation_entropy(plan: Plan, store: TokenStore) -> float:
    """Entropy of the evaluated tokens' own distribution, in nats: no model without context can do better."""
    data = plan.recipe.data
    held_out = evaluation_set(store, data.seq_len, plan.recipe.evaluation.tokens, data.packing)
    return unigram_entropy(store.token_counts("validation", held_out.num_targets))


def model_card(run: RunDirectory, results: dict[str, Any], store: TokenStore) -> str:
    """The README.md of the export."""
    rows = {
        "eval loss": f"{results['eval_loss']:.4f} nats per token over {results['eval_targets']:,} held-out tokens",
        "bits per byte": f"{results['bits_per_byte']:.4f}",
        "unigram entropy": f"{results['unigram_entropy']:.4f} nats per token",
        "precision": results["precision"],
        "token store": f"`{store.fingerprint}`",
    }
    return _CARD.format(
        name=results["name"],
        parameters=format_count(results["parameters"]),
        tokens=format_count(results["tokens_seen"]),
        rows="\n".join(f"| {key} | {value} |" for key, value in rows.items()),
        data="\n".join(f"- `{json.dumps(source)}`" for source in store.manifest["sources"]),
        recipe=(run.path / "recipe.yaml").read_text(encoding="utf-8"),
    )


def summary(results: dict[str, Any]) -> str:
    """What a finished run prints."""
    below = results["unigram_entropy"] - results["eval_loss"]
    where = "below" if below >= 0 else "above"
    lines = [
        f"finished  {format_count(results['parameters'])} parameters, {format_count(results['tokens_seen'])} tokens, "
        f"{results['steps']} steps",
        f"  eval loss        {results['eval_loss']:.4f} nats/token (perplexity {math.exp(results['eval_loss']):.1f})",
        f"  unigram entropy  {results['unigram_entropy']:.4f} nats/token: the model is {abs(below):.2f} {where} it",
        f"  bits per byte    {results['bits_per_byte']:.4f}",
        f"  checkpoint       {results['checkpoint']}",
        f"  export           {results['export']}",
    ]
    if results.get("restarts"):
        restarts = results["restarts"]
        lines.append(
            f"  random restarts  candidate {restarts['chosen'] + 1} of {len(restarts['losses'])}; the others took "
            f"{format_count(restarts['extra_tokens'])} tokens on top"
        )
    if results.get("report"):
        lines.append(f"  report           {results['report']}")
    if results.get("sample"):
        indented = "\n".join(f"    | {line}" for line in results["sample"].splitlines()[:20])
        lines.append(f"  a sample the model wrote:\n{indented}")
    return "\n".join(lines)

"""Which data an evaluation is of: two losses compare only where it is the same. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turbolm.files import sha256_file, sha256_json

LOSS = "eval/loss"  # of the held-out documents; of its parts and of sets: eval/loss/NAME


@dataclass(frozen=True)
class EvaluatedData:
    """What an evaluation depends on besides the model, as the run's settings tell.

    Those of sets and tasks name files, not their content: `size` is how many tokens or questions a finished run found
    there.
    """

    settings: list[Any]
    size: int | None = None


def is_same_data(found: Sequence[EvaluatedData]) -> bool:
    """Whether these evaluations compare, as far as their runs tell."""
    sizes = {one.size for one in found if one.size is not None}
    return len({sha256_json(one.settings) for one in found}) <= 1 and len(sizes) <= 1


def evaluated_name(key: str) -> str | None:
    """Return the name of the set or task that a key of metrics.jsonl is about, empty for all held-out documents; None
    for other keys."""
    if key == LOSS or key.startswith(f"{LOSS}/"):
        return key.removeprefix(LOSS).removeprefix("/")
    name, _, figure = key.removeprefix("eval/").rpartition("/")
    is_task = key.startswith("eval/") and figure == "bits_per_byte" and name and "/" not in name
    return name if is_task else None


def evaluated_data(
    key: str, run_dir: Path, record: Mapping[str, Any], recipe: Mapping[str, Any], results: Mapping[str, Any]
) -> EvaluatedData:
    """Return what `key` of the run's metrics.jsonl was measured on, where `evaluated_name` gives a name.

    `record` is the content of its contract.json, `recipe` that of recipe.yaml, `results` that of results.json; what is
    missing there is None.
    """
    name = evaluated_name(key)
    contract, evaluation = _section(record, "contract"), _section(recipe, "evaluation")
    data, tokenizer = _section(contract, "data"), _section(contract, "tokenizer")
    seq_len, most, store = data.get("seq_len"), evaluation.get("tokens"), record.get("store_fingerprint")
    is_single = data.get("packing", "best_fit") == "single"
    if not key.startswith(LOSS):
        task = _entry(evaluation.get("tasks"), "name", name)
        size = _section(_section(results, "eval_tasks"), name).get("questions")
        return EvaluatedData([task.get("path"), seq_len, most], size)
    one = _entry(evaluation.get("sets"), "label", name)
    if not one:  # all held-out documents, or those of a source
        return EvaluatedData([store, seq_len, most, bool(evaluation.get("from_each_source")), is_single])
    files = {setting: value for setting, value in one.items() if value is not None}
    try:
        text = sha256_file(run_dir / "model/tokenizer.json")
    except OSError:  # not copied: a store's tokens tell which tokenizer it is, but also differ by documents
        text = str(store)
    tokens = [text, bool(tokenizer.get("special_tokens_in_text")), seq_len, is_single]
    size = _section(_section(results, "eval_losses"), name).get("targets")
    return EvaluatedData([files, most, *tokens], size)


def _section(values: Mapping[str, Any], name: object) -> Mapping[str, Any]:
    found = values.get(str(name))
    return found if isinstance(found, dict) else {}


def _entry(entries: object, key: str, name: object) -> Mapping[str, Any]:
    """Return the entry of a list whose `key` is `name`; empty without one."""
    known = [one for one in entries if isinstance(one, dict)] if isinstance(entries, list) else []
    return next((one for one in known if one.get(key) == name), {})

"""Small copies of the shipped recipes: 2 layers, a small vocabulary, 20 steps on made-up text, on one CPU.

A copy keeps the kind of model, the optimizer, the shape of the schedule, the mixture with its stages, and every flag
but those of `DROPPED`.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import yaml

from turbolm.data.prepare.tokenizer import save_tokenizer, train_tokenizer
from turbolm.plan.count import read_model_config
from turbolm.recipe.load import load_recipe
from turbolm.recipe.schema import Recipe
from turbolm.shipped import recipes_by_name
from turbolm.units import Span

NUM_STEPS, SEQ_LEN, SEQUENCES, VOCAB = 20, 64, 2, 320
DROPPED = {
    "cluster": "several machines, and GPUs",
    "train.precision": "not every CPU has bf16",
    "execution.compile": "takes a C++ compiler half a minute for each model",
    "execution.sequence_parallel": "takes several processes",
    "execution.hierarchical_partition": "takes nodes of GPUs",
}
"""What a copy cannot have here, and why; all else it has."""

_WORDS = "the model reads one long text after another and learns a little of each while its loss falls".split()


def write_corpus(folder: Path, num_sources: int = 80) -> None:
    """Write a tokenizer, and a file of made-up documents for each source that a recipe may have."""
    rng = random.Random(0)
    texts = [[_text(rng, number) for _ in range(24)] for number in range(num_sources)]
    save_tokenizer(train_tokenizer([text for some in texts for text in some], VOCAB), folder / "tokenizer")
    for number, some in enumerate(texts):
        lines = (json.dumps({"text": text}) for text in some)
        (folder / f"source-{number}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _text(rng: random.Random, number: int) -> str:
    return f"source {number}: " + " ".join(rng.choices(_WORDS, k=rng.randint(20, 80)))


def shrink_recipe(name: str, folder: Path) -> Recipe:
    """Return the small copy of a shipped recipe; `folder` holds the corpus."""
    path = recipes_by_name()[name]
    full = load_recipe(path)
    values = full.model_dump(mode="json")

    def scaled(span: str | int) -> str:
        """A span of the full run, as the share of the budget that it is."""
        return f"{100 * Span.parse(span).tokens(full.train.budget, full.train.global_batch) / full.train.budget:.9f}%"

    values["model"] = _model(full, path, folder)
    values["tokenizer"] = {"path": str(folder / "tokenizer")}
    data = values["data"]
    data |= {"seq_len": SEQ_LEN, "validation": 0.1}
    data["sources"] = [
        {
            "type": "jsonl",
            "path": str(folder / f"source-{number}.jsonl"),
            "label": source["label"],
            "min_tokens": source["min_tokens"] and 30,
            "weight": {scaled(start): weight for start, weight in source["weight"].items()}
            if isinstance(source["weight"], dict)
            else source["weight"],
        }
        for number, source in enumerate(data["sources"])
    ]
    values["train"] |= {
        "budget": NUM_STEPS * SEQUENCES * SEQ_LEN,
        "global_batch": SEQUENCES * SEQ_LEN,
        "precision": "fp32",
    }
    for key in {"warmup", "decay", "cycle"} & values["schedule"].keys():
        values["schedule"][key] = scaled(values["schedule"][key])
    values["cluster"] = {"device": "cpu", "processes_per_node": 1}
    for key in (key.partition(".")[2] for key in DROPPED if key.startswith("execution.")):
        del values["execution"][key]
    values["execution"] |= {
        "micro_batch": SEQ_LEN,
        "cache_dir": str(folder / "cache"),
        "runs_dir": str(folder / "runs"),
    }
    values["evaluation"] = {"every": "100%", "tokens": 256}
    values["checkpoint"] = {"every": "100%"}
    values["logging"] |= {"sample_tokens": 0}
    file = folder / f"{full.name}.yaml"
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    return load_recipe(file)


def _model(full: Recipe, path: Path, folder: Path) -> dict[str, Any]:
    """Return the `model` section; a checkpoint to start from is drawn at random, with half of the positions."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from turbolm.models.shrink import shrink

    section = full.model.model_dump(mode="json", exclude_defaults=True)
    described, _ = read_model_config(full, path)
    assert described is not None
    mapping = shrink(AutoConfig.for_model(**described)) | {"vocab_size": VOCAB}
    for name in ("tie_word_embeddings", "rope_parameters"):
        if name in described:
            mapping[name] = described[name]
    if full.model.pretrained is None:
        if described["model_type"] == "smollm3":  # whose default is beyond a small vocabulary
            mapping["pad_token_id"] = None
        return section | {"config": mapping, "config_file": None}
    if full.model.rope_parameters is not None:
        mapping["max_position_embeddings"] = SEQ_LEN // 2
    torch.manual_seed(0)
    checkpoint = folder / f"{full.name}-checkpoint"
    config = AutoConfig.for_model(**mapping, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    AutoModelForCausalLM.from_config(config).save_pretrained(checkpoint)
    return section | {"pretrained": str(checkpoint)}

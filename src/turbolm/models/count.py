"""`python -m turbolm.models.count`: a configuration as JSON on stdin; its problems and size as JSON on stdout.

The model is built on the meta device, which takes no memory, and run there on a few tokens. `turbolm.plan.count` runs
this in a process of its own and keeps the answer.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, masking_utils
from transformers.integrations import unset_hf_deepspeed_config

from turbolm.errors import UserError
from turbolm.models.config import Checked, Source, check_config, rope_warnings, shown
from turbolm.models.config_errors import Problem, find_culprits
from turbolm.models.config_names import Unread, declared_names
from turbolm.models.size import measure_model
from turbolm.plan.count import Answer, ModelSize

_NUM_TOKENS = 8
_RUN_SEARCH_SEC = 20


def examine(file: Mapping[str, Any] | None, config: Mapping[str, Any] | None) -> Answer:
    """What is wrong with the model that the two describe together, what to tell of it, and its size. Never raises."""
    source = Source(file, config)
    try:
        checked = check_config(source)
    except UserError as error:
        return Answer((str(error),), ())
    problems, size = list(checked.problems), None
    if checked.search.result is not None and checked.search.is_sound:
        with rope_warnings():
            more, size = _build(checked)
        problems += more
    if problems or size is None:
        return Answer(tuple(map(source.line, problems)), ())
    return Answer((), tuple(_notes(source, checked.unread)), size)


def _build(checked: Checked) -> tuple[list[Problem], ModelSize | None]:
    """The problems that show when the model is built and run, and its size."""
    reader, kind = checked.reader, checked.reader.kind.model_type
    usual = _usual(checked)
    built = find_culprits(kind, checked.search.values, lambda tried: build_on_meta(reader.make(tried)), usual=usual)
    if built.problems:
        return built.problems, None
    ran = find_culprits(
        kind, built.values, lambda tried: _check_run(build_on_meta(reader.make(tried))), _RUN_SEARCH_SEC, only_sure=True
    )
    # Some types cannot run on meta tensors whatever their configuration is; then there is no culprit.
    return [problem for problem in ran.problems if problem.path], measure_model(built.result)


def _usual(checked: Checked) -> dict[str, Any]:
    """Values for settings that a type has no default for, to find the one that is missing."""
    made = checked.search.result
    blank = [name for name in declared_names(checked.reader) if vars(made).get(name, "") is None]
    layers = ["full_attention"] * int(vars(made).get("num_hidden_layers") or 1)
    return {**dict.fromkeys(sorted(blank), 1), "head_dim": 64, "rope_theta": 10000.0, "layer_types": layers}


def build_on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    """The model without memory for its weights. Raises whatever Transformers raises."""
    unset_hf_deepspeed_config()
    with torch.device("meta"):
        # bfloat16: grouped products of experts take nothing else on meta tensors.
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, trust_remote_code=False)
    return model.eval()


def _check_run(model: PreTrainedModel) -> None:
    """Raise where the layers do not fit together: one of each if that is enough to run, else all of them."""
    try:
        with _one_of_each_layer(model):
            return _run(model)
    except Exception:
        return _run(model)


@contextmanager
def _one_of_each_layer(model: PreTrainedModel) -> Iterator[None]:
    """Let the model run with the first layer of each shape and kind: deep ones take many seconds even without data."""
    base = model.base_model
    stacks = {name: layers for name, layers in base.named_children() if isinstance(layers, torch.nn.ModuleList)}
    for name, layers in stacks.items():
        first: dict[str, torch.nn.Module] = {}
        for layer in layers:
            kind = [getattr(layer, key, None) for key in ("layer_type", "attention_type", "is_sliding")]
            first.setdefault(f"{kind} {[tuple(p.shape) for p in layer.parameters()]}", layer)
        setattr(base, name, torch.nn.ModuleList(first.values()))
    try:
        yield
    finally:
        for name, layers in stacks.items():
            setattr(base, name, layers)


def _run(model: PreTrainedModel) -> None:
    """Raise where the layers do not fit together. What a meta tensor cannot do says nothing."""
    # Looks into the positions, which have no values here.
    look, masking_utils.find_packed_sequence_indices = masking_utils.find_packed_sequence_indices, lambda _: None
    try:
        with torch.device("meta"), torch.no_grad():
            model(input_ids=torch.zeros(1, _NUM_TOKENS, dtype=torch.long), use_cache=False)
    except NotImplementedError:
        pass
    except Exception as error:
        if "meta tensor" not in str(error):
            raise
    finally:
        masking_utils.find_packed_sequence_indices = look


def _notes(source: Source, unread: list[Unread]) -> list[str]:
    """What to tell of a file: the names without effect in one line, and those that look like a misspelling apart."""
    if source.file is None:
        return []
    names = [shown(one.path) for one in unread if not one.is_misspelt]
    names += [name for name in ("quantization_config", "compression_config") if name in source.file]
    lines = [f"model.config_file: nothing reads {', '.join(names)}"] if names else []
    for one in unread:
        if one.is_misspelt:
            too = ", which is there as well" if len(one.path) == 1 and one.nearest in source.values else ""
            lines.append(f"model.config_file: nothing reads {shown(one.path)}; did you mean {one.nearest}{too}?")
    return lines


if __name__ == "__main__":
    request = json.load(sys.stdin)
    print(examine(request["file"], request["config"]).to_json())

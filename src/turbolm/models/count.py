"""`python -m turbolm.models.count`: read a configuration as JSON on stdin, write its problems and size as JSON.

The model is built on the meta device, which takes no memory, and runs there on a few tokens. `turbolm.plan.count` runs
this in a child process and caches the answer.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any
from unittest.mock import patch

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, masking_utils
from transformers.integrations import unset_hf_deepspeed_config

from turbolm.errors import UserError
from turbolm.models.config import Checked, Source, check_config, rope_warnings, shown
from turbolm.models.config_errors import Problem, find_culprits
from turbolm.models.config_names import Unread, declared_names
from turbolm.models.size import measure_model
from turbolm.plan.count import Answer, ModelSize
from turbolm.recipe.model_config import NOT_LEARNED

_NUM_TOKENS = 8
_RUN_SEARCH_SEC = 20


def examine(file: Mapping[str, Any] | None, config: Mapping[str, Any] | None) -> Answer:
    """Return what is wrong with the model that the two describe together, notes on it, and its size. Never raises."""
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
    """Build and run the model: return the problems that show, and its size."""
    reader, kind = checked.reader, checked.reader.kind.model_type
    built = find_culprits(
        kind, checked.search.values, lambda tried: build_on_meta(reader.make(tried)), usual=_usual(checked)
    )
    if built.problems:
        return built.problems, None
    ran = find_culprits(
        kind, built.values, lambda tried: _run(build_on_meta(reader.make(tried))), _RUN_SEARCH_SEC, only_sure=True
    )
    # Some types cannot run on meta tensors whatever their configuration is; then there is no culprit.
    return [problem for problem in ran.problems if problem.path], measure_model(built.result)


def _usual(checked: Checked) -> dict[str, Any]:
    """Return values for settings without a default, to find those that are missing."""
    made = vars(checked.search.result)
    blank = [name for name in declared_names(checked.reader) - NOT_LEARNED if made.get(name, "") is None]
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    return {
        **dict.fromkeys(sorted(blank), 1),
        "head_dim": 64,
        "rope_theta": 10000.0,
        "layer_types": ["full_attention"] * int(made.get("num_hidden_layers") or 1),
        "rope_parameters": {"full_attention": rope, "sliding_attention": rope},
    }


def build_on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    """Return the model without memory for its weights. Raises whatever Transformers raises."""
    unset_hf_deepspeed_config()
    with torch.device("meta"):
        # bfloat16: grouped products of experts take nothing else on meta tensors.
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, trust_remote_code=False)
    return model.eval()


def _run(model: PreTrainedModel) -> None:
    """Raise where the layers do not fit together; what a meta tensor cannot do is no error."""
    # The patched function looks at the positions, which have no values here.
    patched = patch.object(masking_utils, "find_packed_sequence_indices", lambda _: None)
    try:
        with patched, torch.device("meta"), torch.no_grad():
            model(input_ids=torch.zeros(1, _NUM_TOKENS, dtype=torch.long), use_cache=False)
    except Exception as error:
        if not isinstance(error, NotImplementedError) and "meta tensor" not in str(error):
            raise


def _notes(source: Source, unread: list[Unread]) -> list[str]:
    """Return notes on a file: the names without effect in one line, and each that looks like a misspelling."""
    if source.file is None:
        return []
    names = [shown(one.path) for one in unread if not one.is_misspelled]
    names += [name for name in ("quantization_config", "compression_config") if name in source.file]
    lines = [f"model.config_file: nothing reads {', '.join(names)}"] if names else []
    for one in unread:
        if one.is_misspelled:
            too = ", which is there as well" if len(one.path) == 1 and one.nearest in source.values else ""
            lines.append(f"model.config_file: nothing reads {shown(one.path)}; did you mean {one.nearest}{too}?")
    return lines


if __name__ == "__main__":
    request = json.load(sys.stdin)
    print(examine(request["file"], request["config"]).to_json())

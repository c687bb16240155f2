"""`python -m turbolm.models.count`: a configuration as JSON on stdin; its problems and size as JSON on stdout.

The model is built on the meta device, which takes no memory, and run there on a few tokens. `turbolm.plan.count` runs
this in a process of its own and keeps the answer.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, masking_utils
from transformers.integrations import unset_hf_deepspeed_config

from turbolm.errors import UserError
from turbolm.models.config import Checked, Source, check_config
from turbolm.models.config_errors import Problem, find_culprits
from turbolm.models.config_names import Unread
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
        more, size = _build(checked)
        problems += more
    if problems or size is None:
        return Answer(tuple(map(source.line, problems)), ())
    return Answer((), tuple(_notes(source, checked.unread)), size)


def _build(checked: Checked) -> tuple[list[Problem], ModelSize | None]:
    """The problems that show when the model is built and run, and its size."""
    reader, kind = checked.reader, checked.reader.kind.model_type
    built = find_culprits(kind, checked.search.values, lambda tried: build_on_meta(reader.make(tried)))
    if built.problems:
        return built.problems, None
    try:
        _run(built.result)
    except Exception:
        # Some types cannot run on meta tensors whatever their configuration is; then there is no culprit.
        ran = find_culprits(
            kind, built.values, lambda tried: _run(build_on_meta(reader.make(tried))), _RUN_SEARCH_SEC, only_sure=True
        )
        return [problem for problem in ran.problems if problem.path], measure_model(built.result)
    return [], measure_model(built.result)


def build_on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    """The model without memory for its weights. Raises whatever Transformers raises."""
    unset_hf_deepspeed_config()
    with torch.device("meta"):
        # bfloat16: grouped products of experts take nothing else on meta tensors.
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, trust_remote_code=False)
    return model.eval()


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
    names = [".".join(one.path) for one in unread if not one.is_misspelt]
    names += [name for name in ("quantization_config", "compression_config") if name in source.file]
    lines = [f"model.config_file: nothing reads {', '.join(names)}"] if names else []
    return lines + [
        f"model.config_file: nothing reads {'.'.join(one.path)}; did you mean {one.nearest}?"
        for one in unread
        if one.is_misspelt
    ]


if __name__ == "__main__":
    request = json.load(sys.stdin)
    print(examine(request["file"], request["config"]).to_json())

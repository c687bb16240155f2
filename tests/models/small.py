"""A small configuration of a model type, before the project has completed it."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from turbolm.models.trial import small_mapping


def small_config(model_type: str, **changes: Any) -> PreTrainedConfig:
    """That of the table of model types (width 64, a head of 16), over 128 tokens; `changes` replace single settings."""
    values = {**small_mapping(model_type), "vocab_size": 128, "pad_token_id": None, **changes}
    config: PreTrainedConfig = CONFIG_MAPPING[values.pop("model_type")](**values)
    return config

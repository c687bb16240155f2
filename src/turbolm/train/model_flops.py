"""The FLOPs of the batches that a run trains on, which its MFU is counted from."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist
from transformers import PreTrainedModel

from turbolm.data.batch.loader import GlobalBatch
from turbolm.models.size import measure_model
from turbolm.plan.flops import span_of_documents, training_flops_per_token
from turbolm.plan.parameters import ModelSize
from turbolm.plan.profile import ModelProfile
from turbolm.plan.profiles import profile_of_run
from turbolm.train.context import Context


def count_batch_flops(context: Context, model: PreTrainedModel) -> Callable[[GlobalBatch], float]:
    """Return what counts the FLOPs of a global batch, with the attention that its documents need.

    It reads the model's profile, which ships or was traced before the ranks started (`launch.store`). Without one it
    counts the weights here; then layers with windows count as if they saw all keys, and the log says so. Only rank 0,
    which writes the metrics, counts; others return 0.
    """
    if dist.get_rank() > 0:
        return lambda _: 0.0
    counted = measure_model(model)
    found = _profile(context, counted)

    def batch_flops(batch: GlobalBatch) -> float:
        spans = span_of_documents(batch.sequences.length.tolist())
        return training_flops_per_token(found, spans) * batch.num_targets

    return batch_flops


def _profile(context: Context, counted: ModelSize) -> ModelProfile | ModelSize:
    """Return the profile of the model that is trained, or its size as `counted`."""
    profile, why = profile_of_run(context.recipe, "recipe", context.store.vocab_size)
    if profile is not None and profile.num_parameters != counted.total:
        why = f"its profile has {profile.num_parameters} parameters, and the model {counted.total}"
        profile = None
    if profile is None:
        print(f"MFU is counted as 6 N + 12 L H S, with every layer seeing all of its document: {why}")
    return profile or counted

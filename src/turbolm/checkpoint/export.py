"""A checkpoint in the Hugging Face layout: safetensors, configuration, generation settings, tokenizer, model card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from turbolm.checkpoint.export_folder import Origin, check_replaceable, drop_code, replace_export
from turbolm.checkpoint.index import WEIGHT_AVERAGE
from turbolm.checkpoint.load import CheckpointReader
from turbolm.checkpoint.manifest import remove_folder
from turbolm.checkpoint.verify import verify_checkpoint
from turbolm.engine.device import DTYPES
from turbolm.errors import UserError
from turbolm.models.positions import num_positions
from turbolm.recipe.paths import make_folder
from turbolm.train.run_directory import precision_of, run_of


class Weights(Protocol):
    """What an export is made of. `checkpoint` is named in messages; tensors are read when they are needed."""

    checkpoint: Path
    shapes: dict[str, tuple[int, ...]]  # of all parameters, tied ones once

    def read_whole(self, name: str) -> torch.Tensor:
        """Return a parameter in its own shape."""

    def buffers(self) -> dict[str, torch.Tensor]:
        """Return the model's persistent buffers."""


def export_from_run(checkpoint: Path, out: Path, *, averaged: bool = False) -> Path:
    """Export a checkpoint inside a run directory, with a short model card; see `export_checkpoint`."""
    run, record = run_of(checkpoint)
    make_folder(out.absolute().parent, "OUT")
    card, precision = short_card(run.path, checkpoint, averaged=averaged), precision_of(run, record)
    return export_checkpoint(checkpoint, run.model, out, precision=precision, card=card, averaged=averaged)


def export_checkpoint(
    checkpoint: Path, model_folder: Path, out: Path, *, precision: str, card: str, averaged: bool = False
) -> Path:
    """Write the checkpoint's weights, or with `averaged` the mean of the weights that it has, to `out`.

    See `export_weights`. Raises its errors, and UserError for a checkpoint that is corrupt or has no such mean.
    """
    check_replaceable(out)
    problems = verify_checkpoint(checkpoint)
    if problems:
        raise UserError(f"{checkpoint} cannot be exported: {problems[0]}")
    with CheckpointReader(checkpoint, weights=WEIGHT_AVERAGE if averaged else "weight") as reader:
        if averaged and not reader.part.has_average:
            raise UserError(
                f"{checkpoint} has no average of the weights: evaluation.weight_average was not set, or its steps had "
                "not begun"
            )
        origin = Origin(checkpoint.absolute().parents[1].name, checkpoint.name, averaged)
        return export_weights(reader, model_folder, out, precision=precision, card=card, origin=origin)


def export_weights(
    weights: Weights,
    model_folder: Path,
    out: Path,
    *,
    precision: str,
    card: str,
    origin: Origin,
    notes: Mapping[str, str] = MappingProxyType({}),
) -> Path:
    """Write a model, in the precision it was trained in, to `out`.

    `model_folder` holds the run's configuration and tokenizer, `card` is the text of the model card, `origin` says
    whose weights they are, `notes` are files beside it. The export is loaded again as Transformers does and compared
    with `weights`, tensor by tensor. An earlier export is replaced once the new one is complete. Raises UserError if
    the new folder would hold another model, or if `out` holds a file that no export wrote.
    """
    temporary = out.with_name(f".tmp-{out.name}")
    remove_folder(temporary)
    dtype = DTYPES[precision]
    try:
        _build(weights, model_folder, dtype).save_pretrained(temporary)
        tokenizer(model_folder).save_pretrained(temporary)
        drop_code(temporary)
        _compare(weights, temporary, dtype)
        for name, text in {"README.md": card, **notes}.items():
            (temporary / name).write_text(text, encoding="utf-8")
        replace_export(out, temporary, origin)
    finally:
        remove_folder(temporary)  # of an export that failed; a full disk needs the room
    return out


def short_card(run: Path, checkpoint: Path, *, averaged: bool = False) -> str:
    """A model card that says only where the model comes from."""
    what = "The weights' running mean (evaluation.weight_average), exported" if averaged else "Exported"
    return f"# {run.name}\n\n{what} from {checkpoint.name} with turbolm.\n"


def _build(reader: Weights, model_folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model with the checkpoint's weights. The checkpoint knows whether embedding and head are tied."""
    try:
        config = AutoConfig.from_pretrained(model_folder, local_files_only=True, trust_remote_code=False)
        model = _on_meta(config)
        head = model.get_output_embeddings()
        names = {n for n, p in model.named_parameters(remove_duplicate=False) if head is not None and p is head.weight}
        if len(names & set(reader.shapes)) > 1:  # of a run whose configuration was written before weights were read
            config.tie_word_embeddings = False
            model = _on_meta(config)
    except (OSError, ValueError, TypeError, ImportError, RecursionError) as error:
        raise UserError(f"{model_folder}: no model can be built from its config.json: {error}") from None
    weights = {name: reader.read_whole(name).to(dtype) for name in reader.shapes}
    weights.update({name: buffer.clone() for name, buffer in reader.buffers().items()})
    missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    unset = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if unexpected or unset:
        raise UserError(
            f"{reader.checkpoint}: parameters do not fit {model_folder}: {(unexpected or unset or missing)[0]}"
        )
    model.config.dtype = dtype
    model.generation_config = GenerationConfig.from_model_config(model.config)
    return model


def _on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):  # the attention is named, so that the folder cannot name a kernel to download
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, trust_remote_code=False, attn_implementation="eager"
        )
    return model


def _compare(reader: Weights, folder: Path, dtype: torch.dtype) -> None:
    """Raise UserError unless the folder loads as the checkpoint's weights in `dtype`, all of them and no other."""
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation="eager",
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, TypeError, ImportError, RuntimeError) as error:
        raise UserError(f"{reader.checkpoint}: what was exported cannot be loaded again: {error}") from error
    exported, buffers = model.state_dict(keep_vars=True), reader.buffers()
    for name in (*reader.shapes, *buffers):
        expected = reader.read_whole(name) if name in reader.shapes else buffers[name]
        if name not in exported or not _same(exported[name].data, expected, dtype):
            raise UserError(
                f"{reader.checkpoint}: the export of {name} is not what was trained (Transformers writes or loads "
                f"{model.config.model_type} otherwise); nothing was exported, the checkpoint is whole"
            )
    random = sorted(info["missing_keys"])
    if random:
        raise UserError(f"{reader.checkpoint}: the export would lack {random[0]}; nothing was exported")


def _same(exported: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> bool:
    if exported.shape != expected.shape:
        return False
    if expected.is_floating_point():
        exported, expected = exported.to(dtype), expected.to(dtype)
    return torch.allclose(exported, expected, rtol=0, atol=0, equal_nan=True)


def generate_sample(model_folder: Path, num_tokens: int, *, seed: int = 0, prompt: str = "") -> str:
    """Text sampled from an exported model (top-k 50, temperature 0.8), from the start of a document or a prompt.

    At most `num_tokens` tokens, and no more than the model's positions.
    """
    vocabulary = tokenizer(model_folder)
    model = AutoModelForCausalLM.from_pretrained(
        model_folder, dtype="auto", local_files_only=True, trust_remote_code=False, use_safetensors=True
    )
    start = vocabulary.bos_token_id if vocabulary.bos_token_id is not None else vocabulary.eos_token_id
    tokens = torch.tensor([[start, *vocabulary.encode(prompt, add_special_tokens=False)]])
    positions = num_positions(model)
    if positions is not None:  # the last sampled token needs none
        num_tokens = min(num_tokens, positions - tokens.shape[1] + 1)
    if num_tokens <= 0:
        return ""
    torch.manual_seed(seed)
    with torch.no_grad():
        output = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=num_tokens,
            do_sample=True,
            top_k=50,
            temperature=0.8,
            pad_token_id=vocabulary.eos_token_id,
        )
    return str(vocabulary.decode(output[0, 1:], skip_special_tokens=True))


def tokenizer(folder: Path) -> Any:
    """The tokenizer saved in a folder; no code is taken from there. Raises UserError."""
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raise many kinds
        raise UserError(f"{folder}: Transformers cannot read the tokenizer: {error}") from None

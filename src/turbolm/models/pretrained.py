"""Load a model folder with every tensor accounted for: missing, unexpected or corrupt weights stop the start."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig, PreTrainedModel

from turbolm.errors import UserError
from turbolm.files import load_json, read_json
from turbolm.models.folder_weights import Matched, fill, match

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
# What wrappers put into names: torch.compile, FSDP and activation checkpointing anywhere; DDP and PEFT in front.
_WRAPPERS = re.compile(
    r"^(?:_orig_mod\.|module\.|base_model\.model\.)+|(?<=\.)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
    r"|^(?:_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
# Adapters that were not merged into the weights beside them.
_UNMERGED = re.compile(r"\.lora_|\.base_layer\.|\.modules_to_save\.")
# Parts of published models that text alone does not use, and heads for other tasks.
_OTHER_PARTS = re.compile(
    r"(^|\.)((vision|visual|vit|image|audio|speech|video|multi_?modal|mm_|perceiver|resampler|mtp|nextn|medusa|eagle)\w*"
    r"|\w*projector|connector|score|classifier|\w*value_head|v_head|reward_head|qa_outputs|pooler|seq_relationship)(\.|$)"
)
# Buffers that older versions saved and newer ones compute; a bias of three or more dimensions is an attention mask.
_OLD_BUFFERS = re.compile(r"(inv_freq|masked_bias|causal_mask|position_ids|(cos|sin)_cached)$")
_QUANTIZATION_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")  # beside a config.json
_SHOWN = 4
_MAX_POINTER_BYTES = 1024


@contextmanager
def open_folder(
    folder: Path, config: PreTrainedConfig, kind: type[PreTrainedModel], attention_implementation: str
) -> Iterator[Matched]:
    """Match the weights of `folder` with the tensors of a model of class `kind`; nothing but their names is read yet.

    Raises UserError for weights that are missing (except those tied to an existing one), of another shape, or left over
    inside the model's own modules; parts that text does not use, such as a vision tower, are named in the log and
    skipped.
    """
    refuse_adapter(folder)
    _check_format(folder)
    with ExitStack() as files:
        tensors, shapes = _open(folder, files)
        _refuse_quantized(folder, tensors)
        matched, info = match(tensors, config, kind, attention_implementation)
        _account(folder, matched.skeleton, info, shapes)
        yield matched


def fill_model(folder: Path, matched: Matched, model: PreTrainedModel) -> None:
    """Copy the folder's weights into `model`; of a partitioned one each process reads its own part. Then collective.

    Raises UserError, on every rank, for values that are not finite.
    """
    unset, non_finite = fill(matched, model)
    if unset:
        raise UserError(f"model.pretrained: {folder} has no weights of this shape for {_some(unset)}")
    if non_finite:
        raise UserError(
            f"model.pretrained: {folder} has NaN or infinite values in {len(non_finite)} weights: {_some(non_finite)}; "
            "take a sound copy"
        )


def refuse_adapter(folder: Path) -> None:
    """Raise UserError for a folder that holds an adapter (PEFT)."""
    adapter = read_json(folder / "adapter_config.json")
    if adapter is not None:
        raise UserError(
            f"model.pretrained: {folder} is an adapter ({adapter.get('peft_type', 'PEFT')}) of "
            f"{adapter.get('base_model_name_or_path', 'another model')}, not a model; merge it first (peft: "
            "`model.merge_and_unload().save_pretrained(FOLDER)`) and name the merged folder"
        )


def _check_format(folder: Path) -> None:
    """Raise UserError for weights that are quantized, or in no format that is read."""
    quantization = (read_json(folder / "config.json") or {}).get("quantization_config")
    beside = [name for name in _QUANTIZATION_FILES if (folder / name).is_file()]
    if quantization or beside:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise UserError(_quantized_message(folder, method or (beside or ["quantization_config"])[0]))
    if not any(folder.glob("*.safetensors")):
        others = sorted(file.name for pattern in ("*.bin", "*.pth", "*.pt", "*.gguf", "*.h5", "*.msgpack", "*.ckpt*")
                        for file in folder.glob(pattern))  # fmt: skip
        raise UserError(
            f"model.pretrained: {folder} has no *.safetensors, the only weights that are read: other formats can run "
            f"code{f' (it has {_some(others)})' if others else ''}; convert them where you trust them, with "
            "`AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)`"
        )


def _quantized_message(folder: Path, method: str) -> str:
    return (
        f"model.pretrained: {folder} holds quantized weights ({method}), which cannot be trained further; name a "
        "folder with the weights in bf16, fp16 or fp32 (the model's original, or this one dequantized)"
    )


def _weight_files(folder: Path) -> list[Path]:
    """Return the safetensors that make up the model. Raises UserError when that is unclear, or one is missing."""
    whole, index = folder / _WEIGHTS, folder / _INDEX
    if not index.is_file():
        if whole.is_file():
            return [whole]
        found = sorted(file.name for file in folder.glob("*.safetensors"))
        raise UserError(
            f"model.pretrained: {folder} has neither {_WEIGHTS} nor {_INDEX}; it has {_some(found)}: rename a single "
            "file, or save the model again with `save_pretrained`"
        )
    try:
        names = set(load_json(index)["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"model.pretrained: {index} is no index of weights: {error!r}") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(f"model.pretrained: {index} names {name!r}, which is no safetensors file of its folder")
    if whole.is_file() and names != {_WEIGHTS}:
        raise UserError(
            f"model.pretrained: {folder} has both {_WEIGHTS} and the shards of {_INDEX}; remove what is not the model"
        )
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing:
        raise UserError(
            f"model.pretrained: {folder} lacks {len(missing)} of the {len(names)} files of its index: {_some(missing)};"
            " download them, or copy the folder again"
        )
    return [folder / name for name in sorted(names)]


def _open(folder: Path, files: ExitStack) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """Return the folder's tensors, not read yet, and their shapes, by names without the prefixes of wrappers."""
    tensors: dict[str, Any] = {}
    shapes: dict[str, list[int]] = {}
    wrapped = []
    for path in _weight_files(folder):
        try:
            file = files.enter_context(safe_open(path, framework="pt"))  # reads the header, checks the size
        except (SafetensorError, OSError) as error:
            raise UserError(f"model.pretrained: {path} cannot be read: {error}{_lfs_hint(path)}") from None
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            plain = _WRAPPERS.sub("", name)
            wrapped += [name] * (plain != name)
            if plain in tensors:
                raise UserError(f"model.pretrained: {path} holds {plain} for a second time, as {name}")
            tensors[plain] = file.get_slice(name)
            shapes[plain] = tensors[plain].get_shape()
    unmerged = [name for name in tensors if _UNMERGED.search(name)]
    if unmerged:
        raise UserError(
            f"model.pretrained: {folder} holds adapter weights that are not merged ({_some(unmerged)}); merge them "
            "first (peft: `model.merge_and_unload().save_pretrained(FOLDER)`)"
        )
    if wrapped:
        print(f"model.pretrained: {len(wrapped)} names were stripped of a wrapper's part, such as {wrapped[0]}")
    return tensors, shapes


def _lfs_hint(path: Path) -> str:
    is_pointer = path.stat().st_size < _MAX_POINTER_BYTES and path.read_bytes().startswith(b"version https://git-lfs")
    return " (a Git LFS pointer: run `git lfs pull` in the folder)" if is_pointer else ""


def _refuse_quantized(folder: Path, tensors: dict[str, Any]) -> None:
    for name, tensor in tensors.items():
        kind = tensor.get_dtype()
        if kind.startswith(("F8_", "F6_", "F4")) or (kind in ("I8", "U8") and "weight" in name):  # a mask may be U8
            raise UserError(_quantized_message(folder, f"{name} is {kind}"))


def _account(folder: Path, model: PreTrainedModel, info: dict[str, Any], shapes: dict[str, list[int]]) -> None:
    """Raise UserError unless what was loaded is the whole model and nothing but it."""
    missing = sorted(info["missing_keys"])
    if missing:
        hint = ""
        head = model.get_output_embeddings()
        if all(model.get_parameter_or_buffer(name) is getattr(head, "weight", None) for name in missing):
            hint = "; if the head is the embedding, set tie_word_embeddings: true in its config.json"
        raise UserError(
            f"model.pretrained: {folder} lacks {len(missing)} of the model's weights: {_some(missing)}; they would be "
            f"random{hint}"
        )
    mismatched = sorted(f"{name} is {_shape(there)}, {_shape(ours)} by config.json"
                        for name, there, ours in info["mismatched_keys"])  # fmt: skip
    if mismatched:
        raise UserError(f"model.pretrained: {folder} does not fit its config.json: {_some(mismatched)}")
    left = sorted(name for name in info["unexpected_keys"] if not _is_old_buffer(name, shapes.get(name, [])))
    foreign = [name for name in left if not _OTHER_PARTS.search(name)]
    if foreign:
        raise UserError(
            f"model.pretrained: {folder} holds {len(foreign)} weights that {type(model).__name__} has no place for: "
            f"{_some(foreign)}; its config.json may describe another model. Where they do not matter, save the folder "
            "again without them"
        )
    if left:
        print(f"model.pretrained: {len(left)} weights of other parts are skipped: {_some(left)}")


def _is_old_buffer(name: str, shape: list[int]) -> bool:
    return bool(_OLD_BUFFERS.search(name)) or (name.endswith(".bias") and len(shape) > 2)


def settle_tying(model: PreTrainedModel) -> None:
    """Set in the configuration whether embedding and head are one parameter, as they are in the model."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or not hasattr(embedding, "weight"):
        return
    set_tying(model.config, getattr(head, "weight", None) is embedding.weight)


def set_tying(model_config: PreTrainedConfig, is_tied: bool) -> None:
    """Set in a configuration whether embedding and head are one parameter."""
    for config in (model_config, model_config.get_text_config()):
        if getattr(config, "tie_word_embeddings", is_tied) != is_tied:
            print(
                f"model: tie_word_embeddings is {str(is_tied).lower()} in these weights; the configuration says so now"
            )
            config.tie_word_embeddings = is_tied


def _shape(shape: Iterable[int]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def _some(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")

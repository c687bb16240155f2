"""A checkpoint in the Hugging Face layout: safetensors, configuration, generation settings, tokenizer, model card."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from turbolm.checkpoint.load import CheckpointReader
from turbolm.checkpoint.verify import verify_checkpoint
from turbolm.errors import UserError

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def export_checkpoint(checkpoint: Path, model_folder: Path, out: Path, *, precision: str, card: str) -> Path:
    """Write the checkpoint's weights, in the precision they were trained in, to `out`.

    `model_folder` holds the run's configuration and tokenizer, `card` is the text of the model card. A folder that
    is already there is replaced once the new one is complete. Raises UserError for a damaged checkpoint.
    """
    problems = verify_checkpoint(checkpoint)
    if problems:
        raise UserError(f"{checkpoint} cannot be exported: {problems[0]}")
    config = AutoConfig.from_pretrained(model_folder, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    with CheckpointReader(checkpoint) as reader:
        weights = {name: reader.read_whole(name).to(_DTYPES[precision]) for name in reader.shapes}
        weights.update({name: buffer.clone() for name, buffer in reader.buffers().items()})
    missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    unset = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if unexpected or unset:
        raise UserError(f"{checkpoint}: parameters do not fit {model_folder}: {(unexpected or unset or missing)[0]}")
    model.config.dtype = _DTYPES[precision]
    temporary = out.with_name(f".tmp-{out.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    model.generation_config = GenerationConfig.from_model_config(model.config)
    model.save_pretrained(temporary)
    tokenizer(model_folder).save_pretrained(temporary)
    (temporary / "README.md").write_text(card, encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    temporary.rename(out)
    return out


def generate_sample(model_folder: Path, num_tokens: int, *, seed: int = 0, prompt: str = "") -> str:
    """Text sampled from an exported model (top-k 50, temperature 0.8), from the start of a document or a prompt."""
    vocabulary = tokenizer(model_folder)
    model = AutoModelForCausalLM.from_pretrained(
        model_folder, dtype="auto", local_files_only=True, trust_remote_code=False, use_safetensors=True
    )
    start = vocabulary.bos_token_id if vocabulary.bos_token_id is not None else vocabulary.eos_token_id
    tokens = torch.tensor([[start, *vocabulary.encode(prompt, add_special_tokens=False)]])
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
    """The tokenizer saved in a folder; no code is taken from there."""
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)

"""Each broken recipe gets its own exact message, with the position of what to change."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from turbolm.recipe.gpus import GPUS
from turbolm.recipe.load import RecipeError, load_recipe

GOOD = """\
name: tiny
model:
  config: {model_type: llama}
tokenizer:
  train: {vocab_size: 512}
data:
  seq_len: 128
train:
  budget: 2M
  global_batch: 4096
"""
SECTIONS = (
    "name, model, tokenizer, data, train, optimizer, schedule, anomalies, "
    "cluster, execution, evaluation, checkpoint, logging, export"
)
*_MOST, _LAST = map(repr, GPUS)
_GPU_NAMES = f"{', '.join(_MOST)} or {_LAST}"
OPTIMIZER = "name, lr, weight_decay, lr_multipliers, ema_nesterov, betas, eps, cautious_weight_decay"


def problems(folder: Path, text: str, *overrides: str) -> list[str]:
    (folder / "a.yaml").write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(folder / "a.yaml", overrides)
    return str(caught.value).replace(str(folder) + os.sep, "").splitlines()


# What is added below GOOD, from line 11 on, and the one message it gives.
ADDED = {
    "optimizer: {lr: abc}": "a.yaml:11: optimizer.lr: expected a number such as 3e-4, got 'abc'",
    "optimizer: {lr: true}": "a.yaml:11: optimizer.lr: expected a number such as 3e-4, got true",
    "optimizer:\n  lr: 0": "a.yaml:12: optimizer.lr: must be greater than 0, got 0",
    "optimizer: {lr: .nan}": "a.yaml:11: optimizer.lr: expected a finite number of at most 40 digits, got '.nan'",
    "optimizer: {lr: '1e999'}": "a.yaml:11: optimizer.lr: expected a finite number, got '1e999'",
    "optimizer: {beta: 1}": f"a.yaml:11: optimizer.beta: unknown key; did you mean 'betas'? (known: {OPTIMIZER})",
    "optimizer: {betas: 0.9}": "a.yaml:11: optimizer.betas: expected a list, got 0.9",
    "optimizer: {betas: [0.9]}": "a.yaml:11: optimizer.betas: too few entries: number 2 is missing",
    "optimizer: {betas: [0.9, 1.5]}": "a.yaml:11: optimizer.betas.1: must be less than 1, got 1.5",
    "optimizer: {betas: [1, 1, 1]}": "a.yaml:11: optimizer.betas: must have at most 2 entries, got a list of 3",
    "optimizer:": "a.yaml:11: optimizer: expected a mapping of keys, got nothing; fill it in or remove the key",
    "lr: 1e-3": f"a.yaml:11: lr: unknown key; did you mean 'optimizer.lr'? (known: {SECTIONS})",
    "learning_rate: 1": f"a.yaml:11: learning_rate: unknown key; did you mean 'optimizer.lr'? (known: {SECTIONS})",
    "optimizer.lr: 1": "a.yaml:11: optimizer.lr: unknown key; write 'lr' below 'optimizer'",
    "zzz: 1": f"a.yaml:11: zzz: unknown key (known: {SECTIONS})",
    "gradient_accumulation_steps: 2": (
        "a.yaml:11: gradient_accumulation_steps: unknown key; it is derived from train.global_batch and "
        "execution.micro_batch"
    ),
    "schedule: {name: cosin}": (
        "a.yaml:11: schedule.name: expected 'constant', 'linear', 'cosine', 'sqrt', 'inverse_sqrt', 'wsd' or "
        "'warm_restarts', got 'cosin'; "
        "did you mean 'cosine'?"
    ),
    "schedule: {warmup: soon}": (
        "a.yaml:11: schedule.warmup: expected tokens (2M), steps (200 steps) or a share (2%), got 'soon'"
    ),
    "execution: {micro_batch: lots}": (
        "a.yaml:11: execution.micro_batch: expected a count such as 4096, 32k or 2M, or 'auto', got 'lots'"
    ),
    "execution: {zero_stage: 4}": "a.yaml:11: execution.zero_stage: expected 0, 1, 2 or 3, got 4",
    "execution: {zero_stage: true}": "a.yaml:11: execution.zero_stage: expected a whole number, got True",
    "execution: {offload_optimizer: yes}": "a.yaml:11: execution.offload_optimizer: expected true or false, got 'yes'",
    "execution: {activation_checkpointing: 0}": (
        "a.yaml:11: execution.activation_checkpointing: must be at least 1, got 0"
    ),
    "execution: {hang_timeout: 0}": "a.yaml:11: execution.hang_timeout: must be greater than 0, got 0",
    "execution: {process_group_timeout: soon}": (
        "a.yaml:11: execution.process_group_timeout: expected a duration such as 1h30m, 45s or 01:30:00, got 'soon'"
    ),
    "execution: {cache_dir: ''}": "a.yaml:11: execution.cache_dir: must not be empty",
    'execution: {cache_dir: "a\\nb"}': (
        "a.yaml:11: execution.cache_dir: expected text without line breaks and control characters, got 'a\\nb'"
    ),
    "cluster: {processes_per_node: all}": (
        "a.yaml:11: cluster.processes_per_node: expected a whole number, or 'auto', got 'all'"
    ),
    "checkpoint: {keep_last: 1.5}": "a.yaml:11: checkpoint.keep_last: expected a whole number, got 1.5",
    "evaluation: {<<: {tokens: 1}}": (
        "a.yaml:11: evaluation.<<: merge keys are not supported; put the shared part in a file and use `extends:`"
    ),
    "name: again": "a.yaml:11: name: duplicate key; it is already set on line 1",
    "7: x": "a.yaml:11: keys must be text, got '7'; put it in quotes",
    "[a]: x": "a.yaml:11: keys must be text, got a list or mapping; put it in quotes",
    "logging: !!python/name:os.system x": (
        "a.yaml:11: logging: the tag 'tag:yaml.org,2002:python/name:os.system' is not supported"
    ),
    "logging: &a {x: *a}": "a.yaml:11: logging.x: an alias to the value that it is part of",
    "logging: {every_steps: 5": "a.yaml:12: not valid YAML: expected ',' or '}', but got '<stream end>' (column 1)",
    "logging:\n\tevery_steps: 5": "a.yaml:12: not valid YAML: a tab cannot indent YAML; use spaces (column 1)",
    "---\nname: b": "a.yaml:11: not valid YAML: more than one YAML document; remove the `---` line (column 1)",
    "logging: *nowhere": "a.yaml:11: not valid YAML: found undefined alias 'nowhere' (column 10)",
    "logging: {a: \x07}": "a.yaml:11: character U+0007 is not allowed",
    'name2: "\\ud800"': "a.yaml:11: name2: not valid Unicode",
    "logging: " + "[" * 30 + "]" * 30: "a.yaml:11: not valid YAML: more than 24 levels (column 33)",
    "extends: missing.yaml": "a.yaml:11: extends: no such file: missing.yaml",
    "extends: [3]": "a.yaml:11: extends: expected a path or a list of paths, relative to this file",
    "extends: a.yaml": "a.yaml:11: extends: a file extends itself: a.yaml -> a.yaml",
    "execution: {zero_stage: 0, offload_optimizer: true}": (
        "a.yaml:11: execution.zero_stage: must be 1, 2 or 3 with execution.offload_optimizer, got 0"
    ),
    "optimizer: {name: adafactor}\nexecution: {zero_stage: 3}": (
        "a.yaml:12: execution.zero_stage: must be 0 with optimizer.name adafactor, got 3: it works on whole matrices, "
        "and ZeRO 1 to 3 leave each process a flat part of the parameters; set zero_stage: 0 with train.precision: "
        "fp32, or optimizer.name: muon, which works at every stage"
    ),
    "optimizer: {name: lion}\nexecution: {adam_kernel: deepspeed}": (
        "a.yaml:12: execution.adam_kernel: deepspeed is a kernel of optimizer.name adamw, got lion; set adam_kernel: "
        "auto"
    ),
    "optimizer: {cautious_weight_decay: true}\nexecution: {adam_kernel: deepspeed}": (
        "a.yaml:12: execution.adam_kernel: deepspeed decays every element, which optimizer.cautious_weight_decay does "
        "not; set adam_kernel: auto"
    ),
    "optimizer: {name: muon, orthogonalization: polar_express, ns_steps: 6}": (
        "a.yaml:11: optimizer: expected ns_steps of at most 5 with orthogonalization polar_express, which has 5 "
        "polynomials"
    ),
    "optimizer: {name: lion, cautious_weight_decay: true}": (
        "a.yaml:11: optimizer.cautious_weight_decay: not a setting of lion, but of adamw, cautious_adamw, muon (known: "
        "name, lr, weight_decay, lr_multipliers, ema_nesterov, betas)"
    ),
    "optimizer: {momentum: 0.9}": (
        f"a.yaml:11: optimizer.momentum: not a setting of adamw, but of sgd, rmsprop, muon (known: {OPTIMIZER})"
    ),
    "optimizer: {name: sgd, betas: [0.9, 0.95]}": (
        "a.yaml:11: optimizer.betas: not a setting of sgd, but of adamw, adamw_8bit, cautious_adamw, ademamix, lion, "
        "muon, soap (known: name, lr, weight_decay, lr_multipliers, ema_nesterov, momentum, nesterov)"
    ),
    "optimizer: {name: muon, momentum: 1}": "a.yaml:11: optimizer.momentum: must be less than 1, got 1",
    "optimizer: {name: moun}": (
        "a.yaml:11: optimizer.name: expected 'adamw', 'adamw_8bit', 'cautious_adamw', 'ademamix', 'lion', 'sgd', "
        "'rmsprop', 'muon', 'soap' or 'adafactor', got 'moun'; did you mean 'muon'?"
    ),
    "optimizer: {name: adafactor}\nschedule: {momentum: {start: 0.8, end: 0.9}}\nexecution: {zero_stage: 0}": (
        "a.yaml:12: schedule.momentum: has nothing to act on: optimizer.name adafactor keeps no momentum; remove it"
    ),
    "schedule: {momentum: {start: 0.8, end: 1}}": "a.yaml:11: schedule.momentum.end: must be less than 1, got 1",
    "schedule: {weight_decay: {start: 1}}": (
        "a.yaml:11: schedule.weight_decay.end: required key is missing (at the end of `over`, and from there on)"
    ),
    "schedule: {name: warm_restarts, cycle: 0}": "a.yaml:11: schedule.cycle: expected more than 0",
    "  random_restarts: {seeds: 1}": "a.yaml:11: train.random_restarts.seeds: must be at least 2, got 1",
    "  random_restarts: {over: 100%}": (
        "a.yaml:11: train.random_restarts.over: must be less than train.budget (2000000), got 100%"
    ),
    "  random_restarts: {over: 500 steps}": (
        "a.yaml:11: train.random_restarts.over: must be less than train.budget (2000000), got 500 steps"
    ),
    "optimizer: {name: 3}": (
        "a.yaml:11: optimizer.name: expected 'adamw', 'adamw_8bit', 'cautious_adamw', 'ademamix', 'lion', 'sgd', "
        "'rmsprop', 'muon', 'soap' or 'adafactor', got 3"
    ),
    "optimizer: {lr_multipliers: {heads: 2}}": (
        "a.yaml:11: optimizer.lr_multipliers.heads: unknown key; did you mean 'head'? (known: embeddings, head, "
        "matrices, vectors)"
    ),
    "execution:\n  micro_batch: 200": (
        "a.yaml:12: execution.micro_batch: must be a multiple of data.seq_len (128), got 200; nearest: 128 and 256"
    ),
    "execution: {micro_batch: 8192}": (
        "a.yaml:11: execution.micro_batch: must be at most train.global_batch (4096), got 8192"
    ),
    "execution: {offload_parameters: true}": (
        "a.yaml:11: execution.offload_parameters: needs execution.zero_stage 3, got 2; set zero_stage: 3"
    ),
    "execution: {hierarchical_partition: 8}": (
        "a.yaml:11: execution.hierarchical_partition: needs execution.zero_stage 3, got 2; set zero_stage: 3"
    ),
    "execution: {hierarchical_partition: 1}": (
        "a.yaml:11: execution.hierarchical_partition: must be at least 2, got 1"
    ),
    "execution: {quantized_weights: true}": (
        "a.yaml:11: execution.quantized_weights: needs execution.zero_stage 3, got 2; set zero_stage: 3"
    ),
    "execution: {zero_stage: 3, compile: model}": (
        "a.yaml:11: execution.compile: model does not work with execution.zero_stage 3: weights are gathered while "
        "the model runs, which a graph of the whole model cannot hold; set compile: layers"
    ),
    "execution: {loss: liger, compile: model}": (
        "a.yaml:11: execution.loss: liger does not work with execution.compile model: it reads a number back from the "
        "device, which a graph of the whole model cannot hold; set loss: chunked, or compile: layers"
    ),
    "execution: {attention: flex, compile: layers}": (
        "a.yaml:11: execution.compile: layers does not work with execution.attention flex, which compiles its kernel "
        "itself; set attention: varlen or sdpa, or compile: none"
    ),
    "execution: {zero_stage: 1, quantized_gradients: true}": (
        "a.yaml:11: execution.quantized_gradients: needs execution.zero_stage 3, got 1; set zero_stage: 3"
    ),
    "execution: {zero_stage: 3, quantized_weights: true}\ncluster: {device: cpu}": (
        "a.yaml:11: execution.quantized_weights: needs CUDA, but cluster.device is cpu"
    ),
    "execution: {zero_stage: 3, quantized_gradients: true}\ncluster: {device: cpu}": (
        "a.yaml:11: execution.quantized_gradients: needs CUDA, but cluster.device is cpu"
    ),
    "execution: {zero_stage: 3, quantized_gradients: 4}": (
        "a.yaml:11: execution.quantized_gradients: expected true or false, got 4"
    ),
    "execution: {zero_stage: 3, hierarchical_partition: 3}\ncluster: {gpu: L4-24GB, gpus_per_node: 8}": (
        "a.yaml:11: execution.hierarchical_partition: must divide the 8 processes, got 3"
    ),
    "execution: {sequence_parallel: 3}": (
        "a.yaml:11: execution.sequence_parallel: must divide the 128 tokens of a sequence (data.seq_len and "
        "data.length_schedule), got 3; set one of 1, 2, 4, 8, 16, 32, 64, 128"
    ),
    "execution: {sequence_parallel: 4}\ncluster: {device: cpu, processes_per_node: 6}": (
        "a.yaml:11: execution.sequence_parallel: must divide the 6 processes, got 4; set one of 1, 2, 3, 6"
    ),
    "execution: {sequence_parallel: 0}": "a.yaml:11: execution.sequence_parallel: must be at least 1, got 0",
    "execution: {sequence_parallel: 2, attention: eager}": (
        "a.yaml:11: execution.attention: eager does not work with execution.sequence_parallel, which needs the kernel "
        "apart from the model; set attention: auto, or one of varlen, sdpa and flex"
    ),
    "execution: {zero_stage: 3, hierarchical_partition: 4, offload_parameters: true}": (
        "a.yaml:11: execution.hierarchical_partition: keeps a copy of the weights on the GPU, which "
        "execution.offload_parameters would move away; choose one of the two"
    ),
    "execution: {zero_stage: 3}\ncluster: {gpu: H100, gpus_per_node: 8}": (
        f"a.yaml:12: cluster.gpu: expected {_GPU_NAMES}, got 'H100'; did you mean 'H100-80GB'?"
    ),
    "cluster: {gpu: H100-80GB}": (
        "a.yaml:11: cluster: expected `gpu` and `gpus_per_node` together, such as gpu: H100-80GB, gpus_per_node: 8"
    ),
    "cluster: {gpus_per_node: 0, gpu: H100-80GB}": "a.yaml:11: cluster.gpus_per_node: must be at least 1, got 0",
    "cluster: {num_nodes: 0}": "a.yaml:11: cluster.num_nodes: must be at least 1, got 0",
    "cluster: {num_nodes: 8, gpus_per_node: 8, gpu: H100-80GB}": (
        "a.yaml:10: train.global_batch: 4096 tokens are 32 sequences of data.seq_len 128, too few for 64 processes; "
        "use at most 32 processes, a global_batch of at least 8192, or a seq_len of at most 64"
    ),
    "cluster: {num_nodes: 64, processes_per_node: 1, device: cpu}": (
        "a.yaml:10: train.global_batch: 4096 tokens are 32 sequences of data.seq_len 128, too few for 64 processes; "
        "use at most 32 processes, a global_batch of at least 8192, or a seq_len of at most 64"
    ),
    "cluster: {gpus_per_node: 4, gpu: H100-80GB, processes_per_node: 8}": (
        "a.yaml:11: cluster.processes_per_node: must be at most cluster.gpus_per_node (4), got 8: each process needs "
        "its own GPU"
    ),
    "  precision: bf16\ncluster: {gpu: V100-32GB, gpus_per_node: 8}": (
        "a.yaml:11: train.precision: bf16 needs a newer GPU than cluster.gpu V100-32GB; set fp16 or fp32"
    ),
    "  precision: fp16\ncluster: {device: cpu}": (
        "a.yaml:11: train.precision: fp16 needs a GPU, but cluster.device is cpu; set bf16 or fp32"
    ),
}


@pytest.mark.parametrize("added", ADDED, ids=lambda text: text[:40].encode("ascii", "backslashreplace").decode())
def test_one_thing_wrong_below_a_good_recipe(tmp_path: Path, added: str) -> None:
    assert problems(tmp_path, GOOD + added + "\n") == [ADDED[added]]


# What is replaced in GOOD, and the one message it gives.
REPLACED = [
    ("name: tiny", "name: 7", "a.yaml:1: name: expected text, got 7; put it in quotes"),
    (
        "name: tiny",
        "name: a b",
        "a.yaml:1: name: expected letters, digits, '.', '_' and '-', at most 100, no sign in front, got 'a b'",
    ),
    ("name: tiny\n", "", "a.yaml:1: name: required key is missing (name of the run and its directory)"),
    (
        "  budget: 2M\n",
        "",
        "a.yaml:8: train.budget: required key is missing (tokens to train on (sequences x seq_len, over all steps))",
    ),
    ("budget: 2M", "budget: 2Q", "a.yaml:9: train.budget: expected a count such as 4096, 32k or 2M, got '2Q'"),
    ("budget: 2M", "budget: -1", "a.yaml:9: train.budget: expected a count such as 4096, 32k or 2M, got -1"),
    (
        "  config: {model_type: llama}\n",
        "  config: {model_type: llama}\n  resize_embeddings: true\n",
        "a.yaml:4: model.resize_embeddings: needs model.pretrained: a new model has a row for every token; remove it",
    ),
    (
        "  seq_len: 128\n",
        "  seq_len: 128\n  validation: 0\ncheckpoint: {keep_best: true}\n",
        "a.yaml:9: checkpoint.keep_best: goes by the held-out loss, but data.validation is 0: no evaluation; set "
        "keep_best: false, or raise data.validation",
    ),
    (
        "budget: 2M",
        "budget: 100",
        "a.yaml:9: train.budget: must be at least one step, train.global_batch (4096), got 100",
    ),
    (
        "global_batch: 4096",
        "global_batch: 5000",
        "a.yaml:10: train.global_batch: must be a multiple of data.seq_len (128), got 5000; nearest: 4992 and 5120",
    ),
    (
        "global_batch: 4096",
        "global_batch: 100",
        "a.yaml:10: train.global_batch: must be a multiple of data.seq_len (128), got 100; nearest: 128",
    ),
    ("seq_len: 128", "seq_len: 4", "a.yaml:7: data.seq_len: must be at least 8, got 4"),
    (
        "config: {model_type: llama}",
        "config: {hidden_size: 64}",
        "a.yaml:2: model: expected `config` to name its Hugging Face `model_type`, such as llama or gpt2",
    ),
    (
        "config: {model_type: llama}",
        "config: {model_type: llama}\n  pretrained: x",
        "a.yaml:2: model: expected either `config` (a mapping with model_type) or `config_file` (a path), or else "
        "`pretrained` (a path)",
    ),
    (
        "model_type: llama",
        "model_type: llama, vocab_size: 300",
        "a.yaml:3: model.config.vocab_size: must be at least tokenizer.train.vocab_size (512), got 300",
    ),
    (
        "model_type: llama",
        "model_type: llama, vocab_size: 32k",
        "a.yaml:3: model.config.vocab_size: expected a whole number, got '32k'",
    ),
    (
        "model_type: llama",
        "model_type: llama, max_position_embeddings: 64",
        "a.yaml:7: data.seq_len: must be at most model.config.max_position_embeddings (64), got 128",
    ),
    (
        "model_type: llama",
        "model_type: gpt2, n_positions: 64",
        "a.yaml:7: data.seq_len: must be at most model.config.n_positions (64), got 128",
    ),
    (
        "config: {model_type: llama}\ntokenizer:\n  train: {vocab_size: 512}\ndata:\n  seq_len: 128",
        "config: {model_type: gpt2}\ntokenizer:\n  train: {vocab_size: 512}\ndata:\n  seq_len: 2048",
        "a.yaml:7: data.seq_len: must be at most model.config.n_positions (1024), got 2048",
    ),
    (
        "seq_len: 128",
        "seq_len: 128\n  sources: [{type: jsonn}]",
        "a.yaml:8: data.sources.0.type: expected 'stdlib', 'text', 'jsonl', 'parquet' or 'datasets', got 'jsonn'; "
        "did you mean 'jsonl'?",
    ),
    ("seq_len: 128", "seq_len: 128\n  sources: [{}]", "a.yaml:8: data.sources.0.type: required key is missing"),
    (
        "seq_len: 128",
        "seq_len: 128\n  sources: []",
        "a.yaml:8: data.sources: must have at least 1 entries, got an empty list",
    ),
    (
        "seq_len: 128",
        "seq_len: 128\n  sources:\n  - type: text\n    path: [a, 5]",
        "a.yaml:10: data.sources.0.path.1: expected text, got 5; put it in quotes",
    ),
    (
        "seq_len: 128",
        "seq_len: 128\n  sources:\n  - type: stdlib\n    text: 1",
        "a.yaml:10: data.sources.0.text: unknown key (known: label, weight, min_tokens, type)",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "message"), REPLACED, ids=[new.strip()[:40] for _, new, _ in REPLACED])
def test_one_thing_replaced_in_a_good_recipe(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert problems(tmp_path, GOOD.replace(old, new, 1)) == [message]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_needs_a_zero_stage(tmp_path: Path, precision: str) -> None:
    text = GOOD + f"  precision: {precision}\nexecution: {{zero_stage: 0}}\n"
    assert problems(tmp_path, text) == [
        f"a.yaml:12: execution.zero_stage: must be 1, 2 or 3 with train.precision {precision}, got 0: DeepSpeed's ZeRO "
        "stage 0 keeps no fp32 weights that a checkpoint could read; set zero_stage: 1, or train.precision: fp32"
    ]


def test_precision_auto_goes_with_stage_0(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(GOOD + "execution: {zero_stage: 0}\n")
    assert load_recipe(tmp_path / "a.yaml").execution.zero_stage == 0


OVERRIDES = {
    "foo": "command line: foo: expected key.path=value, such as optimizer.lr=3e-4",
    "a..b=1": "command line: a..b=1: expected key.path=value, such as optimizer.lr=3e-4",
    "optimizer.lr=abc": "command line: optimizer.lr=abc: optimizer.lr: expected a number such as 3e-4, got 'abc'",
    "name.x=3": "command line: name.x=3: name.x: name is a value, not a mapping of keys",
    "extends=b.yaml": "command line: extends=b.yaml: extends: can only be set in a file",
    "logging=[1": "command line: logging=[1: not valid YAML: expected ',' or ']', but got '<stream end>'",
    "optimizer.beta=1": (
        f"command line: optimizer.beta=1: optimizer.beta: unknown key; did you mean 'betas'? (known: {OPTIMIZER})"
    ),
}


@pytest.mark.parametrize("override", OVERRIDES)
def test_a_wrong_override_is_named(tmp_path: Path, override: str) -> None:
    assert problems(tmp_path, GOOD, override) == [OVERRIDES[override]]


def test_everything_wrong_is_told_at_once(tmp_path: Path) -> None:
    """Syntax of one file, duplicate keys, unknown keys, values and cross-checks, sorted by position."""
    (tmp_path / "b.yaml").write_text("evaluation: {every: q}\n")
    text = GOOD.replace("seq_len: 128", "seq_len: 100\n  seq_len: 128\n  seqlen: 5")
    assert problems(tmp_path, "extends: b.yaml\n" + text, "logging.x=1") == [
        "a.yaml:9: data.seq_len: duplicate key; it is already set on line 8",
        "a.yaml:10: data.seqlen: unknown key; did you mean 'seq_len'? (known: sources, seq_len, packing, grouping, "
        "length_schedule, validation, deduplicate, on_bad_document, starts_at)",
        "a.yaml:13: train.global_batch: must be a multiple of data.seq_len (100), got 4096; nearest: 4000 and 4100",
        "b.yaml:1: evaluation.every: expected tokens (2M), steps (200 steps) or a share (2%), got 'q'",
        "command line: logging.x=1: logging.x: unknown key (known: every_steps, sample_tokens, trackers, project, "
        "profile)",
    ]


def test_a_broken_base_does_not_hide_the_problems_of_its_child(tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_text("model: {\n")
    assert problems(tmp_path, "extends: b.yaml\noptimizer: {lr: x}\n") == [
        "b.yaml:2: not valid YAML: expected the node content, but found '<stream end>' (column 1)",
        "a.yaml:2: optimizer.lr: expected a number such as 3e-4, got 'x'",
    ]


def test_a_cycle_names_its_chain(tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_text("extends: [c.yaml]\n")
    (tmp_path / "c.yaml").write_text("logging: {every_steps: 1}\nextends: ./a.yaml\n")
    assert problems(tmp_path, "extends: b.yaml\n") == [
        "c.yaml:2: extends: a file extends itself: a.yaml -> b.yaml -> c.yaml -> a.yaml"
    ]


def test_bases_that_multiply_are_refused(tmp_path: Path) -> None:
    for depth in range(12):
        (tmp_path / f"f{depth}.yaml").write_text(f"extends: [f{depth + 1}.yaml, f{depth + 1}.yaml]\n")
    (tmp_path / "f12.yaml").write_text("name: x\n")
    found = problems(tmp_path, "extends: f0.yaml\n")
    assert len(found) == 1
    assert "more than 64 files are extended" in found[0]


def test_aliases_that_blow_up_are_refused(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    found = problems(tmp_path, "\n".join(lines))
    assert sum("the aliases expand to more than 5000 values" in line for line in found) == 1


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    assert problems(tmp_path, "") == ["a.yaml:1: the file is empty"]
    assert problems(tmp_path, "# nothing\n") == ["a.yaml:1: the file is empty"]
    assert problems(tmp_path, "- a\n") == ["a.yaml:1: expected a mapping of keys at the top, got a list of 1"]
    assert problems(tmp_path, "just text\n") == ["a.yaml:1: expected a mapping of keys at the top, got 'just text'"]
    assert problems(tmp_path, "x: 1\n" * 30_000) == [
        "a.yaml:26215: the file is larger than 128 KiB, which no recipe is"
    ]


def test_paths_that_are_no_file(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(GOOD)
    (tmp_path / "latin.yaml").write_bytes(b"name: x\nmodel: \xe9\n")
    cases = {
        "nowhere.yaml": "nowhere.yaml: no such file",
        "": f"is a directory, not a file; did you mean {tmp_path / 'config.yaml'}?",
        "latin.yaml": "latin.yaml:2: the file is not UTF-8 text",
        "nul\0.yaml": "cannot be read: embedded null byte",
    }
    for name, message in cases.items():
        with pytest.raises(RecipeError) as caught:
            load_recipe(f"{tmp_path}/{name}")
        assert str(caught.value).endswith(message)
        assert len(caught.value.problems) == 1


def test_given_weights_leave_nothing_to_draw(tmp_path: Path) -> None:
    text = GOOD.replace("config: {model_type: llama}", "pretrained: weights") + "  random_restarts: {seeds: 2}\n"
    assert problems(tmp_path, text) == [
        "a.yaml:11: train.random_restarts: has no initial weights to draw: model.pretrained gives them; remove one of "
        "the two"
    ]

"""`turbolm evaluate`: the harness's numbers are the run's own, they are written where they belong, and what cannot be
evaluated is told in one line."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, patch

import pytest

from tests.train.harness import BINS_PER_BATCH, SEQ_LEN, make_recipe, train_in_world
from turbolm.checkpoint.export_folder import Origin, replace_export
from turbolm.data.prepare.build import prepare
from turbolm.errors import UserError
from turbolm.evaluate.run import MISSING, Options, Subject, _exported, _keep, evaluate_model, find_subject
from turbolm.report.evaluations import card_section, evaluation_rows
from turbolm.report.html import write_report
from turbolm.train.run_directory import RunDirectory, run_directory

harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed: turbolm[evaluate]"
)
QUESTIONS = [
    {"context": "alpha beta gamma", "choices": ["delta", "epsilon zeta = x + y", "eta"], "answer": 1},
    {"context": "1 alpha beta:", "choices": ["gamma delta", "eta"], "answer": 1},
    {"context": "eta theta iota", "choices": ["kappa", "theta"], "answer": 0},
]
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{context}}}}"
{more}
metadata: {{version: 2}}
"""
CHOOSE = """\
output_type: multiple_choice
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc_norm}]"""
SCORE = """\
output_type: loglikelihood
doc_to_target: " {{choices[answer]}}"
metric_list: [{metric: perplexity, aggregation: perplexity, higher_is_better: false}]"""

ROLL = """\
output_type: loglikelihood_rolling
doc_to_target: "{{context}} {{choices[answer]}}"
metric_list: [{metric: bits_per_byte}]"""


def options(*tasks: str, include: Path | None = None, limit: int | None = None) -> Options:
    return Options(tasks, include, limit, None, 2, f"turbolm evaluate RUN --tasks {','.join(tasks)}")


def told_of(path: Path, options: Options) -> str:
    lines: list[str] = []
    evaluate_model(path, options, lines.append)
    return "\n".join(lines)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that answers the questions itself, and a folder of tasks that ask them."""
    folder = tmp_path_factory.mktemp("evaluate")
    data, first, absent = (folder / f"{name}.jsonl" for name in ("questions", "first", "absent"))
    data.write_text("".join(json.dumps(one) + "\n" for one in QUESTIONS))
    first.write_text(json.dumps(QUESTIONS[0]) + "\n")
    recipe = make_recipe(
        folder,
        train={"budget": 2 * BINS_PER_BATCH * SEQ_LEN},
        evaluation={"tasks": [{"name": "own", "path": str(data)}, {"name": "first", "path": str(first)}]},
        logging={"sample_tokens": 0},
    )
    prepare(recipe)
    assert train_in_world(recipe, 1) == 0
    tasks = folder / "tasks"
    tasks.mkdir()
    for name, file, more in (
        ("choose", data, CHOOSE),
        ("score", first, SCORE),
        ("roll", first, ROLL),
        ("absent", absent, SCORE),
    ):
        (tasks / f"{name}.yaml").write_text(TASK.format(name=name, data=file, more=more))
    return folder


def run_of(folder: Path) -> Path:
    return run_directory(make_recipe(folder)).path


@pytest.mark.slow
@harness
def test_the_harness_finds_what_the_run_found_itself(folder: Path) -> None:
    run = run_of(folder)
    before = json.loads((run / "results.json").read_text())
    told = told_of(run, options("choose", "score", "roll", include=folder / "tasks"))
    results = json.loads((run / "results.json").read_text())
    (record,) = results.pop("evaluations")
    assert results == before, "nothing else has changed"
    own, tasks = results["eval_tasks"], record["tasks"]
    # These choices have as many bytes as characters, by which acc_norm divides.
    assert tasks["choose"]["metrics"]["acc_norm"]["value"] == pytest.approx(own["own"]["accuracy"])
    assert tasks["choose"]["metrics"]["acc_norm"]["stderr"] >= 0
    assert (tasks["choose"]["examples"], tasks["choose"]["of"], tasks["choose"]["version"]) == (3, 3, 2)
    bits = math.log2(tasks["score"]["metrics"]["perplexity"]["value"])  # of all of the right answer
    assert bits / len("epsilon zeta = x + y") == pytest.approx(own["first"]["bits_per_byte"], rel=1e-5)
    assert record["model"] == "step-00000002" and record["command"] == "turbolm evaluate RUN --tasks choose,score,roll"
    assert tasks["roll"]["metrics"]["bits_per_byte"]["value"] == pytest.approx(bits_per_byte(run / "export"), rel=1e-5)
    for place in (run / "export/README.md", run / "report.html"):
        text = place.read_text()
        assert "acc_norm" in text and "3 of 3" in text, place
    assert "choose  acc_norm  " in told and "results.json" in told
    check_the_same_again(run, folder)


def bits_per_byte(export: Path) -> float:
    """Of the first question with its answer, by plain Transformers: after the first token, which is not scored."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(export)
    text = "alpha beta gamma epsilon zeta = x + y"
    tokens = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]])
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(export)(tokens).logits[0, :-1].double()
    nats = torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum").item()
    return nats / math.log(2) / len(text.encode())


def check_the_same_again(run: Path, folder: Path) -> None:
    """Once more, from a checkpoint: the same numbers, in place of the first."""
    first = json.loads((run / "results.json").read_text())["evaluations"][0]
    checkpoint = max((run / "checkpoints").glob("step-*"))
    told_of(checkpoint, options("choose", "score", "roll", include=folder / "tasks"))
    (second,) = json.loads((run / "results.json").read_text())["evaluations"]
    assert second["tasks"] == first["tasks"]
    alone = folder / "alone"
    shutil.copytree(run / "export", alone)
    (alone / "README.md").write_text("mine")
    told = told_of(alone, options("choose", include=folder / "tasks", limit=2))
    assert "is not what export wrote; it is left as it is" in told and (alone / "README.md").read_text() == "mine"
    (record,) = json.loads((folder / "alone.evaluation.json").read_text())["evaluations"]
    assert record["model"] == f"{run.name}/step-00000002"
    assert (record["tasks"]["choose"]["examples"], record["tasks"]["choose"]["of"]) == (2, 3)


@pytest.mark.slow
@harness
@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("chose", r"^--tasks: lm-evaluation-harness knows no task 'chose'; did you mean 'choose'\?$"),
        ("absent", r"^--tasks absent: \w+: .*absent\.jsonl.*"),
        ("hellaswag", r"^--tasks hellaswag: \w+: .*; its data are on the Hub: fetch them once"),
    ],
)
def test_tasks_that_cannot_be_loaded_are_told_in_a_line(
    task: str, message: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets.config
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=message) as refused:
        told_of(run_of(folder), options(task, include=folder / "tasks"))
    assert "\n" not in str(refused.value)


@pytest.fixture
def bare_run(tmp_path: Path) -> Path:
    """The files by which a run, its checkpoint and its export are known."""
    run = tmp_path / "run"
    for folder in ("checkpoints/step-00000002", "export"):
        (run / folder).mkdir(parents=True)
    for file in ("contract.json", "checkpoints/step-00000002/manifest.json", "export/config.json"):
        (run / file).write_text("{}")
    (run / "results.json").write_text(json.dumps({"checkpoint": "elsewhere/checkpoints/step-00000002"}))
    return run


def test_without_the_harness_one_line_says_how_to_install_it(bare_run: Path) -> None:
    with patch("importlib.util.find_spec", lambda name: None), pytest.raises(UserError) as refused:
        told_of(bare_run, options("choose"))
    assert str(refused.value) == MISSING and "pip install 'turbolm[evaluate]'" in MISSING


def test_what_is_evaluated(bare_run: Path) -> None:
    checkpoint, export, results = bare_run / "checkpoints/step-00000002", bare_run / "export", bare_run / "results.json"
    for path in (bare_run, export, checkpoint):
        subject = find_subject(path)
        assert (subject.name, subject.results) == ("step-00000002", results)
        assert (subject.checkpoint, subject.export) == ((checkpoint, None) if path == checkpoint else (None, export))
    with pytest.raises(UserError, match="--include: .* is not a folder"):
        told_of(bare_run, options("choose", include=bare_run / "none"))
    results.unlink()
    assert find_subject(checkpoint).results == bare_run / "evaluation.json"
    other = shutil.copytree(export, bare_run.parent / "exported")
    assert find_subject(other).results == bare_run.parent / "exported.evaluation.json"
    shutil.rmtree(export)
    with pytest.raises(UserError, match=r"has no export yet; name one of the checkpoints in .*/checkpoints"):
        find_subject(bare_run)
    with pytest.raises(UserError, match="expected a run, a checkpoint of a run, or an exported model"):
        find_subject(bare_run / "checkpoints")


def test_where_results_cannot_be_kept_nothing_is_evaluated(bare_run: Path) -> None:
    for folder in (bare_run, bare_run / "export"):

        def refuse(dir: Path, closed: Path = folder) -> Any:
            if dir == closed:
                raise PermissionError(13, "Permission denied")
            return Mock()

        with patch("tempfile.TemporaryFile", refuse), pytest.raises(UserError) as refused:
            told_of(bare_run, options("choose"))
        assert str(refused.value) == f"{folder}: results would be written there, which fails: Permission denied"


def test_what_was_measured_is_said_even_if_it_cannot_be_written(bare_run: Path) -> None:
    metrics = {"acc": {"value": 0.25, "stderr": None}}
    task = {"version": 1, "num_fewshot": 0, "examples": 2, "of": 2, "metrics": metrics}
    measured = {"lm_eval": "0.4", "tasks": {"choose": task}}
    lines: list[str] = []
    find_spec = importlib.util.find_spec
    stub = SimpleNamespace(run_tasks=lambda folder, options: measured)
    with (
        patch("importlib.util.find_spec", lambda name: name == "lm_eval" or find_spec(name)),
        patch.dict("sys.modules", {"turbolm.evaluate.harness": stub}),
        patch.dict("os.environ"),
    ):
        with (
            patch("turbolm.files.os.replace", side_effect=OSError(28, "No space left on device")),
            pytest.raises(UserError, match=r"results\.json: what was measured cannot be written there: No space left"),
        ):
            evaluate_model(bare_run, options("choose"), lines.append)
        assert lines == ["choose  acc  0.2500  2 of 2  0-shot  version 1"]
        evaluate_model(bare_run, options("choose"), lines.append)
    assert lines[2] == f"results: {bare_run / 'results.json'}"
    assert json.loads((bare_run / "results.json").read_text())["evaluations"][0]["tasks"] == measured["tasks"]


def test_a_contract_without_the_precision_is_told_by_its_key(bare_run: Path) -> None:
    (bare_run / "contract.json").write_text(json.dumps({"fingerprint": "f", "contract": {"train": {}}}))
    message = r"contract\.json: contract\.train\.precision: expected fp32, bf16 or fp16, got None"
    with pytest.raises(UserError, match=message), _exported(find_subject(bare_run / "checkpoints/step-00000002")):
        pass


def test_the_export_itself_says_whose_weights_it_has(bare_run: Path) -> None:
    """Not results.json, which is of another checkpoint once a run was extended and its export failed."""
    export, results = bare_run / "export", bare_run / "results.json"
    for last in ({"export": None}, {"export_command": "turbolm export"}):
        results.write_text(json.dumps({"checkpoint": "checkpoints/step-00000004", **last}))
        for path in (bare_run, export):
            with pytest.raises(UserError, match="does not say which checkpoint it is of"):
                find_subject(path)
    new = shutil.copytree(export, bare_run / "new")
    replace_export(bare_run.parent / "mean", new, Origin("run", "step-00000002", averaged=True))
    shutil.rmtree(export)
    shutil.copytree(bare_run.parent / "mean", export)
    for path in (bare_run, export):
        assert find_subject(path).name == "step-00000002 (averaged weights)"
    assert find_subject(bare_run.parent / "mean").name == "run/step-00000002 (averaged weights)"


def test_how_evaluations_are_shown(tmp_path: Path) -> None:
    metrics = {"acc": {"value": 0.25, "stderr": 0.125}, "f1": {"value": None, "stderr": None}}
    task: dict[str, Any] = {"version": 1, "num_fewshot": 0, "examples": 1200, "of": 1300, "metrics": metrics}
    record = {"model": "step-1", "command": "turbolm evaluate x", "lm_eval": "0.4", "tasks": {"t": task}}
    group = {**record, "tasks": {"g": {**task, "examples": None, "of": None, "num_fewshot": None}}}
    assert evaluation_rows([record, group])[::2] == [
        ["step-1", "t", "acc", "0.2500", "± 0.1250", "1,200 of 1,300", "0-shot", "version 1"],
        ["step-1", "g", "acc", "0.2500", "± 0.1250", "", "", "version 1"],
    ]
    assert "| t | acc | 0.2500 | ± 0.1250 | 1,200 of 1,300 | 0-shot | version 1 |" in card_section([record])
    (tmp_path / "evaluation.json").write_text(json.dumps({"evaluations": [record]}))
    assert "± 0.1250" in write_report(tmp_path).read_text()


def test_damaged_records_are_kept_beside_new_ones(tmp_path: Path) -> None:
    """They may be of another version; the same evaluation once more replaces what it found before."""
    (tmp_path / "run").mkdir()
    record = {"model": "step-1", "command": "turbolm evaluate x", "lm_eval": "0.4", "tasks": {}}
    (tmp_path / "run/results.json").write_text(json.dumps({"evaluations": [None, {**record, "at": "before"}, {}]}))
    _keep(Subject("step-1", None, None, RunDirectory(tmp_path / "run")), {**record, "at": "now"}, lambda _: None)
    found = json.loads((tmp_path / "run/results.json").read_text())["evaluations"]
    assert found == [None, {}, {**record, "at": "now"}]

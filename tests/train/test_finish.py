"""The end of a run: results come first, and what fails after them costs only itself."""

from __future__ import annotations

import gc
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
from huggingface_hub import constants
from tokenizers import normalizers

from tests.hub_stub import serve_hub
from tests.train.harness import SEQ_LEN, make_recipe
from tests.world import run_world
from turbolm.checkpoint.export import export_from_run
from turbolm.data.prepare.build import prepare
from turbolm.data.prepare.tokenizer import load_tokenizer, save_tokenizer
from turbolm.errors import UserError
from turbolm.launch.train import train_here
from turbolm.recipe.schema import Recipe
from turbolm.train.finish import add_products, model_card, summary
from turbolm.train.run_directory import RunDirectory, lacks_export, run_directory

TOKEN = "hf_" + "w" * 34


def fail(*arguments: Any, **__: Any) -> Any:
    first = arguments[0] if arguments else None
    if isinstance(first, Path) and first.parent.name == "checkpoints":  # the export's
        keep_outcome(first.parent.parent, "export")
    if isinstance(first, RunDirectory) and isinstance(arguments[1], Recipe):  # the push's
        keep_outcome(first.path, "push")
    raise IndexError("of the\ntest")


def keep_outcome(run: Path, at: str) -> None:
    attempt = max((run / "attempts").iterdir())
    shutil.copy(attempt / "outcome.json", attempt / f"outcome-at-{at}.json")


def outcome_of(run: Path, attempt: int, at: str = "") -> tuple[str, int, str]:
    """Status, exit code and message, at the end or as they were when something was tried."""
    outcome = json.loads((run / f"attempts/{attempt}/outcome{at and f'-at-{at}'}.json").read_text())
    return outcome["status"], outcome["exit_code"], outcome["message"]


def _starts(starts: list[tuple[Recipe, list[str]]], hub: str = "") -> list[int]:
    """Start one run after another, each with functions of train.finish that fail; the exit codes.

    `hub` is the address of one that takes TOKEN.
    """
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from huggingface_hub import constants

    from turbolm.train.worker import run_worker

    # Ranks have the environment of the test that started the first world, and these constants are read at an import.
    if hub:
        os.environ["HF_TOKEN"], constants.ENDPOINT, constants.HF_HUB_DISABLE_XET = TOKEN, hub, True
    codes = []
    for recipe, broken in starts:
        for state in (AcceleratorState, GradientState, PartialState):
            state._shared_state.clear()
        gc.collect()
        with ExitStack() as stack:
            for name in broken:
                stack.enter_context(patch(f"turbolm.train.finish.{name}", fail))
            output = [os.dup(number) for number in (1, 2)]
            codes.append(run_worker(recipe))
            for number, before in zip((1, 2), output, strict=True):  # a run sends them to its log
                os.dup2(before, number)
    return codes


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The folders of runs by name, and the exit codes of all starts."""
    folder = tmp_path_factory.mktemp("finish")

    def recipe(name: str, **sections: Any) -> Recipe:
        train, logging = {"budget": 2 * 5 * SEQ_LEN}, {"sample_tokens": 8}
        made = make_recipe(folder, train=train, logging=logging, evaluation={"tokens": 64}, **sections)
        return made.model_copy(update={"name": name})

    ornaments = recipe("ornaments", export={"push_to": "me/ornaments", "private": False})
    lower = load_tokenizer(prepare(ornaments) / "tokenizer")
    lower.normalizer = normalizers.Lowercase()
    save_tokenizer(lower, folder / "lower")
    (folder / "Loud.jsonl").write_text("".join(json.dumps({"text": f"A B{i} c" * 9}) + "\n" for i in range(99)))
    loud = {"sources": [{"type": "jsonl", "path": str(folder / "Loud.jsonl")}], "validation": 0.3}
    lossy = recipe(
        "lossy", tokenizer={"train": None, "path": str(folder / "lower")}, data=loud, export={"push_to": "me/lossy"}
    )
    starts: list[tuple[Recipe, list[str]]] = [
        (ornaments, ["model_card", "generate_sample", "write_report", "validation_entropy", "push_run"]),
        (ornaments, []),
        (lossy, ["export_checkpoint"]),
        (lossy, ["push_run"]),
        (recipe("unseen", data={"validation": 0}, export={"push_to": "me/it"}), []),
    ]
    for one, _ in starts:
        prepare(one)
    with serve_hub() as hub:
        hub.writers.add(TOKEN)
        codes = run_world(1, _starts, starts, hub.url)[0]
        paths = {one.name: run_directory(one).path for one, _ in starts}
        return {"codes": codes, "hub": hub, "lossy recipe": lossy, **paths}


def read(run: Path) -> tuple[dict[str, Any], list[str]]:
    """The results and the lines of the last attempt's log."""
    attempt = max((run / "attempts").iterdir())
    return json.loads((run / "results.json").read_text()), (attempt / "log.rank0.txt").read_text().splitlines()


def test_what_fails_after_the_results_costs_only_itself(runs: dict[str, Any]) -> None:
    run = runs["ornaments"]
    results, _ = read(run)
    log = (run / "attempts/1/log.rank0.txt").read_text().splitlines()
    assert results["eval_loss"] > 0 and results["bits_per_byte"] > 0 and results["export"] == str(run / "export")
    assert not {"sample", "unigram_entropy"} & set(results) and not (run / "report.html").exists()
    failed = [line for line in log if " failed: " in line]
    names = ["the unigram entropy", "the model card", "the sample", "report.html", "the push to the hub"]
    assert failed == [f"{name} failed: IndexError: of the test" for name in names]
    assert not [line for line in log if "Traceback" in line]
    assert outcome_of(run, 1)[:2] == ("finished", 0)
    assert "turbolm" in (run / "export/README.md").read_text()  # a short card


def test_the_outcome_is_recorded_before_the_export(runs: dict[str, Any]) -> None:
    """A process that is killed while it exports leaves a run that has finished, and the command to export it."""
    command = f"`turbolm export {runs['lossy']}/checkpoints/step-00000002 OUT`"
    told = f"the export did not end: {command} makes one, and `turbolm push OUT me/lossy --private` uploads it"
    assert outcome_of(runs["lossy"], 1, "export") == ("finished", 0, f"trained and saved; {told}")


def test_a_push_that_was_cut_is_told_and_made_by_the_same_command(runs: dict[str, Any]) -> None:
    """Killed between export and push, a run leaves the command; the next start of it pushes, or does not say 0."""
    run, lossy, hub = runs["ornaments"], runs["lossy"], runs["hub"]
    command = f"`turbolm push {run}/export me/ornaments` does it, and so does the same command"
    for at, how in (("push", "did not end"), ("", "failed")):
        assert outcome_of(run, 1, at) == ("finished", 0, f"trained, saved and exported; the push {how}: {command}")
    assert outcome_of(run, 2) == ("complete", 0, "")
    pushed = hub.repositories["me/ornaments"]
    assert pushed.commits[pushed.branches["main"]]["README.md"] == (run / "export/README.md").read_bytes()
    results, log = read(run)
    assert results["pushed_to"] == f"{hub.url}/me/ornaments" and log[-1] == f"{run} is complete; see {run}/results.json"
    for at, how in (("push", "did not end"), ("", "failed")):
        status, code, message = outcome_of(lossy, 2, at)
        assert (status, code) == ("complete", 1), "this start had nothing else to do"
        assert f"the push {how}: `turbolm push {lossy}/export me/lossy --private` does it" in message
    assert "me/lossy" not in hub.repositories and "is complete" not in (lossy / "attempts/2/log.rank0.txt").read_text()


@pytest.fixture
def start(runs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A copy of a finished run that is exported and not pushed, `turbolm train` of it, and a hub."""
    shutil.copytree(runs["lossy"], tmp_path / "lossy")
    recipe = runs["lossy recipe"]
    execution = recipe.execution.model_copy(update={"runs_dir": str(tmp_path)})
    recipe = recipe.model_copy(update={"execution": execution})
    with serve_hub() as hub:
        hub.writers.add(TOKEN)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield (
            tmp_path / "lossy",
            lambda **export: train_here(
                recipe.model_copy(update={"export": recipe.export.model_copy(update=export)}), "recipe.yaml", []
            ),
            hub,
        )


def test_a_finished_run_is_pushed_by_a_start_that_says_so(start: Any) -> None:
    """By `turbolm train`, in no world of ranks; once."""
    run, train, hub = start
    assert train(push_to=None) == 0 and not hub.repositories
    hub.writers.clear()
    command = f"turbolm push {run}/export me/lossy --private"
    with pytest.raises(UserError, match=f"export.push_to: the hub does not let this token write .*; `{command}` tries"):
        train()
    hub.writers.add(TOKEN)
    assert train() == 0
    assert json.loads((run / "results.json").read_text())["pushed_to"] == f"{hub.url}/me/lossy"
    asked = len(hub.requests)
    assert train() == 0 and len(hub.requests) == asked, "it is there"
    assert train(push_to="me/other", private=False) == 0 and not hub.repositories["me/other"].is_private
    assert len(list((run / "attempts").iterdir())) == 2


def test_a_push_waits_for_the_export_that_is_left_to_one_node(start: Any) -> None:
    """An export of an earlier budget is not pushed for it."""
    run, train, hub = start
    checkpoint = run / "checkpoints/step-00000002"
    results = json.loads((run / "results.json").read_text())
    results["export_command"] = f"turbolm export {checkpoint} {run}/export"
    del results["export"]
    (run / "results.json").write_text(json.dumps(results))
    record = json.loads((run / "export/turbolm_export.json").read_text())
    record["origin"]["checkpoint"] = "step-00000001"
    (run / "export/turbolm_export.json").write_text(json.dumps(record))
    message = (
        f"export.push_to: {run}/export is not the export of step-00000002; run `{results['export_command']}` on one "
        f"node, then `turbolm push {run}/export me/lossy --private`"
    )
    with pytest.raises(UserError) as refusal:
        train()
    assert str(refusal.value) == message and not hub.repositories
    export_from_run(checkpoint, run / "export")
    assert train() == 0
    pushed = hub.repositories["me/lossy"]
    assert pushed.commits[pushed.branches["main"]].keys() >= {"model.safetensors", "turbolm_export.json"}


def test_a_failed_export_is_told_and_done_again_by_the_same_command(runs: dict[str, Any]) -> None:
    run = runs["lossy"]
    first = (run / "attempts/1/log.rank0.txt").read_text()
    line = next(line for line in first.splitlines() if line.startswith("the export failed: IndexError: of the test; "))
    assert f"`turbolm export {run}/checkpoints/step-00000002 OUT`" in line and "Traceback" not in first
    assert outcome_of(run, 1)[:2] == ("finished", 0)
    assert "the export failed: `turbolm export " in outcome_of(run, 1)[2]
    results, log = read(run)
    assert results["export"] == str(run / "export") and results["sample"]
    assert (run / "export/model.safetensors").is_file() and (run / "report.html").is_file()
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 1, 2, 2]  # each trained and evaluated once
    assert runs["codes"] == [0, 0, 0, 1, 0]


def test_a_run_without_held_out_documents(runs: dict[str, Any]) -> None:
    run = runs["unseen"]
    results, log = read(run)
    assert results["sample"] and not [line for line in log if "failed" in line]
    assert not {"eval_loss", "eval_targets", "bits_per_byte", "unigram_entropy"} & set(results)
    assert sum("there is no held-out loss" in line for line in log) == 1
    assert "  eval loss        none: data.validation is 0" in log
    assert "eval/" not in (run / "metrics.jsonl").read_text()
    assert "No documents were held out" in (run / "export/README.md").read_text()
    assert "held-out loss" not in (run / "report.html").read_text()


def test_a_run_pushes_its_export_where_the_recipe_says(runs: dict[str, Any]) -> None:
    run, hub = runs["unseen"], runs["hub"]
    results, log = read(run)
    repository = hub.repositories["me/it"]
    pushed = repository.commits[repository.branches["main"]]
    assert results["pushed_to"] == f"{hub.url}/me/it" and f"  pushed to        {hub.url}/me/it" in log
    assert repository.is_private, "unless the recipe says otherwise"
    assert pushed == {path.name: path.read_bytes() for path in (run / "export").iterdir()}
    losses = [json.loads(line)["train/loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [line for line in pushed["README.md"].decode().splitlines() if line.startswith("| ") and " | " in line]
    assert [row.split("|")[2].strip() for row in rows if row.split("|")[1].strip() in ("160", "320")] == [
        f"{loss:.4f}" for loss in losses
    ], "the loss curve in the model card"
    assert all(TOKEN not in path.read_text(errors="replace") for path in run.rglob("*") if path.is_file())


def test_bits_per_byte_are_left_out_where_text_is_lost(runs: dict[str, Any]) -> None:
    run = runs["lossy"]
    results, _ = read(run)
    log = (run / "attempts/1/log.rank0.txt").read_text().splitlines()
    assert results["eval_loss"] > 0 and results["unigram_entropy"] > 0 and "bits_per_byte" not in results
    assert sum("does not reproduce its text: " in line for line in log) == 1
    texts = [*log, (run / "metrics.jsonl").read_text(), (run / "export/README.md").read_text()]
    shown = [text for text in texts if "bits per byte" in text or "bits_per_byte" in text]
    assert len(shown) == 1 and shown[0].endswith("bits per byte is not reported")
    assert "<dt>bits per byte" not in (run / "report.html").read_text()


def test_what_all_nodes_would_wait_for_is_left_to_one(tmp_path: Path) -> None:
    """Above a size no sample; on several nodes no export either, and the results say how to make one."""
    checkpoint, export = tmp_path / "checkpoints/step-00000001", tmp_path / "export"
    checkpoint.mkdir(parents=True)

    def finish(size: int, num_nodes: int, push_to: str | None = None) -> tuple[dict[str, Any], list[str], bool]:
        logging, train = SimpleNamespace(sample_tokens=8), SimpleNamespace(seed=0)
        cluster, export_to = SimpleNamespace(num_nodes=num_nodes), SimpleNamespace(push_to=push_to, private=True)
        evaluation = SimpleNamespace(weight_average=None)
        recipe = SimpleNamespace(logging=logging, train=train, cluster=cluster, export=export_to, evaluation=evaluation)
        plan = SimpleNamespace(precision="bf16")
        context: Any = SimpleNamespace(run=RunDirectory(tmp_path), recipe=recipe, store=None, plan=plan)
        lines: list[str] = []
        with (
            patch("turbolm.train.finish.export_checkpoint", lambda *_, **__: export),
            patch("turbolm.train.finish.generate_sample", lambda *_, **__: "text"),
            patch("turbolm.train.finish.model_card", lambda *_, **__: "card"),
            patch("turbolm.train.finish.write_report", lambda *_: tmp_path / "report.html"),
        ):
            results = add_products(context, {"parameters": size, "export": None}, lines.append)
        (tmp_path / "results.json").write_text(json.dumps(results))
        return results, lines, lacks_export(RunDirectory(tmp_path))

    results, lines, is_lacking = finish(10**9, 64)
    assert (results["sample"], results["export"], lines, is_lacking) == ("text", str(export), [], False)
    for size, num_nodes in ((8 * 10**9, 64), (70 * 10**9, 1)):
        results, lines, _ = finish(size, num_nodes)
        assert "sample" not in results and results["export"] == str(export)
        assert lines == ["no sample: the CPU would take long for more than 3B parameters"]
    results, lines, is_lacking = finish(70 * 10**9, 64)
    command = f"turbolm export {checkpoint} {export}"
    assert results["export_command"] == command and not {"export", "sample"} & set(results)
    assert not is_lacking, "the same command has nothing left to do"
    assert lines == [
        "no export: 64 nodes would wait for one process that writes more than 15B parameters; on one node, "
        f"run `{command}`"
    ]
    _, (line,), _ = finish(70 * 10**9, 64, push_to="me/it")
    assert line.endswith(f"run `{command}`, then `turbolm push {export} me/it --private`")


def test_an_evaluation_made_while_the_run_exports_stays(tmp_path: Path) -> None:
    (tmp_path / "checkpoints/step-00000001").mkdir(parents=True)
    made = {"model": "step-00000001", "command": "turbolm evaluate", "tasks": {}}
    results_file = tmp_path / "results.json"

    def evaluate_meanwhile(*_: Any, **__: Any) -> Path:
        results_file.write_text(json.dumps({"evaluations": [made]}))
        return tmp_path / "export"

    nothing = SimpleNamespace(sample_tokens=0, seed=0, num_nodes=1, push_to=None, private=True, weight_average=None)
    recipe = SimpleNamespace(logging=nothing, train=nothing, cluster=nothing, export=nothing, evaluation=nothing)
    plan = SimpleNamespace(precision="bf16")
    context: Any = SimpleNamespace(run=RunDirectory(tmp_path), recipe=recipe, store=None, plan=plan)
    with (
        patch("turbolm.train.finish.export_checkpoint", evaluate_meanwhile),
        patch("turbolm.train.finish.model_card", lambda *_, **__: "card"),
        patch("turbolm.train.finish.write_report", lambda *_: tmp_path / "report.html"),
    ):
        add_products(context, {"parameters": 1, "export": None}, print)
    kept = json.loads(results_file.read_text())
    assert (kept["evaluations"], kept["export"]) == ([made], str(tmp_path / "export"))


@pytest.mark.parametrize("is_averaged", [True, False])
def test_the_card_has_the_evaluations_of_the_weights_that_it_is_of(is_averaged: bool, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").touch()
    name = "step-00000001"
    evaluations = [
        {"model": model, "command": f"evaluate {which}", "lm_eval": "0", "tasks": {}}
        for model, which in ((name, "last"), (f"{name} (averaged weights)", "mean"))
    ]
    results = {"name": "run", "parameters": 1, "tokens_seen": 1, "precision": "bf16", "checkpoint": f"there/{name}"}
    average = {"count": 2, "first_step": 1}
    store: Any = SimpleNamespace(fingerprint="f", manifest={"sources": []})
    given = {**results, "weight_average": average, "evaluations": evaluations}
    card = model_card(RunDirectory(tmp_path), given, store, averaged=is_averaged)
    assert ("evaluate mean" in card, "evaluate last" in card) == (is_averaged, not is_averaged)


def test_a_checkpoint_without_the_mean_is_exported_as_it_is(tmp_path: Path) -> None:
    """`evaluation.weight_average.export` was set when nothing was left to train."""
    checkpoint = tmp_path / "checkpoints/step-00000001"
    checkpoint.mkdir(parents=True)
    recipe = SimpleNamespace(
        logging=SimpleNamespace(sample_tokens=0),
        train=SimpleNamespace(seed=0),
        cluster=SimpleNamespace(num_nodes=1),
        export=SimpleNamespace(push_to=None, private=True),
        evaluation=SimpleNamespace(weight_average=SimpleNamespace(export=True)),
    )
    context: Any = SimpleNamespace(
        run=RunDirectory(tmp_path), recipe=recipe, store=None, plan=SimpleNamespace(precision="bf16")
    )
    missing = (
        "step-00000001 has no mean of the weights (evaluation.weight_average.export): it was saved without it; the "
        "last weights are exported"
    )
    average = {"first_step": 1, "count": 1}
    for state, said in (({}, [missing]), ({"weight_average": average}, [])):
        (checkpoint / "trainer.json").write_text(json.dumps(state))
        lines: list[str] = []
        with (
            patch("turbolm.train.finish.export_checkpoint", return_value=tmp_path / "export") as export,
            patch("turbolm.train.finish.model_card", return_value="card"),
            patch("turbolm.train.finish.write_report", return_value=tmp_path / "report.html"),
        ):
            results = add_products(context, {"parameters": 1, "export": None, **state}, lines.append)
        assert lines == said and export.call_args.kwargs["averaged"] is bool(state)
        assert not state or results["weight_average"]["exported"]


def test_only_an_export_that_is_there_has_the_mean(tmp_path: Path) -> None:
    """One that failed, or is left to one node, is not told to have it."""
    (tmp_path / "checkpoints/step-00000001").mkdir(parents=True)
    for num_nodes, failure in ((1, OSError("full")), (64, None)):
        nothing = SimpleNamespace(sample_tokens=0, seed=0, num_nodes=num_nodes, push_to=None, private=True)
        evaluation = SimpleNamespace(weight_average=SimpleNamespace(export=True))
        recipe = SimpleNamespace(logging=nothing, train=nothing, cluster=nothing, export=nothing, evaluation=evaluation)
        plan = SimpleNamespace(precision="bf16")
        context: Any = SimpleNamespace(run=RunDirectory(tmp_path), recipe=recipe, store=None, plan=plan)
        given = {"parameters": 70 * 10**9, "tokens_seen": 1, "steps": 1, "checkpoint": "c", "export": None}
        given["weight_average"] = {"count": 2, "first_step": 1, "exported": True}  # as an earlier version left it
        with (
            patch("turbolm.train.finish.export_checkpoint", side_effect=failure),
            patch("turbolm.train.finish.model_card", return_value="card"),
            patch("turbolm.train.finish.write_report", return_value=tmp_path / "report.html"),
        ):
            results = add_products(context, given, lambda _: None)
        shown = summary(results)
        assert "the mean of 2 from step 1 on\n" in shown and "the export has these" not in shown
        assert not results["weight_average"]["exported"]
        assert num_nodes == 1 or results["export_command"].endswith(" --average")


def test_the_time_until_the_first_step_is_told_by_part(runs: dict[str, Any]) -> None:
    names = ("ornaments", "lossy")
    first, second = (json.loads((runs[name] / "attempts/1/start-up.json").read_text()) for name in names)
    for told in (first, second):
        parts = told["seconds"]
        assert list(parts)[:3] == ["imports", "plan and token store", "wait for all ranks"]
        assert list(parts)[-1] == "first step" and parts["first step"] > 0 and parts["model"] > 0
        assert sum(parts.values()) == pytest.approx(told["ended"] - told["begun"], abs=0.01)
        assert list(told["cpu_seconds"]) == list(parts) and told["cpu_seconds"]["first step"] > 0
    assert second["begun"] >= first["ended"]  # of one process
    assert (runs["ornaments"] / "attempts/1/start-up.json").stat().st_mtime == pytest.approx(first["ended"], abs=2)

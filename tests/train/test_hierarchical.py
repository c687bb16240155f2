"""Hierarchical partitioning (hpZ): its second copy of the weights never outlives the weights it was made from.

Four ranks in two groups of two. Nearly every forward pass gathers from that copy, so whatever changes weights behind
DeepSpeed's back must drop it: a resume, a rollback, a random restart.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from tests.checkpoint.test_resume import SAVED, reading, reference, writing
from tests.train.harness import BINS_PER_BATCH, SEQ_LEN, make_recipe, run_cells
from tests.train.reference import train_reference
from tests.train.test_equivalence import STEPS, learning_rates
from tests.world import run_world
from turbolm.data.prepare.build import prepare
from turbolm.data.store.token_store import open_store
from turbolm.errors import EXIT_REQUEUE
from turbolm.recipe.schema import Recipe
from turbolm.report.metrics import read_lines
from turbolm.train.run_directory import run_directory

HPZ: dict[str, Any] = {"zero_stage": 3, "micro_batch_bins": 1, "execution": {"hierarchical_partition": 2}}
SEED = 6  # the second candidate is the better one
TRIED, STOPPED, BAD_BATCH = 2, 4, 6


def _trains(recipe: Recipe) -> list[Any]:
    """Two starts of one run: random restarts and a stop; then a resume and a rollback."""
    from tests.chaos.faults import train_with_faults
    from tests.train.cells import build_plan_of_large_matrices
    from turbolm.train import loop, worker
    from turbolm.train.evaluation import evaluate

    clean_evaluation, clean_resume = loop.run_evaluation, worker.resume
    evaluated: list[float] = []

    def evaluate_and_stop(session: Any) -> Any:
        result = clean_evaluation(session)
        if not evaluated:
            session.context.stop.request("the test")
        return result

    def resume_and_evaluate(session: Any, hashed: Any) -> None:
        clean_resume(session, hashed)
        if session.step == 0:
            return
        result = evaluate(session.engine, session.context, session.attention)
        assert result is not None
        evaluated.append(result.loss)

    with (
        patch.object(loop, "run_evaluation", evaluate_and_stop),
        patch.object(worker, "resume", resume_and_evaluate),
        patch.object(worker, "build_plan", build_plan_of_large_matrices),
        patch.object(worker, "untested_note", lambda execution: "as for a quantized option: not tested"),
    ):
        exits = [train_with_faults(recipe, {}), train_with_faults(recipe, {BAD_BATCH: ("loss", np.nan, [1])})]
    return [*exits, evaluated]


@pytest.mark.slow
def test_every_step_after_a_resume_a_rollback_and_a_restart_is_that_of_plain_pytorch(tmp_path: Path) -> None:
    recipe = make_recipe(
        tmp_path,
        train={
            "budget": STEPS * BINS_PER_BATCH * SEQ_LEN,
            "seed": SEED,
            "random_restarts": {"seeds": 2, "over": f"{TRIED} steps"},
        },
        anomalies={"non_finite": "rollback"},
        evaluation={"every": f"{STOPPED} steps", "tokens": 2 * SEQ_LEN},
        checkpoint={"every": f"{STOPPED} steps"},
        logging={"sample_tokens": 0},
        execution={"zero_stage": 3, "hierarchical_partition": 2, "micro_batch": SEQ_LEN},
    )
    store = open_store(prepare(recipe))
    answers = run_world(4, _trains, recipe)
    assert answers[1:] == answers[:1] * 3, "all ranks agree"
    stopped, finished, evaluated = answers[0]
    assert (stopped, finished) == (EXIT_REQUEUE, 0)

    run, rates = run_directory(recipe), learning_rates()
    lines = read_lines(run.metrics)
    steps = [line for line in lines if "train/loss" in line]
    # Steps 5 and 6, and batch 6, of which one step is left: it is done again from step 4 with the batches after it.
    before = list(range(BAD_BATCH))
    after = [*range(STOPPED), *range(BAD_BATCH + 1, BAD_BATCH + 1 + STEPS - STOPPED)]
    assert [line["data/batch"] for line in steps] == [*before, BAD_BATCH, *after[STOPPED:]]
    chosen, lost = SEED + 1_000_003, SEED
    first = train_reference(recipe, store, rates[: len(before)], initial_seed=chosen)
    whole = train_reference(recipe, store, rates, batches=after, initial_seed=chosen)
    found = [[line["train/loss"], line["train/grad_norm"]] for line in steps]
    del found[len(before)]  # the faulty one
    np.testing.assert_allclose(found, [*first, *whole[STOPPED:]], rtol=1e-6)
    candidate = [line for line in read_lines(run.random_restarts / "candidate-0.jsonl") if "train/loss" in line]
    np.testing.assert_allclose(
        [[line["train/loss"], line["train/grad_norm"]] for line in candidate],
        train_reference(recipe, store, rates[:TRIED], initial_seed=lost),
        rtol=1e-6,
    )
    at_stop = next(line["eval/loss"] for line in lines if "eval/loss" in line)
    assert evaluated == [pytest.approx(at_stop, rel=1e-6)], "the same weights before the stop and after the resume"
    assert "quantized option: not tested" in (run.attempt(1) / "log.rank0.txt").read_text()


def test_it_trains_as_plain_pytorch_and_resumes_bitwise(tmp_path: Path) -> None:
    cells = [writing(tmp_path, "whole", **HPZ), reading(tmp_path, "resumed", "whole", **HPZ)]
    trained = run_cells(tmp_path, 4, cells)
    assert trained["resumed"] == trained["whole"][SAVED:]
    np.testing.assert_allclose(trained["whole"], reference(tmp_path), rtol=1e-6)


@pytest.mark.slow
def test_it_resumes_bitwise_and_from_and_to_other_layouts(tmp_path: Path) -> None:
    layouts: dict[str, dict[str, Any]] = {
        "fp32": {},
        "bf16": {"precision": "bf16", "activation_checkpointing": "full"},
        "offloaded": {"offload_optimizer": True},
    }
    cells = [writing(tmp_path, name, **HPZ, **layout) for name, layout in layouts.items()]
    cells += [reading(tmp_path, f"{name}-resumed", name, **HPZ, **layout) for name, layout in layouts.items()]
    cells += [
        reading(tmp_path, "to-zero3", "fp32", zero_stage=3, micro_batch_bins=1),
        writing(tmp_path, "zero2", zero_stage=2, micro_batch_bins=1),
        reading(tmp_path, "from-zero2", "zero2", **HPZ),
    ]
    trained = run_cells(tmp_path, 4, cells)
    for name in layouts:
        assert trained[f"{name}-resumed"] == trained[name][SAVED:]
    expected = reference(tmp_path)
    for name in ("fp32", "fp32-resumed", "to-zero3", "from-zero2"):
        np.testing.assert_allclose(trained[name], expected[-len(trained[name]) :], rtol=1e-6, err_msg=name)

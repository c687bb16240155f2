"""metrics.jsonl tells one history, whatever happened while it was written."""

import json
from pathlib import Path

from turbolm.report.metrics import read_metrics, values


def write(path: Path, lines: list[dict], tail: str = "") -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
    return path


def train(step: int, attempt: int, loss: float = 1.0) -> dict:
    return {"step": step, "attempt": attempt, "tokens_seen": 100 * step, "train/loss": loss}


def test_no_file_is_an_empty_history(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_the_last_attempt_wins_from_its_first_step_on(tmp_path):
    path = write(tmp_path / "m", [train(s, 1) for s in range(1, 7)] + [train(s, 2, loss=2.0) for s in (4, 5)])
    # Step 6 of the first attempt is gone too: the run continues from attempt 2, which has not come that far.
    assert [(line["step"], line["attempt"]) for line in read_metrics(path)] == [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2)]


def test_an_evaluation_without_attempt_belongs_to_the_attempt_that_wrote_before_it(tmp_path):
    evaluation = {"step": 3, "tokens_seen": 300, "eval/loss": 9.0}
    lines = [train(2, 1), train(3, 1), evaluation, train(3, 2), {**evaluation, "eval/loss": 8.0}]
    metrics = read_metrics(write(tmp_path / "m", lines))
    assert values(metrics, "eval/loss") == [(300.0, 8.0)]
    assert [line["step"] for line in metrics] == [2, 3, 3]


def test_an_evaluation_at_the_step_resumed_from_keeps_that_step(tmp_path):
    lines = [train(2, 1), train(3, 1), {"step": 2, "attempt": 2, "tokens_seen": 200, "eval/loss": 9.0}, train(3, 2)]
    metrics = read_metrics(write(tmp_path / "m", lines))
    assert [(line["step"], line["attempt"]) for line in metrics] == [(2, 1), (2, 2), (3, 2)]


def test_damaged_lines_are_skipped(tmp_path):
    path = write(tmp_path / "m", [train(1, 1), train(2, 1)], tail='{"step": 3, "train/lo')
    assert [line["step"] for line in read_metrics(path)] == [1, 2]
    with path.open("a") as file:  # the next attempt appends where the killed one stopped
        file.write(json.dumps(train(3, 2)) + "\n[1]\nnull\n\xff\n" + json.dumps(train(4, 2)) + "\n")
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3, 4]


def test_only_finite_numbers_can_be_drawn(tmp_path):
    path = write(tmp_path / "m", [train(1, 1, float("nan")), {**train(2, 1), "perf/mfu": None}, train(3, 1)])
    metrics = read_metrics(path)
    assert values(metrics, "train/loss") == [(200.0, 1.0), (300.0, 1.0)]
    assert values(metrics, "perf/mfu") == []

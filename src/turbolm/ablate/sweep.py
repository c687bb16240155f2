"""Find the learning rate of each arm that may need its own: by a full sweep, or by successive halving.

Successive halving (Jamieson and Talwalkar, arXiv 1502.07943) trains all rates for a part of the budget, keeps the
better half, rounded up, and goes on from their checkpoints, until one is left. Each run has the schedule of the whole
budget, so a run that is stopped is a prefix of the run that is not, and no token is trained twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from turbolm.ablate.design import Arm
from turbolm.ablate.measure import loss_at
from turbolm.ablate.results import measured
from turbolm.ablate.settings import Ablation, Rung, three_digits
from turbolm.ablate.trainer import Say
from turbolm.errors import UserError
from turbolm.plan.plan import build_plan
from turbolm.recipe.schema import Recipe
from turbolm.train.run_directory import run_directory
from turbolm.units import format_count

Train = Callable[[Sequence[Recipe]], int]  # trains what is left of the runs; returns what interrupted it, or 0


def sweep(ablation: Ablation, train: Train, say: Say) -> int:
    """Find the rates; returns the exit code of what interrupted it, or 0. Raises UserError where no rate works."""
    if ablation.options.halving:
        return _Halving(ablation, train, say).run()
    if code := train([recipe for recipe, _ in sweep_runs(ablation)]):
        return code
    for recipe, arm in sweep_runs(ablation):
        ablation.swept.setdefault(arm.name, []).append((recipe.optimizer.lr, _final_loss(recipe)))
    for name, tried in ablation.swept.items():
        choose(ablation, name, min(tried, key=lambda pair: pair[1])[0], say)
    return 0


def sweep_runs(ablation: Ablation) -> Iterator[tuple[Recipe, Arm]]:
    """The runs of a full sweep."""
    for index in range(ablation.options.sweep.count if ablation.options.sweep else 0):
        for arm in swept_arms(ablation):
            yield ablation.recipe(arm, ablation.seeds[0], _lrs(ablation, arm)[index]), arm


def swept_arms(ablation: Ablation) -> list[Arm]:
    """The arms whose best learning rate is unknown: the baseline, and those with a trick that may change it."""
    return [arm for index, arm in enumerate(ablation.arms) if index == 0 or arm.changes_lr]


def count_starts(ablation: Ablation) -> int:
    """How many starts of runs the sweep takes; each arm's last one is the first seed of its measurement too."""
    arms, sweep_ = len(swept_arms(ablation)), ablation.options.sweep
    if sweep_ is None:
        return 0
    return arms * (sum(survivors(sweep_.count)) if ablation.options.halving else sweep_.count)


def choose(ablation: Ablation, name: str, best: float, say: Say) -> None:
    """Take the rate for the arm, and warn where a better one may lie beyond the sweep. Raises UserError."""
    tried = dict(ablation.swept[name])
    lrs, loss = list(tried), tried[best]
    if not math.isfinite(loss):
        raise UserError(f"{name}: no learning rate of the sweep {lrs[0]:g} to {lrs[-1]:g} ended with a loss")
    ablation.best[name] = best
    say(f"{name}: best learning rate {best:g} (loss {loss:.4f}) of {', '.join(f'{lr:g}' for lr in lrs)}")
    if best in (min(lrs), max(lrs)):
        warning = f"{name}: the best learning rate, {best:g}, is at the edge of the sweep: widen it"
        ablation.warnings.append(warning)
        say(warning)


def survivors(count: int) -> list[int]:
    """How many of `count` rates train in each round: 5, 3, 2, 1."""
    rounds = [count]
    while rounds[-1] > 1:
        rounds.append(-(-rounds[-1] // 2))
    return rounds


def rung_tokens(ablation: Ablation, arm: Arm) -> list[int]:
    """The tokens after which the rates of an arm are halved: its first evaluations at or after 1/2, 1/4, ... of the
    budget. Raises UserError where these are not as many, or in the warmup.
    """
    assert ablation.options.sweep is not None
    plan, recipe = build_plan(arm.recipe, ablation.machine), arm.recipe
    budget, batch = recipe.train.budget, recipe.train.global_batch
    num_rungs = len(survivors(ablation.options.sweep.count)) - 1
    shares = [0.5 ** (num_rungs - index) for index in range(num_rungs)]
    evaluated = range(plan.evaluate_every_steps, plan.num_steps, plan.evaluate_every_steps)
    seen = [plan.curriculum.tokens_seen(step) for step in evaluated]
    rungs = [next((tokens for tokens in seen if tokens >= share * budget), None) for share in shares]
    if None in rungs or len(set(rungs)) < len(rungs):
        shown = ", ".join(f"{share:.4%}".rstrip("0%").rstrip(".") + "%" for share in shares)
        raise UserError(
            f"--halving: {arm.name}: the rates are halved after {shown} of the budget, and evaluation.every="
            f"{recipe.evaluation.every} does not evaluate once for each; set a smaller one, such as 5%"
        )
    found = [tokens for tokens in rungs if tokens is not None]
    if found[0] <= recipe.schedule.warmup.tokens(budget, batch):
        raise UserError(
            f"--halving: {arm.name}: the rates would be halved first after {format_count(found[0])} tokens, within the "
            f"warmup ({recipe.schedule.warmup}); sweep fewer rates, or shorten schedule.warmup"
        )
    return found


def _lrs(ablation: Ablation, arm: Arm) -> list[float]:
    """The rates of an arm: the sweep's factors on its own rate, where its trick sets one."""
    assert ablation.options.sweep is not None
    factor = arm.recipe.optimizer.lr / ablation.arms[0].recipe.optimizer.lr
    return [three_digits(lr * factor) for lr in ablation.options.sweep.lrs]


def _final_loss(recipe: Recipe) -> float:
    measures = measured(recipe)
    return measures.final_loss if measures else math.inf  # the run failed at this learning rate


@dataclass
class _Halving:
    ablation: Ablation
    train: Train
    say: Say

    def run(self) -> int:
        ablation, arms = self.ablation, swept_arms(self.ablation)
        rungs = {arm.name: rung_tokens(ablation, arm) for arm in arms}
        ranked = {arm.name: _lrs(ablation, arm) for arm in arms}
        for number, count in enumerate(survivors(len(ranked[arms[0].name]))[:-1]):
            alive = {name: lrs[:count] for name, lrs in ranked.items()}
            stops = {name: tokens[number] for name, tokens in rungs.items()}
            if code := self.train([self._recipe(arm, lr, stops[arm.name]) for arm, lr in _in_turn(arms, alive)]):
                return code
            for arm in arms:
                losses = [
                    (lr, loss_at(run_directory(self._recipe(arm, lr)).path, stops[arm.name])) for lr in alive[arm.name]
                ]
                ranked[arm.name] = self._halve(arm, Rung(stops[arm.name], tuple(losses)))
        return self._finish(arms, ranked)

    def _recipe(self, arm: Arm, lr: float, stop_tokens: int | None = None) -> Recipe:
        return self.ablation.recipe(arm, self.ablation.seeds[0], lr, stop_tokens)

    def _halve(self, arm: Arm, rung: Rung) -> list[float]:
        """Record a rung; returns its rates, the best one first, of which the better half is kept."""
        self.ablation.rungs.setdefault(arm.name, []).append(rung)
        ranked = [lr for lr, _ in sorted(rung.losses, key=lambda pair: pair[1])]
        shown = ", ".join(f"{lr:g} {loss:.4f}" for lr, loss in rung.losses)
        kept = ", ".join(f"{lr:g}" for lr in ranked[: survivors(len(ranked))[1]])
        self.say(f"{arm.name}: losses after {format_count(rung.tokens)} tokens: {shown}; kept: {kept}")
        return ranked

    def _finish(self, arms: Sequence[Arm], order: dict[str, list[float]]) -> int:
        """Train the best rate of the last round to the end of the budget; one that diverges gives way to the next."""
        ablation, pending, trained = self.ablation, list(arms), 0
        final: dict[tuple[str, float], float] = {}
        while pending:
            if code := self.train([self._recipe(arm, order[arm.name][0]) for arm in pending]):
                return code
            for arm in list(pending):
                lr = order[arm.name][0]
                final[arm.name, lr] = _final_loss(self._recipe(arm, lr))
                if math.isfinite(final[arm.name, lr]) or len(order[arm.name]) == 1:
                    pending.remove(arm)
                else:
                    del order[arm.name][0]
        for arm in arms:
            last = {lr: loss for rung in ablation.rungs[arm.name] for lr, loss in rung.losses}
            last |= {lr: loss for (name, lr), loss in final.items() if name == arm.name}
            ablation.swept[arm.name] = list(last.items())
            choose(ablation, arm.name, order[arm.name][0], self.say)
            trained += ablation.sweep_tokens(arm, num_finished=sum(name == arm.name for name, _ in final))
        assert ablation.options.sweep is not None
        every = sum(arm.recipe.train.budget for arm in arms) * ablation.options.sweep.count
        note = (
            f"halving trained {format_count(trained)} of the {format_count(every)} tokens of the whole sweep "
            f"({trained / every:.0%})"
        )
        ablation.warnings.append(note)
        self.say(note)
        return 0


def _in_turn(arms: Sequence[Arm], lrs: dict[str, list[float]]) -> Iterator[tuple[Arm, float]]:
    """The first rate of each arm, then the second, so that other load on the machine disturbs all arms alike."""
    for index in range(max(map(len, lrs.values()))):
        yield from ((arm, lrs[arm.name][index]) for arm in arms if index < len(lrs[arm.name]))

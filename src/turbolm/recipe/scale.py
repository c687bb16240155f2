"""Scaling rules: batch, learning rates and weight decay of a recipe, from a tuned one of another size. Torch-free.

`scale: {from: RECIPE}` in a recipe file names the tuned recipe. The rules are four, and each can be left out:

- `batch`: train.global_batch grows with train.budget as D^0.383 (arXiv 2505.13738). The result is the tuned batch times
  a power of two (nanochat, scripts/base_train.py), in whole sequences.
- `lr`: learning rates grow with the square root of the batch (arXiv 2205.10287 for AdamW; nanochat assumes it of Muon).
- `width`: learning rates by kind of parameter follow the model's width, as `lr_multipliers` (`_width_powers`).
- `weight_decay`: the time over which AdamW averages its updates stays the same share of the run: batch / (lr x weight
  decay x budget) is constant (arXiv 2405.13698), with the learning rate of the matrices.

What the recipe sets itself stays as it is, and the rules that follow use it. Loading puts the results into the recipe
as plain values (`turbolm.recipe.load`), so the contract and the run directory never need the tuned recipe again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from turbolm.recipe.contract import changed_keys
from turbolm.recipe.document import Problem, Tree, join_key
from turbolm.recipe.model_config import FEED_FORWARD, LAYERS, WIDTH, heads_of, size_of
from turbolm.recipe.optimizers import Muon, Optimizer
from turbolm.recipe.schema import Recipe

RULES = ("batch", "lr", "weight_decay", "width")

_BATCH_EXPONENT = 0.383  # arXiv 2505.13738: the best batch over the tokens trained on
_DIGITS = 4  # of a derived number, so that a platform's rounding does not change the contract
_OPTIMIZERS = ("adamw", "adamw_8bit", "cautious_adamw", "muon")  # for which the rules have a source
_OF_LRS = ("lr", "weight_decay", "width")  # rules that need the same optimizer
_FEED_FORWARD = "feed-forward width"
_SHAPES: dict[str, Callable[[Callable[[str], Any]], int | None]] = {
    "layers": lambda read: size_of(read, LAYERS),
    _FEED_FORWARD: lambda read: size_of(read, FEED_FORWARD),
    "size of a head": lambda read: (heads_of(read) or (0, None))[1],
}
_BATCH = "arXiv 2505.13738; nanochat"
_LR = "arXiv 2205.10287 for AdamW; of Muon nanochat assumes it"
_DECAY = "arXiv 2405.13698"
_MUP = "muP, arXiv 2203.03466, table 3"

Status = Literal["derived", "set in the recipe", "rule left out"]


@dataclass(frozen=True)
class Derived:
    """One value that a rule gives, and what the recipe has."""

    key: str
    rule: str
    reference: float  # the tuned recipe's
    suggested: float
    value: float | None  # the recipe's; None where it has none of its own
    status: Status
    formula: str
    source: str


@dataclass(frozen=True)
class Scaling:
    """What `scale` says about a recipe: each value, and what no rule covers."""

    reference: str  # the tuned recipe's file
    derived: tuple[Derived, ...]
    notes: tuple[str, ...]

    @property
    def applied(self) -> dict[str, float]:
        """Return the derived values by dotted key."""
        return {one.key: one.suggested for one in self.derived if one.status == "derived"}

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {
            "reference": self.reference,
            "derived": [asdict(one) for one in self.derived],
            "notes": list(self.notes),
        }


def read_scale(asked: Tree, problems: list[Problem]) -> tuple[Tree, tuple[str, ...]] | None:
    """Return the value of `scale.from` and the rules to apply, all by default; None with problems added."""
    told = len(problems)
    if not isinstance(asked.value, dict):
        wanted = "expected {from: RECIPE}, the path of a tuned recipe relative to this file"
        problems.append(Problem(asked.file, asked.line, "scale", f"{wanted}, got {asked.plain()!r:.100}"))
        return None
    for key, value in asked.value.items():
        if key not in ("from", "rules"):
            message = "unknown key (known: from, rules)"
            problems.append(Problem(value.file, value.line, join_key("scale", key), message))
    named = asked.value.get("from", Tree(None, asked.file, asked.line))
    if not isinstance(named.value, str) or not named.value.endswith((".yaml", ".yml")):
        found = "" if named.value is None else f", got {named.plain()!r:.100}"
        message = f"expected the path of a tuned recipe relative to this file, which ends with .yaml or .yml{found}"
        problems.append(Problem(named.file, named.line, "scale.from", message))
    rules = asked.value.get("rules", Tree(list(RULES), asked.file, asked.line))
    names = rules.value if rules.value == list(RULES) else rules.plain()
    if not isinstance(names, list) or any(name not in RULES for name in names):
        message = f"expected a list of {', '.join(RULES)}, got {names!r:.100}"
        problems.append(Problem(rules.file, rules.line, "scale.rules", message))
    return (named, tuple(names)) if len(problems) == told else None


def scale_batch(reference: int, budget_ratio: float, unit: int) -> int:
    """Return the batch in tokens for a budget that is `budget_ratio` times the one that `reference` was tuned for.

    It is the power of two times the reference that is nearest to the law on a logarithmic scale, then the nearest
    multiple of `unit` tokens.
    """
    power = round(_BATCH_EXPONENT * math.log2(budget_ratio))
    return max(round(reference * 2.0**power / unit), 1) * unit


def find_problems(recipe: Recipe, reference: Recipe, file: str, rules: Sequence[str]) -> Iterator[str]:
    """Yield why the rules that are asked for cannot be applied; `file` is the tuned recipe's."""
    asked = [rule for rule in _OF_LRS if rule in rules]
    mine, theirs, left_out = recipe.optimizer, reference.optimizer, f"leave {', '.join(asked)} out of scale.rules"
    if asked and mine.name != theirs.name:
        yield (
            f"optimizer.name is {mine.name} here and {theirs.name} in {file}: learning rates do not transfer between "
            f"optimizers; choose the same one (`extends: {file}` takes all settings), or {left_out}"
        )
    elif asked and mine.name not in _OPTIMIZERS:
        yield f"no rule is known for optimizer.name {mine.name}, only for {', '.join(_OPTIMIZERS)}; {left_out}"
    elif asked and isinstance(mine, Muon) and isinstance(theirs, Muon) and mine.adjust_lr != theirs.adjust_lr:
        yield (
            f"optimizer.adjust_lr is {mine.adjust_lr} here and {theirs.adjust_lr} in {file}: the same lr means "
            f"updates of another size; choose the same one, or {left_out}"
        )
    if asked and any(isinstance(one, Muon) and one.hyperball for one in (mine, theirs)):
        yield f"no rule is known for optimizer.hyperball, whose updates have a length of their own; {left_out}"
    if "width" not in rules or _same_weights(recipe, reference):
        return
    for one, whose in ((recipe, "here"), (reference, f"in {file}")):
        config = one.model.full_config
        if config is None:
            yield f"model.pretrained {whose} brings its own width, which no rule was made for; leave width out of rules"
        elif size_of(config.get, WIDTH) is None:
            yield f"width needs {', '.join(WIDTH[:-1])} or {WIDTH[-1]} under model.config {whose}; write it out"
    types = [(one.model.full_config or {}).get("model_type") for one in (recipe, reference)]
    if None not in types and types[0] != types[1]:
        yield (
            f"model_type is {types[0]} here and {types[1]} in {file}: learning rates do not transfer between "
            "architectures; leave width out of scale.rules"
        )
    if recipe.model.full_config is not None and not isinstance(_tied(recipe), bool):
        yield (
            "width needs model.config.tie_word_embeddings (true or false): the learning rate of a tied embedding "
            "follows another rule"
        )


def derive(
    recipe: Recipe, reference: Recipe, file: str, rules: Sequence[str], is_own: Callable[[str], bool]
) -> Scaling:
    """Return what the rules give for `recipe`, in which `is_own` tells the dotted keys that it sets itself.

    Rules that are left out are computed too, as suggestions, where there are no problems (`find_problems`).
    """
    rows = _Rows(recipe, rules, is_own)
    ours, theirs = recipe.train, reference.train
    ratio, unit = ours.budget / theirs.budget, _sequence_unit(recipe)
    wanted = theirs.global_batch * ratio**_BATCH_EXPONENT
    suggested = scale_batch(theirs.global_batch, ratio, unit)
    formula = (
        f"{theirs.global_batch} x ({ours.budget} / {theirs.budget})^{_BATCH_EXPONENT} = {wanted:.0f}, "
        f"to {theirs.global_batch} x a power of two in sequences of {unit}"
    )
    batch = rows.add("train.global_batch", "batch", theirs.global_batch, suggested, formula, _BATCH)
    if not list(find_problems(recipe, reference, file, ("lr", "weight_decay"))):
        batch_ratio = batch / theirs.global_batch
        _scale_lrs(rows, reference.optimizer, batch_ratio)
        if not list(find_problems(recipe, reference, file, ("width",))):
            _scale_width(rows, recipe, reference)
        _scale_decay(rows, reference, batch_ratio, ratio)
    return Scaling(file, tuple(rows.rows), tuple(_notes(recipe, reference, file, rows)))


class _Rows:
    """The values in order; each is used by those that follow."""

    def __init__(self, recipe: Recipe, rules: Sequence[str], is_own: Callable[[str], bool]) -> None:
        self.recipe, self.rules, self.is_own = recipe, rules, is_own
        self.rows: list[Derived] = []

    def add(self, key: str, rule: str, reference: float, suggested: float, formula: str, source: str) -> float:
        """Return the value that the recipe has in the end."""
        own = self.own(key)
        status: Status = "derived"
        if rule not in self.rules:
            status = "rule left out"
        elif self.is_own(key):
            status = "set in the recipe"
        if not isinstance(suggested, int):
            suggested = reference if suggested == reference else float(f"{suggested:.{_DIGITS}g}")
        value = suggested if status == "derived" else own
        self.rows.append(Derived(key, rule, reference, suggested, value, status, formula, source))
        return reference if value is None else value

    def own(self, key: str) -> Any:
        """Return the recipe's value before anything was derived."""
        value: Any = self.recipe
        for part in key.split("."):
            value = getattr(value, part, None)
        return value

    def value(self, key: str) -> Any:
        """Return the recipe's value in the end."""
        return next((row.value for row in self.rows if row.key == key), self.own(key))


def _scale_lrs(rows: _Rows, reference: Optimizer, batch_ratio: float) -> None:
    peaks = {"optimizer.lr": reference.lr}
    if isinstance(reference, Muon):
        peaks |= {f"optimizer.peak_lrs.{kind}": lr for kind, lr in reference.peak_lrs if lr is not None}
    for key, lr in peaks.items():
        formula = f"{lr:g} x sqrt(batch ratio {batch_ratio:.4g})"
        rows.add(key, "lr", lr, lr * math.sqrt(batch_ratio), formula, _LR)


def _scale_width(rows: _Rows, recipe: Recipe, reference: Recipe) -> None:
    width, tuned = (size_of((one.model.full_config or {}).get, WIDTH) for one in (recipe, reference))
    if width is None or tuned is None:  # the same published weights
        return
    for kind, (power, source) in _width_powers(recipe.optimizer, is_tied=bool(_tied(recipe))).items():
        factor = getattr(reference.optimizer.lr_multipliers, kind)
        formula = f"{factor:g} x ({tuned} / {width})^{power:g}" if power else f"{factor:g} at every width"
        rows.add(
            f"optimizer.lr_multipliers.{kind}", "width", factor, factor * (tuned / width) ** power, formula, source
        )


def _width_powers(optimizer: Optimizer, *, is_tied: bool) -> dict[str, tuple[float, str]]:
    """Return by kind of parameter the power of 1 / width that its learning rate follows, and the source.

    A change of a hidden matrix must have a spectral norm that does not depend on the width (arXiv 2310.17813, for
    matrices of one shape). AdamW's updates have elements of one size and point mostly one way, so their norm grows with
    the width. Muon's are orthogonal: `original` scales them by the shape, so they have the same norm at every width;
    `match_rms_adamw` multiplies them with sqrt(larger side) (arXiv 2502.16982). muP has no rule for a tied embedding
    without its multiplier on the output: this is nanochat's, halfway between embedding and head.
    """
    hidden = (1.0, _MUP)
    if isinstance(optimizer, Muon):
        is_original = optimizer.adjust_lr == "original"
        hidden = (0.0 if is_original else 0.5, "spectral norms, arXiv 2310.17813, of updates as in arXiv 2502.16982")
    powers = {"matrices": hidden, "embeddings": (0.0, _MUP), "head": (1.0, _MUP), "vectors": (0.0, _MUP)}
    if is_tied:
        powers["embeddings"] = (0.5, "nanochat (gpt.py), for embedding and head")
        del powers["head"]
    return powers


def _scale_decay(rows: _Rows, reference: Recipe, batch_ratio: float, budget_ratio: float) -> None:
    """Keep batch / (lr x weight decay x budget) for the matrices."""
    ours, theirs = rows.recipe.optimizer, reference.optimizer

    def lr(value: Callable[[str], Any]) -> float:
        peak = value("optimizer.peak_lrs.matrices")
        return float(value("optimizer.lr") if peak is None else peak) * float(
            value("optimizer.lr_multipliers.matrices")
        )

    lr_ratio = lr(rows.value) / (theirs.lr * theirs.lr_scales.matrices)
    suggested = theirs.weight_decay * batch_ratio / (lr_ratio * budget_ratio)
    formula = (
        f"{theirs.weight_decay:g} x batch ratio {batch_ratio:.4g} / (lr ratio of matrices {lr_ratio:.4g} x budget "
        f"ratio {budget_ratio:.4g})"
    )
    source = _DECAY + (" for AdamW; of Muon nanochat assumes it" if isinstance(ours, Muon) else "")
    rows.add("optimizer.weight_decay", "weight_decay", theirs.weight_decay, suggested, formula, source)


def _notes(recipe: Recipe, reference: Recipe, file: str, rows: _Rows) -> Iterator[str]:
    """Yield what differs and no rule covers."""
    ours, theirs = recipe.model.full_config or {}, reference.model.full_config or {}
    width, tuned = size_of(ours.get, WIDTH), size_of(theirs.get, WIDTH)
    for what, find in _SHAPES.items():
        one, other = find(ours.get), find(theirs.get)
        follows = what == _FEED_FORWARD and width and tuned and one and other and one * tuned == other * width
        if one and other and one != other and not follows:
            yield f"{what}: {other} in {file}, {one} here: no rule"
    if ours and theirs and _tied(recipe) != _tied(reference):
        yield f"tie_word_embeddings differs from {file}: the learning rates of embedding and head were not tuned for it"
    derived = {row.key for row in rows.rows}
    sections = ("schedule",) if recipe.optimizer.name != reference.optimizer.name else ("optimizer", "schedule")
    others = [] if "optimizer" in sections else ["optimizer.name"]
    for section in sections:
        before, after = (getattr(one, section).model_dump(mode="json") for one in (reference, recipe))
        others += [key for key, _, _ in changed_keys(before, after, section) if key not in derived]
    if others:
        yield f"not as in {file}, for which its values were tuned: {', '.join(others)}"


def _same_weights(recipe: Recipe, reference: Recipe) -> bool:
    return recipe.model.pretrained is not None and recipe.model.pretrained == reference.model.pretrained


def _sequence_unit(recipe: Recipe) -> int:
    """Return the tokens that every batch is a multiple of."""
    schedule = recipe.data.length_schedule
    return math.lcm(recipe.data.seq_len, *(schedule.named_lengths if schedule is not None else ()))


def _tied(recipe: Recipe) -> Any:
    return (recipe.model.full_config or {}).get("tie_word_embeddings")

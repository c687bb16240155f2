"""The page of `turbolm plan`: what runs, whether it fits, how long, how much, what to change. Torch-free.

`plan/text.py` has the details.
"""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Iterator, Sequence

from turbolm.plan.estimate import estimate
from turbolm.plan.fitting import ways_that_fit
from turbolm.plan.search import Candidate, Goal, search
from turbolm.plan.summary import Summary
from turbolm.plan.text import filler_line, footprint_parts, fork_line, processes_line, restarts_line, verdict_line
from turbolm.plan.time import shares
from turbolm.units import format_bytes, format_count, format_duration, format_step

_WIDTH = 110
_LABEL = 10
_NUM_PARTS = 3  # of the memory and of a step, largest first
_LEAST_GAIN = 0.03  # of the time; below, the estimate does not tell ways to run apart
_MOST_CHANGES = 2  # of keys, in a way that is proposed


def render_overview(summary: Summary) -> str:
    """Render the page. Warnings are all on it; sections about which nothing is known are left out."""
    sections = (
        ("model", _model(summary)),
        ("training", _training(summary)),
        ("scaled", _scaled(summary)),
        ("machines", [f"{processes_line(summary)}; {_execution(summary)}"]),
        ("memory", _memory(summary)),
        ("time", _time(summary)),
        ("cost", _cost(summary)),
        ("change", _change(summary)),
        ("launch", [_Command(summary.launch_command)]),
        ("notes", [*filter(None, [filler_line(summary)]), *summary.notes]),
    )
    lines = [f"{summary.recipe.name}: {summary.recipe_file}", ""]
    for title, body in sections:
        for number, text in enumerate(body):
            lines += _wrap("" if number else title, text)
    asked = shlex.join(["turbolm", "plan", summary.recipe_file, *summary.overrides])
    return "\n".join([*lines, "", f"details: {asked} --verbose; for programs: --json"])


class _Command(str):
    """A line to copy, which is not wrapped."""


def _wrap(title: str, text: str) -> list[str]:
    first, rest = f"{title:<{_LABEL}}", " " * _LABEL
    if isinstance(text, _Command):
        return [first + text]
    return textwrap.wrap(
        text, _WIDTH, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )


def _model(summary: Summary) -> Iterator[str]:
    size, cost = summary.size, summary.cost
    if size is None:
        yield "parameters: unknown here"
        return
    active = f", {format_count(size.total - size.idle)} of them for a token" if size.idle else ""
    flops = f"; {cost.flops_per_token:.3g} FLOPs a token" if cost.flops_per_token is not None else ""
    yield f"{size.total:,} parameters{active}{flops}"


def _training(summary: Summary) -> Iterator[str]:
    plan, batch, segments = summary.plan, summary.batch, summary.plan.curriculum.segments
    tokens = format_count(plan.curriculum.tokens_seen(plan.num_steps))
    uses = summary.sources
    names = ", ".join(
        f"{use.label} ({use.epochs:.2f} epochs)" if use.epochs is not None else use.label for use in uses[:_NUM_PARTS]
    )
    names += f" and {len(uses) - _NUM_PARTS} more" if len(uses) > _NUM_PARTS else ""
    changes = ""
    if len(segments) > 1 or len(segments[0].seq_lens) > 1:
        changes = ", the largest; batches or lengths change on the way"
    yield (
        f"{tokens} tokens of {names} in {plan.num_steps:,} steps of {batch.global_batch_tokens:,} tokens "
        f"({batch.bins_per_batch:,} sequences of {batch.seq_len:,}{changes})"
    )
    yield from filter(None, (fork_line(summary), restarts_line(summary)))


def _scaled(summary: Summary) -> Iterator[str]:
    scaling = summary.scaling
    if scaling is None:
        return
    changed = [one for one in scaling.derived if one.status == "derived" and one.suggested != one.reference]
    values = ", ".join(f"{one.key} {one.suggested:.7g}" for one in changed)
    kept = [one.key for one in scaling.derived if one.status != "derived"]
    yield f"from {scaling.reference}: {values or 'nothing changes'}" + (
        f"; not derived: {', '.join(kept)}" if kept else ""
    )
    yield from scaling.notes


def _execution(summary: Summary) -> str:
    batch, asked = summary.batch, summary.recipe.execution.activation_checkpointing
    mode = f"of every {asked}. layer" if isinstance(asked, int) else asked
    shared = f", sequences shared by {batch.sequence_parallel} processes" if batch.sequence_parallel > 1 else ""
    accumulated = f"{batch.gradient_accumulation_steps} accumulated"
    return f"micro-batches of {batch.micro_batch_tokens:,} tokens, {accumulated}{shared}, recomputation {mode}"


def _memory(summary: Summary) -> Iterator[str]:
    state, found, gpu_bytes = summary.memory, summary.footprint, summary.gpu_memory_bytes
    if found is not None and gpu_bytes is not None:
        yield verdict_line(found, gpu_bytes)
        largest = sorted(footprint_parts(found), key=lambda part: -part[1])[:_NUM_PARTS]
        host = summary.host_memory
        on_host = f"; host memory {format_bytes(host.total_bytes)} a node" if host else ""
        yield "most of it: " + ", ".join(f"{name} {format_bytes(size)}" for name, size in largest) + on_host
    elif state is None:
        yield "UNKNOWN, as the size of the model is"
    elif summary.plan.device == "cpu":
        yield f"model state {format_bytes(state.device_bytes)} in each process; activations come on top"
    else:
        of = f" of {format_bytes(gpu_bytes)}" if gpu_bytes else ""
        why = "activations come on top" if gpu_bytes else "cluster.gpu and cluster.gpus_per_node tell whether it fits"
        yield f"UNKNOWN: model state {format_bytes(state.device_bytes)}{of} on each GPU; {why}"


def _time(summary: Summary) -> Iterator[str]:
    if summary.estimate is None:
        if summary.cost.estimated_sec is not None:
            assumed = f"{summary.cost.assumed_mfu:.0%} (not measured)"
            yield f"{format_duration(summary.cost.estimated_sec)} at an assumed MFU of {assumed}"
        elif summary.plan.device == "cpu":
            calibrate = f"turbolm calibrate {shlex.quote(summary.recipe_file)}"
            yield f"UNKNOWN, not calibrated: `{calibrate}` measures this machine and traces the model"
        else:
            yield "UNKNOWN: no profile of the model, or no rates of this GPU"
        return
    made, rates = summary.estimate.bill, summary.estimate.rates
    mfu = f", MFU {made.mfu:.0%}" if made.mfu is not None else ""
    yield (
        f"{format_duration(made.run_sec)} of training, without evaluations and checkpoints: "
        f"{format_step(made.step.total)} a step, {format_count(made.tokens_per_sec)} tokens/s{mfu}"
    )
    yield "most of a step: " + ", ".join(f"{name} {share:.0%}" for name, share in list(shares(made.step))[:_NUM_PARTS])
    yield rates.source


def _cost(summary: Summary) -> Iterator[str]:
    made = summary.estimate.bill if summary.estimate else None
    if made is None or made.gpu_hours is None:
        return
    parts = [f"{format_count(made.gpu_hours)} GPU-hours"]
    parts += [f"{made.price_usd:,.0f} USD"] if made.price_usd is not None else []
    parts += [f"at most {format_count(made.energy_kwh)} kWh of the GPUs"] if made.energy_kwh is not None else []
    yield ", ".join(parts) + ("; cluster.price_per_gpu_hour gives the price" if made.price_usd is None else "")


def _change(summary: Summary) -> Iterator[str]:
    found, profile, gpu_bytes = summary.footprint, summary.profile, summary.gpu_memory_bytes
    if found is not None and profile is not None and gpu_bytes is not None:
        if found.verdict(gpu_bytes) != "FITS":
            ways = ways_that_fit(summary.recipe, summary.machine, profile, gpu_bytes)
            if not ways:
                yield "nothing that leaves the contract as it is fits these GPUs"
            for overrides, other in ways:
                yield f"FITS with {format_bytes(other.total_bytes)} of each GPU:"
                yield _Command(_with_overrides(summary, overrides))
        else:
            yield from _faster(summary, gpu_bytes)
        yield "more ways to run: --search; on more or fewer GPUs: --project"
    law = summary.suggestion
    if law is not None:
        batch = f", train.global_batch={summary.suggested_batch}" if summary.suggested_batch is not None else ""
        far = ", far from the sizes it was fitted on" if law.is_extrapolated else ""
        yield f"{law.source} would take optimizer.lr={law.lr:.2g}{batch} (not applied{far})"


def _faster(summary: Summary, gpu_bytes: int) -> Iterator[str]:
    """Yield the fastest ways to run that differ in one key and in two, where they are faster enough to tell."""
    machine, profile = summary.machine, summary.profile
    assert profile is not None
    now = estimate(summary.plan, profile, machine)
    if now is None:
        return
    found = search(
        summary.recipe,
        machine,
        profile,
        gpu_bytes,
        lambda plan: estimate(plan, profile, machine),
        Goal(),
        most_changes=_MOST_CHANGES,
    )
    least = 1.0 - _LEAST_GAIN
    for number in range(1, _MOST_CHANGES + 1):
        best = _fastest([one for one in found if len(one.changes) == number])
        if best is None or best.estimate is None:
            continue
        share = best.estimate.bill.run_sec / now.bill.run_sec
        if share > least:
            continue
        least = share - _LEAST_GAIN
        yield (
            f"{1 - share:.0%} less time ({format_duration(best.estimate.bill.run_sec)}, "
            f"{format_bytes(best.footprint.total_bytes)} of each GPU):"
        )
        yield _Command(best.command(summary.recipe_file, summary.overrides, summary.verb))


def _fastest(found: Sequence[Candidate]) -> Candidate | None:
    good = [one for one in found if Goal().problem(one) is None]
    return min(good, key=Goal().rank, default=None)


def _with_overrides(summary: Summary, overrides: Sequence[str]) -> str:
    keys = {one.partition("=")[0] for one in overrides}
    kept = [one for one in summary.overrides if one.partition("=")[0] not in keys]
    return shlex.join(["turbolm", summary.verb, summary.recipe_file, *kept, *overrides])

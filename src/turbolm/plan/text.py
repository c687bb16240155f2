"""The text of `turbolm plan --verbose`: everything that follows from a recipe. The page is `plan/overview.py`'s."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import yaml

from turbolm.plan.batch import plan_batch
from turbolm.plan.footprint import PARTS, Footprint
from turbolm.plan.summary import Summary
from turbolm.plan.traffic import traffic_lines
from turbolm.recipe.scale import Derived, Scaling
from turbolm.recipe.schedules import Wsd
from turbolm.units import format_bytes, format_count, format_duration

_PLOT_ROWS = 6
_MAX_SEGMENTS = 12
_EIGHTHS = " ▁▂▃▄▅▆▇█"


def render_summary(summary: Summary) -> str:
    """Render everything a user wants to see before a run, in the order in which it is derived."""
    sections = (
        ("", _cluster(summary)),
        ("batch", _batch(summary)),
        ("schedule", _schedule(summary)),
        ("data", _data(summary)),
        ("model", _model(summary)),
        ("time", summary.estimate.lines() if summary.estimate else _unknown_time(summary)),
        ("traffic of a step, sent by each process", traffic_lines(summary.traffic) if summary.traffic else ()),
        ("model state on each process", _memory(summary)),
        ("memory of each GPU", _footprint(summary)),
        ("host memory of each node", _host_memory(summary)),
        ("DeepSpeed configuration", json.dumps(summary.plan.ds_config, indent=2).splitlines()),
        ("Accelerate configuration", yaml.safe_dump(dict(summary.accelerate_config), sort_keys=False).splitlines()),
        ("scaled", scaling_lines(summary.scaling) if summary.scaling else ()),
        ("launch", [summary.launch_command, f"by hand: {summary.accelerate_command}"]),
        ("suggestions (not applied; your own sweep knows better)", _suggestions(summary)),
        ("notes", summary.notes),
    )
    lines: list[str] = []
    for title, body in sections:
        body = list(body)
        if body:
            lines += [*([""] if lines else []), *([title] if title else []), *(f"  {line}" for line in body)]
    return "\n".join(line.rstrip() for line in lines)


def plot(values: Sequence[float], num_rows: int = _PLOT_ROWS) -> list[str]:
    """Plot one column per value, from 0 to the largest, in eighths of a row; top row first."""
    top = max([*values, 0.0]) or 1.0
    eighths = [round(max(value, 0.0) / top * 8 * num_rows) for value in values]
    return [
        "".join(_EIGHTHS[min(max(height - 8 * row, 0), 8)] for height in eighths) for row in reversed(range(num_rows))
    ]


def _cluster(summary: Summary) -> Iterator[str]:
    yield f"{summary.recipe.name}: {summary.recipe_file}"
    yield f"{processes_line(summary)}, gradients reduced in {summary.plan.ds_config['communication_data_type']}"


def processes_line(summary: Summary) -> str:
    """Return what the run runs on, and how it is split."""
    plan, cluster = summary.plan, summary.recipe.cluster
    kind = (summary.machine.gpu_name or "GPU") if plan.device == "cuda" else "CPU"
    where = "as the recipe describes" if summary.is_described else "as found here"
    return (
        f"{cluster.num_nodes} node{'s' * (cluster.num_nodes > 1)} x {plan.processes_per_node} processes = "
        f"{plan.world_size} on {kind} ({where}), {plan.precision}, ZeRO-{summary.recipe.execution.zero_stage}"
    )


def _batch(summary: Summary) -> Iterator[str]:
    batch, shared_by = summary.batch, summary.batch.sequence_parallel
    processes = f"{batch.world_size} processes"
    if shared_by > 1:
        processes = f"{batch.num_groups} groups of {shared_by} processes, which share their sequences"
    yield (
        f"{batch.micro_batch_bins} x {batch.seq_len} tokens of a micro-batch x {batch.gradient_accumulation_steps} "
        f"accumulated x {processes} = {batch.global_batch_tokens} tokens "
        f"({batch.bins_per_batch} sequences)"
        + (f", with {batch.num_filler_bins} filler sequences on top" if batch.num_filler_bins else "")
    )
    fillers = filler_line(summary)
    if fillers:
        yield fillers


def filler_line(summary: Summary) -> str | None:
    """Return what filler sequences cost, if there are any."""
    batch = summary.batch
    if not batch.num_filler_bins:
        return None
    slots, least = batch.bins_per_batch + batch.num_filler_bins, -batch.bins_per_batch % batch.num_groups
    better = f"; another micro_batch can leave {least}" if least < batch.num_filler_bins else ""
    return f"fillers count in nothing, but take {batch.num_filler_bins / slots:.1%} of the time{better}"


def _schedule(summary: Summary) -> Iterator[str]:
    recipe, batch, plan = summary.recipe, summary.batch, summary.plan
    schedule = recipe.schedule
    tokens = plan.curriculum.tokens_seen(plan.num_steps)
    yield f"{plan.num_steps} steps, {format_count(tokens)} tokens (budget {recipe.train.budget})"
    yield from filter(None, (fork_line(summary), restarts_line(summary)))
    every = f"evaluate every {plan.evaluate_every_steps} steps" if recipe.is_evaluated else "no evaluation"
    average = f", average the weights from step {plan.first_averaged_step} on" if plan.first_averaged_step else ""
    yield f"{every}, checkpoint every {plan.checkpoint_every_steps} steps{average}"
    shape = f"{schedule.name}, decay {schedule.decay}" if isinstance(schedule, Wsd) else schedule.name
    if isinstance(schedule, Wsd) and schedule.own_decays:
        shape += f" ({', '.join(f'{kind} {getattr(schedule.decays, kind)}' for kind in schedule.own_decays)})"
    yield f"learning rate: {shape}, warmup {schedule.warmup}"
    rates = [rate for _, rate in summary.learning_rate]
    labels = [f"{max(rates):.3g}", *[""] * (_PLOT_ROWS - 2), "0"]
    for label, row in zip(labels, plot(rates), strict=True):
        yield f"{label:>9} │{row}"
    start = recipe.data.starts_at
    begin, end = format_count(start.tokens) if start else "0", format_count(recipe.train.budget)
    yield f"{'':>9} └{begin}{end:>{len(rates) - len(begin)}} tokens (ends at {rates[-1]:.3g})"
    segments = plan.curriculum.segments
    if len(segments) == 1 and len(segments[0].seq_lens) == 1:
        yield f"batch {batch.global_batch_tokens} tokens and seq_len {batch.seq_len} throughout"
        return
    shown = segments if len(segments) <= _MAX_SEGMENTS else segments[: _MAX_SEGMENTS - 1]
    for segment in shown:
        lengths = ", ".join(map(str, segment.seq_lens))
        micro = plan_batch(recipe, plan.world_size, seq_len=segment.seq_len, batch_tokens=segment.global_batch_tokens)
        weights = f", weights {' : '.join(f'{w:.3g}' for w in segment.weights)}" if segment.weights else ""
        yield (
            f"from {format_count(segment.first_token):>6} tokens (step {segment.first_step}): "
            f"batch {segment.global_batch_tokens}, seq_len {lengths}, micro-batches of "
            f"{micro.micro_batch_tokens} tokens{weights}"
        )
    if len(shown) < len(segments):
        yield f"... and {len(segments) - len(shown)} more changes"
    if len(plan.curriculum.seq_lens) > 1:
        saved = 1 - summary.cost.mean_span_tokens / summary.constant_span_tokens
        longest = plan.curriculum.seq_lens[-1]
        yield f"attention takes {saved:.0%} fewer FLOPs than with sequences of {longest} throughout"


def fork_line(summary: Summary) -> str | None:
    """Return what was trained by the run that this one was forked from, on other data."""
    start = summary.recipe.data.starts_at
    if start is None:
        return None
    return f"the first {start.step} steps, {format_count(start.tokens)} tokens, were the forked run's, on its data"


def restarts_line(summary: Summary) -> str | None:
    """Return what train.random_restarts costs, if it is set."""
    plan, restarts = summary.plan, summary.recipe.train.random_restarts
    if restarts is None:
        return None
    extra, tokens = plan.random_restart_tokens, plan.curriculum.tokens_seen(plan.num_steps)
    return (
        f"random restarts: {restarts.seeds} candidates of {plan.random_restart_steps} steps each; those "
        f"not chosen take {format_count(extra)} tokens on top ({extra / tokens:.1%})"
    )


def _data(summary: Summary) -> Iterator[str]:
    for use in summary.sources:
        if use.available_tokens is None:
            yield f"{use.label}: {format_count(use.planned_tokens)} tokens planned; its size shows once it is prepared"
        else:
            yield (
                f"{use.label}: {format_count(use.planned_tokens)} tokens of {format_count(use.available_tokens)} "
                f"({use.epochs:.2f} epochs)"
            )


def scaling_lines(scaling: Scaling) -> Iterator[str]:
    """Return what each rule gives, what the recipe has, the formula and its source."""
    yield f"from {scaling.reference}; what the recipe sets itself stays"
    for one in scaling.derived:
        yield f"{one.key} {one.suggested:.7g}{_not_derived(one)}"
        yield f"  = {one.formula}; {one.source}"
    yield from scaling.notes


def _not_derived(one: Derived) -> str:
    if one.status == "set in the recipe":
        return f"; the recipe sets {one.value:.7g}"
    return f" (not applied: {one.rule} is not in scale.rules)" if one.status == "rule left out" else ""


def _suggestions(summary: Summary) -> Iterator[str]:
    suggestion, recipe = summary.suggestion, summary.recipe
    if suggestion is None:
        return
    far = ", far from the sizes it was fitted on" if suggestion.is_extrapolated else ""
    yield f"{suggestion.source}, for AdamW{far}:"
    yield f"  optimizer.lr {suggestion.lr:.2g} (the recipe has {recipe.optimizer.lr:g})"
    if summary.suggested_batch is not None:
        yield f"  train.global_batch {summary.suggested_batch} tokens (the recipe has {recipe.train.global_batch})"


def _model(summary: Summary) -> Iterator[str]:
    size, cost = summary.size, summary.cost
    if size is None:
        yield "parameters: unknown here"
        return
    active = f"{size.total - size.idle:,} of them for a token, " if size.idle else ""
    yield f"{size.total:,} parameters ({active}{size.embedding:,} embedding, {size.head:,} output head; {size.source})"
    if cost.flops_per_token is None or cost.total_flops is None:
        yield "FLOPs: unknown for this model type"
        return
    yield f"{cost.flops_per_token:.4g} FLOPs a token = {cost.flops_formula}"
    known = any(use.available_tokens for use in summary.sources)
    how = "of documents as prepared" if known else "one document a sequence; shorter documents take less"
    yield f"  (mean span {cost.mean_span_tokens:.6g}: {how})"
    yield f"{cost.total_flops:.4g} FLOPs in all"
    if cost.estimated_sec is not None and summary.estimate is None:
        yield f"{format_duration(cost.estimated_sec)} at an assumed MFU of {cost.assumed_mfu:.0%} (not measured)"


def _unknown_time(summary: Summary) -> Iterator[str]:
    if summary.plan.device == "cpu":
        yield "not calibrated: `turbolm calibrate RECIPE` measures this machine and traces the model"


def _memory(summary: Summary) -> Iterator[str]:
    state = summary.memory
    if state is None:
        return
    yield from _sizes(
        ("weights", state.weights),
        ("gradients", state.gradients),
        ("fp32 master weights", state.master),
        ("optimizer moments", state.optimizer),
        ("gathered weights, at most", state.gathered),
        ("communication buckets", state.buckets),
    )
    of = f" of {format_bytes(summary.gpu_memory_bytes)}" if summary.gpu_memory_bytes else ""
    yield f"{'together':<26}{format_bytes(state.device_bytes):>10}{of}" + (
        "; activations come on top" if summary.footprint is None else ""
    )
    yield from _sizes(("in the host memory", state.host_bytes))


def footprint_parts(found: Footprint) -> tuple[tuple[str, int], ...]:
    """Return the components of a GPU's memory by name."""
    return tuple((name, getattr(found, part)) for part, name in PARTS.items())


def verdict_line(found: Footprint, gpu_bytes: int) -> str:
    """Return whether a GPU's worst moment fits."""
    bound = "; an upper bound: compiled code keeps fewer activations" if found.is_upper_bound else ""
    return (
        f"{found.verdict(gpu_bytes)}: {format_bytes(found.total_bytes)} of {format_bytes(gpu_bytes)} on each GPU, "
        f"{found.total_bytes / gpu_bytes:.0%}, at the {found.moment}{bound}"
    )


def _footprint(summary: Summary) -> Iterator[str]:
    found, gpu_bytes = summary.footprint, summary.gpu_memory_bytes
    if found is None or gpu_bytes is None:
        return
    yield verdict_line(found, gpu_bytes)
    yield from _sizes(*footprint_parts(found))
    yield from _sizes(("in the host memory", found.offloaded))
    yield from summary.advice


def _host_memory(summary: Summary) -> Iterator[str]:
    host = summary.host_memory
    if host is None:
        return
    yield from _sizes(
        ("offloaded", host.offloaded),
        ("offloaded activations", host.activations),
        ("copy of a checkpoint", host.checkpoint_copy),
        ("processes (assumed)", host.processes),
        ("together", host.total_bytes),
    )


def _sizes(*rows: tuple[str, int]) -> Iterator[str]:
    return (f"{name:<26}{format_bytes(num_bytes):>10}" for name, num_bytes in rows if num_bytes)

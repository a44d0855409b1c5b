"""The plan for people: the numbers of `as_json`, in GiB."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from megatron_idft.planning.layouts import FULL
from megatron_idft.planning.numbers import PlanNumbers, as_json
from megatron_idft.planning.plan import Plan

_WIDTH = 110


def format_plan(plan: Plan) -> str:
    """All lines, without a trailing newline."""
    numbers = as_json(plan)
    sections = (_verdict, _parameters, _memory, _batch, _speed, _cautions, _layouts, _assumptions)
    return "\n".join(line for section in sections for line in section(plan, numbers))


def _size(size: float) -> str:
    if not size:
        return "-"
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if size >= unit:
            return f"{size / unit:.2f} {name}"
    return f"{size / 2**10:.1f} KiB"


def _count(number: int) -> str:
    for unit, name in ((10**12, "T"), (10**9, "B"), (10**6, "M")):
        if number >= unit:
            return f"{number / unit:.2f} {name} ({number:,})"
    return f"{number:,}"


def _duration(days: float) -> str:
    for unit, name in ((1.0, "days"), (1 / 24, "hours"), (1 / 1440, "minutes")):
        if days >= unit:
            return f"{days / unit:.1f} {name}"
    return f"{days * 86400:.0f} seconds"


def _verdict(plan: Plan, numbers: PlanNumbers) -> Iterator[str]:
    worst, machine = plan.worst, plan.machine
    if machine.memory is None:
        yield f"needs {_size(worst.bytes)} on the fullest rank; no limit is known (pass --gpu-memory-gib)"
        return
    room = machine.memory - machine.reserve
    yield (
        f"{'fits' if plan.fits else 'DOES NOT FIT'}: {_size(worst.bytes)} of {_size(room)} on the fullest rank"
        f" ({machine.name}: {_size(machine.memory)}, less {_size(machine.reserve)} reserve)"
    )


def _parameters(plan: Plan, numbers: PlanNumbers) -> Iterator[str]:
    found = numbers["parameters"]
    active = "" if found["active"] == found["model"] else f", {_count(found['active'])} active for a token"
    largest = max(found["per_rank"])
    where = f" (stage {found['per_rank'].index(largest)})" if len(found["per_rank"]) > 1 else ""
    yield f"\nparameters     {_count(found['model'])}{active}; on a rank at most {_count(largest)}{where}"


def _memory(plan: Plan, numbers: PlanNumbers) -> Iterator[str]:
    stages = numbers["memory"]["stages"]
    worst = stages[numbers["memory"]["worst_stage"]]
    shown = stages if len(stages) <= 4 else [stages[0], stages[1], stages[-1]]
    if worst not in shown:
        shown[1] = worst
    yield "\nmemory of a rank, at the worst moment of a step"
    yield f"  {'':<26}" + "".join(f"{'stage ' + str(stage['stage']):>14}" for stage in shown)
    for name in worst["items"]:
        if any(stage["items"][name] for stage in shown):
            yield f"  {name:<26}" + "".join(f"{_size(stage['items'][name]):>14}" for stage in shown)
    yield f"  {'together':<26}" + "".join(f"{_size(stage['bytes']):>14}" for stage in shown)
    yield f"  {'worst moment':<26}" + "".join(f"{stage['moment']:>14}" for stage in shown)
    yield f"  {'chunks in flight':<26}" + "".join(f"{stage['chunks_in_flight']:>14}" for stage in shown)
    yield f"\n  one micro-batch leaves in the layers of stage {worst['stage']}, before full recompute:"
    for name, size in sorted(worst["activations_of_a_micro_batch"].items(), key=lambda item: -item[1]):
        if size:
            yield f"    {name:<34}{_size(size):>14}"


def _batch(plan: Plan, numbers: PlanNumbers) -> Iterator[str]:
    batch, layout = plan.training.batch, plan.training.layout
    found = numbers["batch"]
    yield (
        f"\nbatch          {batch.global_} sequences of {batch.seq_length} = {found['tokens_per_step']:,} tokens a"
        f" step; {layout.data} data-parallel ranks x {found['micro_batches']} micro-batches x {batch.micro}"
    )
    yield f"length         {found['length']}"
    if layout.pipeline > 1:
        yield f"bubble         {found['pipeline_bubble']:.1%} of a step"


def _speed(plan: Plan, numbers: PlanNumbers) -> Iterator[str]:
    speed, machine = numbers["speed"], plan.machine
    yield f"flops          {speed['step_flops']:.3e} a step, {speed['flops_per_token']:.3e} a token"
    if speed["step_seconds"] is not None:
        assert machine.peak is not None and speed["tokens_per_day"] is not None
        days = "" if speed["training_days"] is None else f"; {_duration(speed['training_days'])} in all"
        yield (
            f"at {machine.efficiency:.0%} MFU     {speed['step_seconds']:.2f} s a step,"
            f" {speed['tokens_per_day'] / 1e9:.3f} B tokens a day{days} (peak {machine.peak / 1e12:.0f} TFLOP/s a GPU)"
        )
    found = numbers["checkpoint"]
    yield (
        f"checkpoint     {_size(found['with_optimizer'])}, only weights {_size(found['weights'])};"
        f" {found['seconds']:.0f} s at {machine.disk / 1e9:g} GB/s"
    )


def _cautions(plan: Plan, numbers: PlanNumbers) -> Iterator[str]:
    if plan.cautions:
        yield "\nwarnings"
    for caution in plan.cautions:
        yield textwrap.fill(caution.text, _WIDTH, initial_indent="  - ", subsequent_indent="    ")


def _layouts(plan: Plan, numbers: PlanNumbers) -> Iterator[str]:
    if plan.machine.memory is None:
        return
    found = numbers["layouts_that_fit"]
    yield f"\nlayouts that would fit {plan.training.layout.gpus} GPUs and this global batch"
    yield textwrap.fill(f"ordered by {found['rule']}", _WIDTH, initial_indent="  ", subsequent_indent="  ")
    if not found["layouts"]:
        yield "  none: take more GPUs, a smaller model or shorter sequences"
    for each in found["layouts"]:
        full = f", {each['share']:.0%} full: little room for what is not counted" if each["share"] > FULL else ""
        yield f"  {_size(each['bytes']):>10}, bubble {each['pipeline_bubble']:.0%}{full}"
        yield f"    {' '.join(each['flags'])}"


def _assumptions(plan: Plan, numbers: PlanNumbers) -> Iterator[str]:
    yield "\nassumptions"
    for text in numbers["assumptions"]:
        yield textwrap.fill(text, _WIDTH, initial_indent="  - ", subsequent_indent="    ")

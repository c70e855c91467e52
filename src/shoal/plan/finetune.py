"""Does a fine-tuning fit on what somebody has, and what to change when it does not.

Every group of equal devices is looked at alone: the whole job on each device, or weights, gradients and optimizer
sharded over all of them (ZeRO-3). The high end of the estimate decides what fits, because an estimate that is right on
average runs out of memory every other time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from shoal.plan.estimate import GIB, Estimate
from shoal.plan.memory import Workload, estimate
from shoal.spec.fleet import Fleet, Group
from shoal.spec.hardware import Device
from shoal.spec.model import ModelSpec

METHODS = ("full", "lora", "qlora", "dpo", "dpo-lora", "dpo-qlora")
ENGINES = ("default", "litgpt", "peft")
LIGHTER = {"full": ("lora", "qlora"), "lora": ("qlora",), "dpo": ("dpo-lora", "dpo-qlora"), "dpo-lora": ("dpo-qlora",)}
USABLE = {"soc": 0.75, "cpu": 0.9}
"""Share of a device's memory that a job can have: the system lives there, too. Cards: all but a driver's fiftieth."""
USABLE_CARD = 0.98
SHORTEST_SEQ = 128
MOST_DEVICES = 1024

Verdict = Literal["fits", "doubtful", "does not fit"]


@dataclass(frozen=True, slots=True)
class Placed:
    """The job on one group of devices."""

    group: Group
    work: Workload
    estimate: Estimate

    @property
    def room(self) -> float:
        return usable_bytes(self.group.device)

    @property
    def verdict(self) -> Verdict:
        if self.estimate.high <= self.room:
            return "fits"
        return "doubtful" if self.estimate.value <= self.room else "does not fit"

    @property
    def layout(self) -> str:
        """In words."""
        if self.work.zero:
            return f"sharded over {self.group.count}x {self.group.device.name}"
        each = f" (a copy on each of {self.group.count})" if self.group.count > 1 else ""
        return f"on one {self.group.device.name}{each}"


@dataclass(frozen=True, slots=True)
class Answer:
    """The best group for the job, and changes each of which makes it fit when it does not."""

    best: Placed
    hints: tuple[str, ...]

    def to_object(self) -> dict[str, Any]:
        """Plain values for JSON."""
        best = self.best
        return {
            "verdict": best.verdict,
            "fits": best.verdict == "fits",
            "model": best.work.spec.name,
            "method": best.work.method,
            "precision": best.work.precision,
            "seq": best.work.seq,
            "micro_batch": best.work.micro_batch,
            "layout": best.layout,
            "device": best.group.device.name,
            "usable_bytes_per_device": round(best.room),
            "estimate": best.estimate.to_object(),
            "hints": list(self.hints),
        }


def usable_bytes(device: Device) -> float:
    """What a job may use of a device's memory."""
    return device.memory_bytes * USABLE.get(device.kind, USABLE_CARD)


def job(
    spec: ModelSpec, method: str, seq: int, *, micro_batch: int = 1, rank: int = 8, recompute: bool = False, engine: str
) -> Workload:
    """The fine-tuning as a workload of one device; quantised methods keep the frozen weights as nf4."""
    return Workload(
        kind="finetune",
        spec=spec,
        engine=engine,
        method=method,
        precision="nf4" if method.endswith("qlora") else "bf16",
        lora_rank=rank,
        seq=seq,
        micro_batch=micro_batch,
        recompute="full" if recompute else "none",
    )


def decide(work: Workload, fleet: Fleet) -> Answer:
    """Whether the job fits on the fleet, with hints when it does not. Raises UsageError for a job without sense."""
    best = place(work, fleet)
    if best.verdict == "fits":
        return Answer(best, ())
    single = list(_changes(work, lambda changed: place(changed, fleet).verdict == "fits"))
    if not single:
        single = list(_several_changes(work, fleet))
    return Answer(best, (*single, *_more_devices(work, best)))


def place(work: Workload, fleet: Fleet) -> Placed:
    """The group and layout with the most room to spare, whole jobs on single devices first."""
    alone = [Placed(group, work, estimate(work)) for group in fleet.groups]
    sharded = [_sharded(work, group) for group in fleet.groups if group.count > 1]
    fitting = [each for each in alone if each.verdict == "fits"] or alone + sharded
    return max(fitting, key=lambda each: each.room / each.estimate.high)


def _sharded(work: Workload, group: Group) -> Placed:
    spread = replace(work, dp=group.count, zero=3)
    return Placed(group, spread, estimate(spread))


def _changes(work: Workload, fits: Callable[[Workload], bool]) -> Iterator[str]:
    """Single changes that make it fit; of shorter sequences the longest."""
    if work.micro_batch > 1 and fits(replace(work, micro_batch=1)):
        yield f"micro-batch 1 instead of {work.micro_batch} fits (accumulate gradients)"
    if work.recompute == "none" and fits(replace(work, recompute="full")):
        yield "recomputing activations (--recompute) fits, for about a third more computing"
    seq = work.seq // 2
    while seq >= SHORTEST_SEQ:
        if fits(replace(work, seq=seq)):
            yield f"sequences of {seq} tokens instead of {work.seq} fit"
            break
        seq //= 2
    for method in LIGHTER.get(work.method, ()):
        if fits(_with_method(work, method)):
            yield f"method {method} instead of {work.method} fits"


def _several_changes(work: Workload, fleet: Fleet) -> Iterator[str]:
    """The first method, from heavy to light, that fits with recomputing, single sequences and the longest length."""
    for method in (work.method, *LIGHTER.get(work.method, ())):
        small = replace(_with_method(work, method), micro_batch=1, recompute="full")
        seq = work.seq
        while seq >= SHORTEST_SEQ:
            if place(replace(small, seq=seq), fleet).verdict == "fits":
                yield f"method {method} with --recompute, micro-batch 1 and sequences of {seq} tokens fits"
                return
            seq //= 2


def _with_method(work: Workload, method: str) -> Workload:
    return replace(work, method=method, precision="nf4" if method.endswith("qlora") else "bf16")


def _more_devices(work: Workload, best: Placed) -> Iterator[str]:
    """How many devices of the best kind fit the job as it is, or else with recomputing and single sequences."""
    small = replace(work, recompute="full", micro_batch=1)
    for changed, words in ((work, "fit"), (small, "with --recompute and micro-batch 1 fit")):
        count = 2
        while count <= MOST_DEVICES:
            group = replace(best.group, count=count)
            if count > best.group.count and _sharded(changed, group).verdict == "fits":
                yield f"{count}x {group.device.name}, weights and optimizer sharded, {words}"
                return
            count *= 2


def show(answer: Answer) -> list[str]:
    """The answer as lines for a terminal, with the largest terms first."""
    best, found = answer.best, answer.best.estimate
    work = best.work
    lines = [
        f"{work.spec.name}, {work.method} at {work.precision}, {work.micro_batch} x {work.seq} tokens: {best.verdict}",
        f"{best.layout}: {found.value / GIB:.1f} GiB ({found.low / GIB:.1f} to {found.high / GIB:.1f}) "
        f"of {best.room / GIB:.1f} GiB usable",
    ]
    for term in sorted(found.terms, key=lambda each: -each.value):
        bar = "#" * max(1, round(30 * term.value / max(found.value, best.room)))
        lines.append(f"  {term.name:26}{term.value / GIB:>9.2f} GiB  {bar:30} {term.formula}")
    lines += [f"hint: {hint}" for hint in answer.hints]
    lines.append(f"constants: {found.provenance}")
    return lines

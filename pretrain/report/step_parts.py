"""Where the time of training steps went, by part, from a trace of torch's profiler. Torch-free.

Each moment of a step counts for one part, so that the parts add up to the step:

- on a GPU for the part that launched the kernel that runs; for communication if only that runs; and while the GPU is idle, for
  the loader or for what runs between steps if the main thread is there, else for `idle`
- on a CPU for the innermost range of the main thread

A part is known by its ranges, which `pretrain/loop/parts.py` puts around methods. The backward pass of an operator counts for
the part in which its forward pass ran: autograd's nodes have the sequence number of the operator that made them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

EMBEDDING, ATTENTION, MLP, NORMS, RESIDUAL, BLOCKS = "embedding", "attention", "mlp", "norms", "residual", "blocks"
OUTPUT, LOSS, OPTIMIZER, COMMUNICATION, LOADER = "output", "loss", "optimizer", "communication", "loader"
ENGINE, OURS, IDLE = "engine", "ours", "idle"
MODEL = (EMBEDDING, ATTENTION, MLP, NORMS, RESIDUAL, BLOCKS, OUTPUT, LOSS)  # parts with a forward and a backward pass
PARTS = (*MODEL, OPTIMIZER, COMMUNICATION, LOADER, ENGINE, OURS, IDLE)

RANGE = "part "  # begins the name of a part's range
STEP = "ProfilerStep#"  # begins the name of a step's range, as TensorBoard wants it
FORWARD, BACKWARD, AGAIN = "forward", "backward", "recomputed"
_NODE = "autograd::engine::evaluate_function: "
_COMPILED = ("Torch-Compiled Region", "CompiledFunction")
_SENDS = ("c10d::", "_c10d_functional::", "gloo:", "nccl:", "ucc:", "mpi:")
_SENDING_KERNELS = ("nccl", "rccl", "onerail")
_ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCHES = ("cuda_runtime", "cuda_driver")
_ON_CPU = ("cpu_op", "user_annotation")

Event = Mapping[str, Any]


class Owner(NamedTuple):
    """What a moment counts for: a part, and which pass of it."""

    part: str
    phase: str = FORWARD


class Span(NamedTuple):
    start: float
    end: float
    owner: Owner


OUTSIDE = Owner(OURS)


@dataclass(frozen=True)
class StepParts:
    """Mean figures of some steps, in milliseconds."""

    steps: list[int]
    step_ms: list[float]  # of each step
    device: str  # "gpu" or "cpu": where the time was measured
    parts: dict[str, dict[str, float]]  # by part: ms, share, and of the model's parts the ms of each pass
    in_flight_ms: float  # of communication, whatever ran beside it
    hidden_ms: float  # of that, what ran beside other work

    def table(self) -> str:
        """For people, within 100 columns."""
        mean = sum(self.step_ms) / len(self.step_ms)
        lines = [f"{'part':<14}{'ms':>10}{'share':>8}{'forward':>10}{'backward':>10}{'recomputed':>12}"]
        for part, figures in self.parts.items():
            passes = (
                [f"{figures[f'{phase}_ms']:,.2f}" for phase in (FORWARD, BACKWARD, AGAIN)] if part in MODEL else ["", "", ""]
            )
            line = f"{part:<14}{figures['ms']:>10,.2f}{figures['share']:>8.1%}{passes[0]:>10}{passes[1]:>10}{passes[2]:>12}"
            lines.append(line.rstrip())
        lines.append(f"{'step':<14}{mean:>10,.2f}{1:>8.1%}")
        if self.in_flight_ms:
            lines.append(
                f"messages were under way for {self.in_flight_ms:,.2f} ms, {self.hidden_ms:,.2f} of them beside other work"
            )
        return "\n".join(lines)


def step_parts(events: Sequence[Event]) -> StepParts:
    """Of the `traceEvents` of a Chrome trace with at least one step. ValueError if it has none."""
    steps = sorted(
        (event for event in events if event.get("cat") == "user_annotation" and event["name"].startswith(STEP)),
        key=lambda event: event["ts"],
    )
    if not steps:
        raise ValueError(f"the trace has no range {STEP}…")
    main = steps[0]["tid"]
    threads = _threads(events, main)
    kernels, sends = _kernels(events, threads)
    host = threads[main]
    if kernels or sends:
        waits = [Span(s.start, s.end, s.owner) for s in host if s.owner.part in (LOADER, OURS)]
        owned = fill(fill(kernels, sends), waits)
    else:
        owned, sends = host, _in_flight(events, main)
    on_gpu = owned is not host
    windows = [(event["ts"], event["ts"] + event["dur"]) for event in steps]
    counted = [_within(owned, window, Owner(IDLE if on_gpu else OURS)) for window in windows]
    sending = [span for of_step in counted for span in of_step if span.owner.part == COMMUNICATION]
    in_flight = _length(span for window in windows for span in _clipped(fill([], sends), window))
    hidden = _length(span for window in windows for span in _clipped(fill(sending, sends), window)) - _length(sending)
    return StepParts(
        [int(event["name"].removeprefix(STEP)) for event in steps],
        [_ms(event["dur"]) for event in steps],
        "gpu" if on_gpu else "cpu",
        _figures([span for of_step in counted for span in of_step], len(steps)),
        _ms(in_flight) / len(steps),
        _ms(hidden) / len(steps),
    )


def _figures(spans: Iterable[Span], steps: int) -> dict[str, dict[str, float]]:
    """By part that took any time, in the order of `PARTS`."""
    took = defaultdict[Owner, float](float)
    for span in spans:
        took[span.owner] += span.end - span.start
    total, figures = sum(took.values()), dict[str, dict[str, float]]()
    for part in PARTS:
        by_phase = {phase: took[Owner(part, phase)] for phase in (FORWARD, BACKWARD, AGAIN)}
        if own := sum(by_phase.values()):
            figures[part] = {"ms": _ms(own) / steps, "share": own / total}
            if part in MODEL:
                figures[part] |= {f"{phase}_ms": _ms(time) / steps for phase, time in by_phase.items()}
    return figures


def _threads(events: Iterable[Event], main: int) -> dict[int, list[Span]]:
    """Of each thread that ran operators, the spans of the innermost ranges: the main thread's first, others follow it."""
    by_thread = defaultdict[int, list[Event]](list)
    for event in events:
        if event.get("ph") == "X" and event.get("cat") in _ON_CPU:
            by_thread[event["tid"]].append(event)
    made = dict[int, Owner]()  # by sequence number: the owner of the operator whose forward pass made the node
    own = {main: _innermost(by_thread.pop(main), made, notes=True)}
    return own | {thread: _innermost(of_thread, made, notes=False) for thread, of_thread in by_thread.items()}


def _innermost(events: list[Event], made: dict[int, Owner], notes: bool) -> list[Span]:
    """Spans of one thread's nested events, each with the owner of the innermost one. `notes`: fill `made`, too."""
    spans, open_events, at = list[Span](), list[tuple[float, Owner]](), 0.0

    def advance(to: float) -> None:
        nonlocal at
        if open_events and to > at:
            spans.append(Span(at, to, open_events[-1][1]))
        at = max(at, to)

    for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
        start, end = event["ts"], event["ts"] + event["dur"]
        while open_events and open_events[-1][0] <= start:
            advance(open_events[-1][0])
            open_events.pop()
        advance(start)
        owner = _owner(event, open_events[-1][1] if open_events else OUTSIDE, made)
        arguments = event.get("args", {})
        if notes and "Sequence number" in arguments and not arguments.get("Fwd thread id"):
            made[arguments["Sequence number"]] = owner  # the last operator with a number is the one that made its node
        open_events.append((min(end, open_events[-1][0]) if open_events else end, owner))
    while open_events:
        advance(open_events[-1][0])
        open_events.pop()
    return spans


def _owner(event: Event, around: Owner, made: Mapping[int, Owner]) -> Owner:
    """Of an event inside a range that belongs to `around`."""
    name, arguments = event["name"], event.get("args", {})
    if name.startswith(RANGE):
        part = name.removeprefix(RANGE)
        if part in MODEL and around.part == OURS:
            return around  # a validation
        return Owner(part, FORWARD if around.phase == FORWARD else AGAIN)
    if name.startswith(_NODE):
        node = made.get(arguments.get("Sequence number", -1), Owner(ENGINE))
        return Owner(node.part if node.part in MODEL else ENGINE, BACKWARD)
    if name.startswith(_SENDS):
        return Owner(COMMUNICATION, around.phase)
    if name.startswith(_COMPILED) and around.part == ENGINE:
        return Owner(BLOCKS, around.phase)
    return around


def _kernels(events: Iterable[Event], threads: Mapping[int, Sequence[Span]]) -> tuple[list[Span], list[Span]]:
    """What ran on a GPU: computing, and communication; both without overlaps."""
    launched, ran = dict[int, Owner](), list[Event]()
    begins = {thread: [span.start for span in spans] for thread, spans in threads.items()}
    for event in events:
        if event.get("cat") in _LAUNCHES and event["tid"] in threads and "correlation" in event.get("args", {}):
            place = bisect_right(begins[event["tid"]], event["ts"]) - 1
            if place >= 0:
                launched[event["args"]["correlation"]] = threads[event["tid"]][place].owner
        elif event.get("cat") in _ON_GPU:
            ran.append(event)
    computing, sending = list[Span](), list[Span]()
    for event in sorted(ran, key=lambda event: event["ts"]):
        owner = launched.get(event.get("args", {}).get("correlation"), Owner(ENGINE))
        sends = event["name"].lower().startswith(_SENDING_KERNELS)
        spans = sending if sends else computing
        spans.append(Span(event["ts"], event["ts"] + event["dur"], Owner(COMMUNICATION, owner.phase) if sends else owner))
    return fill([], computing), fill([], sending)


def _in_flight(events: Iterable[Event], main: int) -> list[Span]:
    """When messages were under way, by the threads that sent them."""
    sends = [
        Span(event["ts"], event["ts"] + event["dur"], Owner(COMMUNICATION))
        for event in events
        if event.get("cat") in _ON_CPU and event["tid"] != main and event["name"].startswith(_SENDS)
    ]
    return sorted(sends)


def fill(spans: Sequence[Span], others: Sequence[Span]) -> list[Span]:
    """`spans`, which do not overlap, and what of `others` lies in the gaps between them; all in order of their starts.

    Where others overlap, the first one counts.
    """
    gaps, at, place = list[Span](), float("-inf"), 0
    for other in others:
        at = max(at, other.start)
        while at < other.end:
            while place < len(spans) and spans[place].end <= at:
                place += 1
            until = min(other.end, spans[place].start if place < len(spans) else other.end)
            if until > at:
                gaps.append(Span(at, until, other.owner))
            at = until if until == other.end else max(until, spans[place].end)
    return sorted([*spans, *gaps], key=lambda span: span.start)


def _clipped(spans: Iterable[Span], window: tuple[float, float]) -> list[Span]:
    start, end = window
    return [Span(max(s.start, start), min(s.end, end), s.owner) for s in spans if s.start < end and s.end > start]


def _within(spans: Sequence[Span], window: tuple[float, float], rest: Owner) -> list[Span]:
    """All of a window: what lies between the spans belongs to `rest`."""
    return fill(_clipped(spans, window), [Span(*window, rest)])


def _length(spans: Iterable[Span]) -> float:
    return sum(span.end - span.start for span in spans)


def _ms(microseconds: float) -> float:
    return microseconds / 1000

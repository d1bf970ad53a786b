"""Where a step's time went, from traces written by hand: as torch's profiler writes them, in microseconds."""

from __future__ import annotations

from typing import Any

import pytest

from pretrain.report.step_parts import Owner, Span, fill, step_parts

NODE = "autograd::engine::evaluate_function: "
Events = list[dict[str, Any]]


def event(name: str, start: float, duration: float, cat: str = "cpu_op", tid: int = 1, **arguments: Any) -> dict[str, Any]:
    named = {name.replace("_", " "): value for name, value in arguments.items()}
    return {"ph": "X", "cat": cat, "name": name, "tid": tid, "ts": start, "dur": duration, "args": named}


def annotation(name: str, start: float, duration: float) -> dict[str, Any]:
    return event(name, start, duration, "user_annotation")


def operator(name: str, start: float, duration: float, number: int, forward: int = 0, tid: int = 1) -> dict[str, Any]:
    """An operator with autograd's number; `forward`: the thread of its forward pass, for a node of the backward pass."""
    event_ = event(name, start, duration, tid=tid)
    event_["args"] = {"Sequence number": number, "Fwd thread id": forward}
    return event_


def step(number: int, start: float, duration: float) -> Events:
    return [annotation(f"ProfilerStep#{number}", start, duration)]


def ms(events: Events) -> dict[str, float]:
    """Of each part, in whole microseconds of one step."""
    return {part: round(figures["ms"] * 1000) for part, figures in step_parts(events).parts.items()}


def test_each_moment_counts_for_the_innermost_range_and_all_add_up() -> None:
    events = [
        *step(7, 1000, 1000),
        annotation("part loader", 1010, 90),
        annotation("part engine", 1100, 700),
        annotation("part residual", 1150, 250),
        annotation("part attention", 1200, 100),
        event("aten::mm", 1210, 20),
        event("c10d::allreduce_", 1250, 10),
        annotation("part optimizer", 1600, 150),
        annotation("part communication", 1650, 30),
        annotation("part residual", 1900, 50),  # a validation, between steps
    ]
    found = ms(list(reversed(events)))
    assert found == {
        "attention": 90,
        "residual": 150,
        "optimizer": 120,
        "communication": 40,
        "loader": 90,
        "engine": 300,
        "ours": 210,
    }
    assert sum(found.values()) == 1000


def test_the_backward_pass_counts_for_the_part_of_its_forward_pass() -> None:
    """Number 5 is made by the last operator that has it; 9 by one that no part claims; parts inside of a node run again."""
    events = [
        *step(3, 0, 1000),
        annotation("part engine", 0, 1000),
        annotation("part norms", 0, 100),
        operator("aten::empty", 10, 10, number=5),
        annotation("part attention", 100, 100),
        operator("aten::mm", 110, 10, number=5),
        annotation("part mlp", 200, 100),
        operator("aten::mm", 210, 10, number=6),
        operator("aten::mul", 310, 10, number=9),
        operator(f"{NODE}MulBackward0", 400, 50, number=9, forward=1),
        operator(f"{NODE}MmBackward0", 500, 200, number=6, forward=1),
        annotation("part residual", 510, 60),
        annotation("part mlp", 520, 30),
        operator("aten::mm", 525, 10, number=30),
        operator(f"{NODE}MmBackward0", 700, 70, number=5, forward=1),
        event("aten::mm", 710, 20),
        event(f"{NODE}torch::autograd::AccumulateGrad", 800, 40),
    ]
    found = step_parts(events).parts
    wanted = {"attention": (100, 70, 0), "mlp": (100, 140, 30), "norms": (100, 0, 0), "residual": (0, 0, 30)}
    for part, passes in wanted.items():
        shown = [round(found[part][f"{phase}_ms"] * 1000) for phase in ("forward", "backward", "recomputed")]
        assert shown == list(passes), part
    assert found["engine"]["ms"] * 1000 == pytest.approx(1000 - 570)


def kernel(name: str, start: float, duration: float, correlation: int, stream: int = 7) -> dict[str, Any]:
    return event(name, start, duration, "kernel", stream, correlation=correlation)


def launch(start: float, correlation: int, tid: int = 1) -> dict[str, Any]:
    return event("cudaLaunchKernel", start, 2, "cuda_runtime", tid, correlation=correlation)


def test_on_a_gpu_kernels_count_for_the_part_that_launched_them() -> None:
    """The main thread is ahead of the GPU; the backward pass runs in thread 2; messages count only where nothing else runs."""
    events = [
        *step(4, 0, 1000),
        annotation("part loader", 0, 50),
        annotation("part engine", 50, 750),
        annotation("part attention", 60, 20),
        operator("aten::mm", 62, 10, number=5),
        launch(65, 1),
        annotation("part mlp", 80, 20),
        launch(85, 2),
        operator(f"{NODE}MmBackward0", 100, 50, number=5, forward=1, tid=2),
        launch(110, 3, tid=2),
        launch(120, 4, tid=2),
        kernel("gemm", 100, 200, 1),
        kernel("gemm", 300, 100, 2),
        kernel("gemm", 400, 150, 3),
        kernel("ncclDevKernel_AllReduce", 500, 150, 4, stream=8),
        event("Memcpy DtoH", 700, 20, "gpu_memcpy", 7, correlation=99),
        event("gpu range", 0, 900, "gpu_user_annotation", 7),
    ]
    found = step_parts(events)
    assert found.device == "gpu"
    times = {part: round(figures["ms"] * 1000) for part, figures in found.parts.items()}
    assert times == {
        "attention": 350,
        "mlp": 100,
        "communication": 100,
        "loader": 50,
        "engine": 20,
        "ours": 200,  # from 800 on, after the engine
        "idle": 180,
    }
    assert found.parts["attention"]["backward_ms"] == pytest.approx(0.15)
    assert (found.in_flight_ms, found.hidden_ms) == (pytest.approx(0.15), pytest.approx(0.05))


def test_steps_are_averaged_and_messages_of_other_threads_shown() -> None:
    events = [
        *step(10, 0, 100),
        *step(11, 200, 300),  # what lies between them belongs to neither
        annotation("part engine", 0, 500),
        annotation("part communication", 20, 30),
        event("gloo:all_reduce", 10, 60, "user_annotation", 5),
    ]
    found = step_parts(events)
    assert (found.steps, found.step_ms) == ([10, 11], [0.1, 0.3])
    assert (found.in_flight_ms, found.hidden_ms) == (pytest.approx(0.03), pytest.approx(0.015))
    assert found.table().splitlines()[-1] == "messages were under way for 0.03 ms, 0.01 of them beside other work"
    assert "step                0.20  100.0%" in found.table()
    assert max(map(len, found.table().splitlines())) <= 100


def test_a_trace_without_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="no range ProfilerStep#"):
        step_parts([annotation("part engine", 0, 1)])


def test_gaps_are_filled_by_the_first_that_has_them() -> None:
    a, b, c = Owner("a"), Owner("b"), Owner("c")
    spans = [Span(10, 20, a), Span(30, 40, a)]
    others = [Span(0, 15, b), Span(12, 50, c), Span(18, 33, b), Span(45, 60, b)]
    assert fill(spans, others) == [
        Span(0, 10, b),
        Span(10, 20, a),
        Span(20, 30, c),
        Span(30, 40, a),
        Span(40, 50, c),
        Span(50, 60, b),
    ]

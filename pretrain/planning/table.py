"""Plans for people, at most 100 columns wide, and as JSON. Torch-free until memory is asked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from configs.schema.base import as_yaml
from configs.words import counted
from model.costs.memory import kv_cache_bytes_per_token
from pretrain.engines import layout_words
from pretrain.planning.plan import DRAWN, Plan
from pretrain.planning.search import Candidate, losses
from pretrain.planning.timing import PARTS, Timed

WIDTH = 100
GIB = 2**30
BAR = 30
SHOWN = 0.0005  # the smallest share of a step with a line of its own
HANGING = 12
MEMORY = ("weights", "gradients", "optimizer", "activations", "logits", "buffers", "average", "fragmentation")
WORDS = {
    "products": "matrix products",
    "attention": "attention of queries and keys",
    "passes": "passes through memory",
    "repeated": "recomputation",
    "waiting": "launching kernels",
    "slowed": "slowed by hidden collectives",
    "exposed": "collectives not hidden",
    "bubble": "pipeline bubble",
    "optimizer": "optimizer",
}


def plan_table(of: Plan, title: str) -> str:
    """The whole plan of one configuration."""
    sections = [_head(of, title), _memory(of), _time(of), _collectives(of), _end(of)]
    return "\n\n".join("\n".join(lines) for section in sections if (lines := list(section)))


def search_table(found: Sequence[Candidate], total: int) -> str:
    """The best layouts and what others lose, one line each, and their reasons beneath."""
    lines = [f"{total:,} layouts pass all checks; the fastest of each kind. A few percent are less than a plan can tell.", ""]
    lines.append(f"{'':>3} {'layout':<34} {'micro':>5} {'again':>5} {'GiB':>7} {'tokens/s':>12} {'MFU':>6}  loses")
    for number, one in enumerate(found, start=1):
        of, config = one.plan, one.plan.config
        rate = of.tokens_per_second
        again = "yes" if config.training.recompute_activations else "no"
        words = layout_words(config, of.ranks).replace("deepspeed ", "")
        shown = f"{number:>3} {_short(words, 34):<34} {config.training.micro_batch_size:>5} {again:>5} "
        shown += f"{of.memory.total / GIB:>7,.1f} {rate:>12,.0f} {of.mfu(rate):>6.1%}  "
        lines += _wrapped(shown, one.reasons)
    return "\n".join(lines)


def compare_table(plans: Mapping[str, Plan]) -> str:
    """Variants side by side."""
    width = max(10, min(16, (WIDTH - 30) // len(plans) - 1))
    names = [name.split(":") for name in plans]  # a variant, and beneath it its own fields
    rows = [[_short(parts[row], width) if row < len(parts) else "" for parts in names] for row in range(max(map(len, names)))]
    lines = [" " * 30 + "".join(f"{name:>{width + 1}}" for name in row) for row in rows]
    for label, values in _compared(list(plans.values())):
        lines.append(f"{label:<30}" + "".join(f"{value:>{width + 1}}" for value in values))
    return "\n".join(lines)


def changes_words(changes: Mapping[str, object]) -> str:
    """Fields as overrides of the command line."""
    return " ".join(f"--{name}={value if isinstance(value, str) else as_yaml(value)}" for name, value in changes.items())


def as_json(of: Plan) -> dict[str, Any]:
    """All figures of a plan, in bytes, seconds and tokens."""
    rate = of.tokens_per_second
    low, high = rate / of.spread, rate * of.spread
    timed = [
        {**asdict(each.transfer), "sent": each.transfer.sent, "seconds": each.seconds, "exposed": each.exposed}
        for each in of.step.transfers
    ]
    return {
        "ranks": of.ranks,
        "device": of.cluster.device.name,
        "devices_per_node": of.cluster.per_node,
        "link": of.cluster.link_name,
        "network": of.cluster.network_name,
        "layout": layout_words(of.config, of.ranks),
        "parameters": dict(of.parameters),
        "attention_share": of.attention_share,
        "flops_per_token": {"model": of.flops_per_token, "executed": of.executed_flops_per_token},
        "memory": {name: getattr(of.memory, name) for name in MEMORY} | {"total": of.memory.total, "usable": of.usable},
        "fits": of.fits,
        "step": {"seconds": of.step.total, **{name: getattr(of.step, name) for name in PARTS}},
        "collectives": timed,
        "tokens_per_second": {"expected": rate, "low": low, "high": high},
        "mfu": {"expected": of.mfu(rate), "low": of.mfu(low), "high": of.mfu(high)},
        "tokens": of.tokens,
        "hours": of.seconds / 3600,
        "device_hours": of.device_hours,
        "kilowatt_hours": of.kilowatt_hours,
        "checkpoint": asdict(of.checkpoints),
    }


def _head(of: Plan, title: str) -> Iterator[str]:
    model, training, cluster = of.config.model, of.config.training, of.cluster
    nodes = -(-of.ranks // cluster.per_node)
    yield _short(f"{title} on {of.ranks:,} × {cluster.device.title}", WIDTH)
    between = f", {cluster.network_name} between nodes" if nodes > 1 else ""
    yield f"{counted(nodes, 'node')} of {cluster.per_node}, {cluster.link_name} within a node{between}"
    yield ""
    total = sum(of.parameters.values())
    shape = f"{model.num_layers} layers × {model.hidden_size}, {model.num_heads} heads × {model.head_width}"
    yield f"model       {_short(model.attention_words, 40)}, {shape}"
    parts = ", ".join(f"{name} {count / total:.1%}" for name, count in of.parameters.items() if count)
    yield f"parameters  {_count(total)}: {parts}"
    executed = _count(of.executed_flops_per_token).replace("B", "G")
    yield f"FLOPs       {_count(of.flops_per_token).replace('B', 'G')} a token, {executed} executed"
    batch = f"batch {training.global_batch_size} = {of.data_ranks} × {of.micro_batches} × {training.micro_batch_size}"
    again = ", recomputation" if training.recompute_activations else ""
    yield f"layout      {layout_words(of.config, of.ranks)}, {training.precision}, {batch}{again}"


def _memory(of: Plan) -> Iterator[str]:
    fits = "fits" if of.fits else f"DOES NOT FIT, {of.over / GIB:,.1f} GiB over"
    unit, words = _unit(of.memory.total)
    yield f"{'memory of the fullest rank':<34} {of.memory.total / unit:>9,.1f} {words} of {of.usable / GIB:,.1f} GiB: {fits}"
    for name in MEMORY:
        if held := getattr(of.memory, name):
            yield f"  {name:<32} {held / unit:>9,.1f}     {_bar(held / of.memory.total)}".rstrip()


def _time(of: Plan) -> Iterator[str]:
    step = of.step
    scale, unit = (1, "s") if step.total >= 1 else (1000, "ms")
    count = f"{of.micro_batches:,} micro-batch{'es' * (of.micro_batches != 1)}"
    yield f"{'step':<34} {scale * step.total:>9,.3f} {unit}, {count}"
    for name in PARTS:
        if (share := getattr(step, name) / step.total) >= SHOWN:
            seconds = scale * share * step.total
            yield f"  {WORDS[name]:<32} {seconds:>9,.3f} {share:>6.1%}  {_bar(share)}".rstrip()


def _collectives(of: Plan) -> Iterator[str]:
    timed = _merged(of.step.transfers)
    if not timed:
        return
    unit, words = _unit(max(each.transfer.sent for each in timed))
    yield f"{'collectives of a step':<46} {'calls':>7} {words + ' sent':>9} {'ms':>9} {'not hidden':>10}  behind"
    for each in timed:
        transfer = each.transfer
        name = f"  {transfer.op.replace('_', '-')} of {transfer.part}, {transfer.axis} {transfer.group}"
        figures = f"{transfer.calls:>7,} {transfer.sent / unit:>9,.2f} {1000 * each.seconds:>9,.1f}"
        yield f"{_short(name, 46):<46} {figures} {1000 * each.exposed:>10,.1f}  {transfer.hidden_by}".rstrip()


def _merged(timed: Iterable[Timed]) -> list[Timed]:
    """One row for all transfers of a kind."""
    rows: dict[tuple[object, ...], Timed] = {}
    for each in timed:
        one = each.transfer
        key = one.op, one.part, one.axis, one.group, one.hidden_by
        if (known := rows.get(key)) is not None:
            both = replace(one, calls=one.calls + known.transfer.calls, bytes=one.bytes + known.transfer.bytes)
            each = Timed(both, each.seconds + known.seconds, each.exposed + known.exposed)
        rows[key] = each
    return list(rows.values())


def _end(of: Plan) -> Iterator[str]:
    rate, spread = of.tokens_per_second, of.spread
    low, high = rate / spread, rate * spread
    yield f"rate        {rate:,.0f} tokens/s ({low:,.0f} to {high:,.0f}), {rate / of.ranks:,.0f} a device"
    yield f"MFU         {of.mfu(rate):.1%} ({of.mfu(low):.1%} to {of.mfu(high):.1%})"
    grounds = "nine in ten published runs are within such a range" if of.tested else "no published run is known for this device"
    yield f"            {grounds}: docs/planning.md"
    hours = of.seconds / 3600
    lasts = f"{hours:,.1f} h" if hours >= 1 else f"{60 * hours:,.1f} minutes"
    days = f" ({hours / 24:,.1f} days)" if hours > 48 else ""
    yield f"run         {_count(of.tokens)} tokens in {of.config.training.steps:,} steps: {lasts}{days}"
    power = f"at {DRAWN:.0%} of {of.cluster.device.watts:,.0f} W, devices alone"
    yield f"            {_figure(of.device_hours)} device-hours, {_figure(of.kilowatt_hours)} kWh ({power})"
    saved = of.checkpoints
    share = saved.count * saved.stall / of.seconds
    waits = f"training waits {saved.stall:,.1f} s each, {share:.2%} of the run"
    yield f"checkpoint  {_count(saved.bytes).replace('B', 'G')}B, {saved.count:,} times; {waits}"
    if lost := losses(of):
        yield from _wrapped("loses       ", lost)


def _compared(plans: Sequence[Plan]) -> Iterator[tuple[str, list[str]]]:
    def row(label: str, values: Iterable[str]) -> tuple[str, list[str]]:
        return label, list(values)

    yield row("parameters", (_count(sum(of.parameters.values())) for of in plans))
    yield row("  attention", (_count(of.parameters["attention"]) for of in plans))
    yield row("MLP width", (f"{of.config.model.ffn_width:,}" for of in plans))
    yield row("GFLOP a token", (_figure(of.flops_per_token / 1e9) for of in plans))
    yield row("  executed", (_figure(of.executed_flops_per_token / 1e9) for of in plans))
    yield row("KV cache a token, KiB", (f"{kv_cache_bytes_per_token(of.config.model) / 1024:,.1f}" for of in plans))
    yield row("memory of a rank, GiB", (f"{of.memory.total / GIB:,.1f}{'' if of.fits else ' !'}" for of in plans))
    yield row("  activations", (f"{of.memory.activations / GIB:,.1f}" for of in plans))
    yield row("tensor-parallel GiB a step", (_sent(of, "tensor") for of in plans))
    yield row("step, s", (f"{of.step.total:,.3f}" for of in plans))
    yield row("  matrix products", (f"{of.step.products:,.3f}" for of in plans))
    yield row("  attention", (f"{of.step.attention:,.3f}" for of in plans))
    yield row("  passes through memory", (f"{of.step.passes:,.3f}" for of in plans))
    yield row("  collectives not hidden", (f"{of.step.exposed:,.3f}" for of in plans))
    yield row("tokens/s", (f"{of.tokens_per_second:,.0f}" for of in plans))
    yield row("MFU", (f"{of.mfu(of.tokens_per_second):.1%}" for of in plans))
    yield row("device-hours", (_figure(of.device_hours) for of in plans))
    yield row("kWh", (_figure(of.kilowatt_hours) for of in plans))


def _sent(of: Plan, axis: str) -> str:
    return f"{sum(each.transfer.sent for each in of.step.transfers if each.transfer.axis == axis) / GIB:,.2f}"


def _wrapped(start: str, phrases: Sequence[str]) -> list[str]:
    """Phrases after the start of a line, which go on beneath where they do not fit."""
    lines, line = [], start
    for number, phrase in enumerate(phrases):
        comma = "," if number < len(phrases) - 1 else ""
        if len(line) + len(phrase) + len(comma) > WIDTH and number:
            lines.append(line.rstrip())
            line = " " * min(len(start), HANGING)
        line += f"{phrase}{comma} "
    return [*lines, line.rstrip()]


def _unit(largest: float) -> tuple[int, str]:
    """What sizes up to `largest` are shown in."""
    return (GIB, "GiB") if largest > GIB / 4 else (2**20, "MiB")


def _bar(share: float) -> str:
    return "█" * round(BAR * share)


def _short(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def _figure(value: float) -> str:
    """A whole number, or three digits of a small one."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _count(value: float) -> str:
    """A number of parameters or tokens with three digits: 6.88 B."""
    for size, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:,.{max(0, 2 - len(str(int(value / size))) + 1)}f} {name}"
    return f"{value:,.0f}"

"""The rows of benchmarks/gpu.py as one page of text, at most 60 lines of 120 columns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from benchmarks.gpu_stages.stages import STAGES, Row

COLUMNS = 120


def page(rows: Sequence[Row]) -> str:
    """A section for each stage that has rows."""
    by_stage = {stage.name: [row for row in rows if row["stage"] == stage.name] for stage in STAGES}
    peak = max((row["flops_per_second"] for row in by_stage["machine"] if "side" in row), default=None)
    lines: list[str] = []
    for name, section in SECTIONS.items():
        if by_stage[name]:
            lines += section(by_stage[name], peak)
            lines += [f"{name}: {row['error']}" for row in by_stage[name] if "error" in row and "case" not in row]
    lines.append("; ".join(_stage_line(stage, rows) for stage, rows in by_stage.items() if rows))
    return "\n".join(line[:COLUMNS] for line in lines)


def _stage_line(stage: str, rows: Sequence[Row]) -> str:
    seconds = sum(row["seconds"] for row in rows if "seconds" in row)
    failed = sum("error" in row for row in rows)
    return f"{stage} {seconds:.0f} s" + (f" ({failed} errors)" if failed else "")


def _reason(row: Row) -> str:
    return f"skipped: {row['skipped']}" if "skipped" in row else f"error: {row['error']}"


def _known(value: Any, text: str) -> str:
    return "-" if value is None else format(value, text)


def _machine(rows: Sequence[Row], peak: float | None) -> Iterator[str]:
    failed = []
    for row in rows:
        if "packages" in row:
            sheet = "" if row["peak_tflops"] is None else f"; data sheet: {row['peak_tflops']:g} TFLOP/s in bf16"
            yield f"{row['device']}; CUDA {row['cuda']}, Python {row['python']}{sheet}"
            yield ", ".join(f"{name} {version}" for name, version in row["packages"].items())
        elif "bytes_per_second" in row:
            yield f"copy: {row['bytes_per_second'] / 1e9:,.0f} GB/s, bytes read and written"
        elif "case" in row and "side" not in row:
            failed.append(f"{row['case']}: {_reason(row)}")
    yield from failed[:2]
    sides = [f"{row['side']}³ {row['flops_per_second'] / 1e12:,.3g}" for row in rows if "side" in row]
    yield f"bf16 matmul, TFLOP/s: {', '.join(sides) or '-'}"


def _correctness(rows: Sequence[Row], peak: float | None) -> Iterator[str]:
    """The worst error over all head widths and lengths, and the largest ratio to torch's."""
    found = [row for row in rows if "error_size" in row]
    kernels = dict.fromkeys((row["variant"], row["kernel"]) for row in found)
    masks = list(dict.fromkeys(row["mask"] for row in found))
    yield f"{'largest error in bf16 (× torch, same task)':<40}" + "".join(f"{mask:>20}" for mask in masks)
    for variant, kernel in kernels:
        line = f"  {variant + ' by ' + kernel:<38}"
        for mask in masks:
            same = [row for row in found if (row["variant"], row["kernel"], row["mask"]) == (variant, kernel, mask)]
            line += f"{_errors(same):>20}"
        yield line
    failed = [row for row in rows if "case" in row and ("error" in row or not row.get("ok", True))]
    if failed:
        yield f"  {len(failed)} not right, first {failed[0]['case']}: {failed[0].get('error', 'WRONG')}"


def _errors(rows: Sequence[Row]) -> str:
    if not rows:
        return "-"
    ratios = [row["error_size"] / row["torch_error"] for row in rows if row["torch_error"]]
    ratio = f" ({max(ratios):.1f}x)" if ratios else ""
    return f"{max(row['error_size'] for row in rows):.4f}{ratio}{'' if all(row['ok'] for row in rows) else ' WRONG'}"


def _resume(rows: Sequence[Row], peak: float | None) -> Iterator[str]:
    yield "resumed after a stop, to the bit"
    for row in rows:
        if "case" in row:
            yield f"  {row['case']:<38}" + (_reason(row) if "ok" not in row else "equal" if row["ok"] else "WRONG")


def _attention(rows: Sequence[Row], peak: float | None) -> Iterator[str]:
    """Milliseconds of both passes, and the rate of useful FLOPs in both together as a share of the matmul rate."""
    found = [row for row in rows if "pass" in row]
    sizes = list(dict.fromkeys((row["heads"], row["head_dim"]) for row in found))
    length = f"T {found[0]['tokens']}, width {found[0]['width']}, batch {found[0]['batch']}" if found else ""
    yield f"{'attention, ' + length:<40}" + "".join(f"{f'{heads} × {width}: fwd, both ms':>26}" for heads, width in sizes)
    for name in dict.fromkeys(row["case"].partition(",")[0] for row in rows if "case" in row):
        own = [row for row in rows if row.get("case", "").partition(",")[0] == name]
        line = f"  {name:<38}"
        reasons = [_reason(row) for row in own if "pass" not in row]
        for heads, _ in sizes if len(reasons) < len(own) else ():
            figures = {row["pass"]: row for row in own if row.get("heads") == heads}
            times = [f"{figures[which]['median_s'] * 1e3:.2f}" if which in figures else "-" for which in ("fwd", "fwd_bwd")]
            if peak is not None and "fwd_bwd" in figures:
                times.append(f"{figures['fwd_bwd']['flops_per_second'] / peak:.0%}")
            line += f"{' '.join(times):>26}"
        yield line + (f"  {reasons[0]}" if reasons else "")


def _training(rows: Sequence[Row], peak: float | None) -> Iterator[str]:
    header = f"{'tokens/s':>10}{'MFU':>7}{'of matmul':>10}{'executed':>9}{'peak GiB':>9}{'first s':>8}"
    yield f"{'training step, 1 B configuration':<40}{header}  top kernel"

    def figures(row: Row) -> str:
        rates = [
            None if peak is None or row[name] is None else row[name] / peak
            for name in ("model_flops_per_second", "executed_flops_per_second")
        ]
        top = f"{row['top'][0][1]:.0%} {row['top'][0][0]}" if row["top"] else "-"
        speed = f"{row['tokens_per_second']:>10,.0f}{_known(row['mfu'], '.1%'):>7}{_known(rates[0], '.1%'):>10}"
        return f"{speed}{_known(rates[1], '.1%'):>9}{row['peak_gib']:>9.1f}{row['first_s']:>8.1f}  {top}"

    yield from _cases(rows, "mfu", figures)


def _cases(rows: Sequence[Row], figure: str, figures: Callable[[Row], str]) -> Iterator[str]:
    """A line for each case: its figures if its row has `figure`, else why it has none."""
    for row in rows:
        if "case" in row:
            yield f"  {row['case']:<38}{figures(row) if figure in row else _reason(row)}"


def _decoding(rows: Sequence[Row], peak: float | None) -> Iterator[str]:
    header = f"{'tokens/s':>10}{'ms/step':>9}{'prompt ms':>10}{'KV MiB':>9}{'layers':>7}{'width':>7}{'batch':>6}"
    yield f"{'decoding':<40}{header}"

    def figures(row: Row) -> str:
        speed = f"{row['tokens_per_second']:>10,.1f}{row['token_s'] * 1e3:>9.2f}{row['prefill_s'] * 1e3:>10.1f}"
        return f"{speed}{row['kv_bytes'] / 2**20:>9.1f}{row['layers']:>7}{row['width']:>7}{row['batch']:>6}"

    yield from _cases(rows, "token_s", figures)


def _fp8(rows: Sequence[Row], peak: float | None) -> Iterator[str]:
    yield "fp8"
    for row in rows:
        if "side" in row:
            yield f"  {row['side']}³ {row['flops_per_second'] / 1e12:,.1f} TFLOP/s"
        elif "bf16_loss" in row:
            speed = f"{row['tokens_per_second']:,.0f} tokens/s, in bf16 {row['bf16_tokens_per_second']:,.0f}"
            yield f"  {row['case']:<38}{speed}; loss {row['loss']:.4f}, in bf16 {row['bf16_loss']:.4f}"
        elif "case" in row:
            yield f"  {row['case']:<38}{_reason(row)}"


SECTIONS: dict[str, Callable[[Sequence[Row], float | None], Iterator[str]]] = {
    "machine": _machine,
    "correctness": _correctness,
    "resume": _resume,
    "attention": _attention,
    "training": _training,
    "decoding": _decoding,
    "fp8": _fp8,
}

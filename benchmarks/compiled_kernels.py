"""What the Triton kernels need on an H100 or H200, without one: `python benchmarks/compiled_kernels.py --json kernels.json`.

Compiles every kernel of shared scores with its default tiles for sm_90 and reads the assembler's report: registers of a thread
(255 at most), bytes that a thread spills to local memory, and shared memory of a block (227 KiB at most). A GPU is not needed;
Triton brings the assembler. Times are not known from this: docs/gpu.md says what was timed.

JSON: a list of rows with kernel, head_dim, dtype, masked (padding and documents), registers, spill_stores and spill_loads
(bytes of a thread), shared_bytes, triton (its version).
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository instead of benchmarks/

import argparse
import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from itertools import product
from typing import Any

from benchmarks.arguments import names, numbers
from configs.errors import UserError
from launch.common import output_file, run_command

KERNELS = ("references_kernel", "forward_kernel", "query_gradient_kernel", "key_gradient_kernel", "delta_kernel")
HEADS = 1024  # enough for groups of heads as wide as the tiles allow
DTYPES = {"bfloat16": "bf16", "float32": "fp32"}
POINTERS = {
    **dict.fromkeys(("c", "ref_c", "e_value", "slopes", "lse", "delta", "dq", "dk", "dv", "dc"), "*fp32"),
    **dict.fromkeys(("ref_key", "run", "spans"), "*i32"),
    "valid": "*u8",
    "documents": "*i64",
    "scale": "fp32",
}
STRIDES = ("q_batch", "q_row", "k_batch", "k_row", "v_batch", "v_row")
REPORT = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers", re.S)


def compiled(head_dim: int, dtype: str, masked: bool) -> Iterator[dict[str, Any]]:
    """A row for each kernel with its default tiles."""
    import triton
    from triton import knobs

    knobs.nvidia.dump_ptxas_log = knobs.compilation.always_compile = True  # what comes from a cache has no report
    for name in KERNELS:
        with redirect_stdout(StringIO()) as log:
            binary = _compile(name, head_dim, dtype, masked)
        _, stores, loads, registers = map(int, REPORT.findall(log.getvalue())[-1])
        yield {
            "kernel": name,
            "head_dim": head_dim,
            "dtype": dtype,
            "masked": masked,
            "registers": registers,
            "spill_stores": stores,
            "spill_loads": loads,
            "shared_bytes": binary.metadata.shared,
            "triton": triton.__version__,
        }


def _compile(name: str, head_dim: int, dtype: str, masked: bool) -> Any:
    """The kernel as its calls in model/attention/shared_scores/triton_calls.py would have it compiled for sm_90."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from model.attention.shared_scores import triton_calls, triton_kernels

    kernel = getattr(triton_kernels, name)
    torch_dtype = getattr(torch, dtype)
    tiles = triton_calls.default_tiles(head_dim, torch_dtype)
    tiles = tiles if name == "forward_kernel" else tiles.of_backward()
    options = triton_calls.compile_constants(tiles, HEADS, head_dim, torch_dtype, True, masked, masked)
    launch = {option: options.pop(option) for option in ("num_warps", "num_stages")}
    options["BM"] = tiles.key_rows if name == "key_gradient_kernel" else tiles.rows
    options |= {"SEGMENT": tiles.segment, "ROWS": max(16, 4096 // options["WIDTH"])}
    constants = {key: value for key, value in options.items() if key in kernel.arg_names}
    pointers = POINTERS | dict.fromkeys(("q", "k", "v", "heads", "d_heads"), f"*{DTYPES[dtype]}")
    signature = {key: "constexpr" if key in constants else pointers.get(key, "i32") for key in kernel.arg_names}
    # What a launch finds in real tensors: addresses and strides are multiples of 16.
    divisible = [i for i, key in enumerate(kernel.arg_names) if signature[key].startswith("*") or key in STRIDES]
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in divisible})
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=launch)


def line(row: dict[str, Any]) -> str:
    masked = "masked" if row["masked"] else "causal"
    figures = f"{row['registers']:>9} {row['spill_stores']:>12,} {row['spill_loads']:>11,} {row['shared_bytes'] / 1024:>10.1f}"
    return f"{row['kernel']:<22} {row['head_dim']:>8} {row['dtype']:<9} {masked:<7} {figures}"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head-dims", default="8,16,32,64,128", metavar="N,N", help="default: %(default)s")
    parser.add_argument("--dtypes", default="bfloat16,float32", metavar="A,B", help="default: %(default)s")
    parser.add_argument("--masked", action="store_true", help="with padding and documents; default: causal alone")
    parser.add_argument("--json", type=output_file(".json"), metavar="FILE", help="write the rows there")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    if os.environ.pop("TRITON_INTERPRET", None) == "1":
        print("TRITON_INTERPRET is ignored: the interpreter compiles nothing", file=sys.stderr)
    head_dims, dtypes = numbers(arguments.head_dims, "head-dims"), names(arguments.dtypes, "dtypes", tuple(DTYPES))
    from model.attention.shared_scores import triton_calls

    if not triton_calls.INSTALLED:
        raise UserError("Triton is not installed")
    if max(head_dims) > triton_calls.MAX_HEAD_DIM:
        raise UserError(f"--head-dims {max(head_dims)}: the kernels go up to {triton_calls.MAX_HEAD_DIM}")
    print(f"{'kernel':<22} {'head_dim':>8} {'dtype':<9} {'mask':<7} registers spill stores spill loads shared KiB", flush=True)
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        for dtype, head_dim in product(dtypes, head_dims):
            for row in compiled(head_dim, dtype, arguments.masked):
                rows.append(row)
                print(line(row), flush=True)
                if arguments.json:
                    arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_command(main)

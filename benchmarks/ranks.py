"""New processes on this machine that form one process group, for benchmarks of layouts."""

from __future__ import annotations

import argparse
import math
import os
import socket
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from configs.errors import UserError
from configs.schema import ParallelConfig
from pretrain.distributed.layout import Layout
from pretrain.distributed.process import prepare_process
from pretrain.distributed.rendezvous import open_layout


def run_ranks(work: Callable[..., None], ranks: int, *arguments: Any, seconds: float = math.inf) -> None:
    """Run `work(rank, port, *arguments)` in `ranks` processes to completion; UserError if it takes longer than `seconds`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = spawn(_run, (work, port, *arguments), nprocs=ranks, join=False)
    assert context is not None
    deadline = time.monotonic() + seconds
    try:
        while not context.join(timeout=1):
            if time.monotonic() > deadline:
                raise UserError(f"{work.__name__}: no result after {seconds:.0f} s")
    finally:
        for process in context.processes:
            process.kill()


def _run(rank: int, work: Callable[..., None], port: int, *arguments: Any) -> None:
    work(rank, port, *arguments)
    sys.stdout.flush()
    os._exit(0)  # during interpreter shutdown, threads of process groups sometimes abort the process


@contextmanager
def one_of(ranks: int, rank: int, port: int, parallel: ParallelConfig | None = None) -> Iterator[Layout]:
    """In a process of `run_ranks`: set it up as a launcher would, with an open layout and one thread."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
    layout = Layout.from_environment(parallel)
    prepare_process(layout, deterministic=True)
    torch.set_num_threads(1)
    with open_layout(layout):
        yield layout
        dist.barrier()


def names_among(known: Collection[str]) -> Callable[[str], list[str]]:
    """An argparse type: some of `known`, separated by semicolons."""

    def parse(text: str) -> list[str]:
        names = [name.strip() for name in text.split(";")]
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {'; '.join(known)}")
        return names

    return parse

"""The rendezvous of ranks: who is missing, what differs, restarts on the same store, one process alone."""

from __future__ import annotations

import os
import shutil
import socket
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from configs.errors import UserError
from configs.load import load_config
from pretrain.distributed.layout import Layout
from pretrain.distributed.pace import Pace
from pretrain.distributed.rendezvous import (
    ROOT,
    Place,
    differences,
    facts,
    group_timeout,
    open_layout,
    process_state,
    ranks_text,
    source_hashes,
    wait_for_ranks,
)
from tests.helpers import free_port, write_run

CPU = torch.device("cpu")


def place(rank: int, node: str = "node1") -> Place:
    return Place(rank, node, "10.0.0.1", node, 100 + rank, 1, "cpu")


def test_mixed_devices_are_told_with_ranks_and_nodes_of_each() -> None:
    devices = ["NVIDIA H100", "NVIDIA H100", "CPU", "NVIDIA H100"]
    arrivals = [(place(rank, f"node{rank // 2}"), {"device": name, "torch": "2.13"}) for rank, name in enumerate(devices)]
    assert differences(arrivals) == (
        "the ranks do not run the same thing\n  device: NVIDIA H100 on ranks 0–1, 3 (node0, node1); CPU on rank 2 (node1)"
    )


def test_a_thousand_equal_ranks_have_no_differences_and_unequal_ones_are_told_briefly() -> None:
    same = {f"field{number}": "1" for number in range(50)}
    arrivals = [(place(rank, f"node{rank // 8}"), same) for rank in range(1000)]
    assert differences(arrivals) is None
    arrivals[500] = (place(500, "node62"), dict.fromkeys(same, "2"))
    text = differences(arrivals)
    assert text is not None
    lines = text.splitlines()
    assert lines[1] == "  field0: 1 on ranks 0–499, 501–999 (node0, node1, node2, node3, … 125 nodes); 2 on rank 500 (node62)"
    assert lines[-1] == "  and 45 more"
    assert len(lines) == 7


def test_a_fact_that_one_rank_lacks_is_a_difference() -> None:
    text = differences([(place(0), {"model/new.py": "abc"}), (place(1), {})])
    assert text is not None
    assert text.endswith("  model/new.py: abc on rank 0 (node1); absent on rank 1 (node1)")


@pytest.mark.parametrize(
    ("ranks", "text"), [([3], "rank 3"), ([1, 0], "ranks 0–1"), ([0, 2, 3, 4, 7], "ranks 0, 2–4, 7"), (range(0, 99, 2), None)]
)
def test_ranks_are_named_in_spans(ranks: list[int], text: str | None) -> None:
    if text is None:
        assert ranks_text(ranks) == f"ranks {', '.join(str(rank) for rank in range(0, 32, 2))}, …"
    else:
        assert ranks_text(ranks) == text


def test_facts_are_the_configuration_the_sources_and_the_versions(tmp_path: Path, prepared: Path) -> None:
    config = write_run(tmp_path, prepared)
    one, other = (facts(load_config(config, [f"--run.seed={seed}"]), "auto", CPU) for seed in (1, 2))
    assert {name for name in one if one[name] != other[name]} == {"run.seed"}
    assert one["torch"] == torch.__version__.partition("+")[0] or one["torch"] == torch.__version__
    assert {"python", "deepspeed", "megatron-core", "device", "--resume", "pretrain/run.py", "model/attention/mhe.py"} <= set(
        one
    )


def test_source_hashes_see_a_change_of_one_byte_and_a_new_file(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    before = source_hashes(tmp_path)
    assert before == {name: value for name, value in source_hashes(ROOT).items() if name.startswith("configs/")}
    (tmp_path / "configs" / "errors.py").write_bytes((ROOT / "configs" / "errors.py").read_bytes() + b"\n")
    (tmp_path / "configs" / "new.py").touch()
    after = source_hashes(tmp_path)
    assert {name for name in after if before.get(name) != after[name]} == {"configs/errors.py", "configs/new.py"}


def at(rank: int, size: int = 2) -> Layout:
    return Layout(rank, size, rank, size)


@pytest.fixture
def agent_store(monkeypatch: pytest.MonkeyPatch) -> dist.TCPStore:
    """The store of a launcher that outlives attempts, as torchrun's."""
    port = free_port()
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20))


def test_ranks_find_each_other_again_on_the_same_store_after_a_restart(
    agent_store: dist.TCPStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ThreadPoolExecutor(2) as pool:
        for attempt in ("0", "1"):
            monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
            zero, one = pool.map(lambda rank: wait_for_ranks(at(rank), {"a": "1"}, 0.5), (0, 1))
            assert zero.first == one.first == zero.place == one.mates[0]
            assert zero.mates == (one.place,)
            assert (zero.place.pid, zero.place.address, zero.serves_store) == (os.getpid(), "127.0.0.1", False)
            key = f"seen in attempt {attempt}"
            zero.store.set(key, "yes")
            assert one.connect().get(key) == b"yes"
            assert not one.store.check(["seen in attempt 0"]) or attempt == "0"


def test_a_rank_that_is_there_twice_is_refused(agent_store: dist.TCPStore) -> None:
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda rank: wait_for_ranks(at(rank), {}, 0.5), (0, 1)))
    with pytest.raises(UserError, match=r"rank 1 \(node .*\) is already registered"):
        wait_for_ranks(Layout(1, 2, 1, 2, torch.device("meta")), {}, 0.5)


def test_a_missing_rank_and_different_facts_are_one_error_and_a_quiet_end(agent_store: dist.TCPStore) -> None:
    with pytest.raises(UserError, match=r"ranks 1–2 of 3 did not reach 127.0.0.1:\d+ within 1 s; rank 0 \(.*\) did"):
        wait_for_ranks(at(0, 3), {}, 1 / 60)

    def ending(rank: int) -> BaseException | None:
        try:
            wait_for_ranks(at(rank), {"a": str(rank)}, 0.5, Pace(report=0.2))
        except BaseException as error:
            return error
        return None

    with ThreadPoolExecutor(2) as pool:
        zero, one = pool.map(ending, (0, 1))
    assert isinstance(zero, UserError)
    assert "a: 0 on rank 0 (" in str(zero)
    assert isinstance(one, SystemExit)
    assert one.code == 1


def test_a_port_in_use_is_a_users_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        with pytest.raises(UserError, match=r"in use on .*, where rank 0 runs"):
            wait_for_ranks(at(0), {}, 0.5)
    monkeypatch.delenv("MASTER_ADDR")
    with pytest.raises(UserError, match="MASTER_ADDR = ''"):
        wait_for_ranks(at(0), {}, 0.5)


def test_one_process_alone_needs_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setattr(socket, "create_connection", None)
    with open_layout(Layout()):
        assert dist.get_world_size() == 1
    assert not dist.is_initialized()
    assert wait_for_ranks(Layout(), {}, 0.5).mates == ()


def test_the_state_of_processes() -> None:
    assert process_state(os.getpid())[0] == "R"
    assert process_state(2**22 + 1) == ("X", 0)
    own = Place(0, "here", "127.0.0.1", "here", os.getpid(), process_state(os.getpid())[1], "cpu")
    assert own.state() == "R"
    assert (
        Place(0, "here", "127.0.0.1", "here", os.getpid(), own.started + 1, "cpu").state() is None
    )  # the number was used again


def test_collectives_wait_longer_than_the_watchdog() -> None:
    assert group_timeout(3) == timedelta(minutes=7)

"""Whole runs by launch/pretrain.py: equal on every layout, resumable bit for bit, safe when something fails."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import psutil
import pytest
import torch

from configs.load import load_config
from data_pipeline.read.dataset import TokenDataset
from model.decoder import DecoderLM
from model.initialization import init_weights
from pretrain.checkpoints.folder import verify
from pretrain.checkpoints.store import CheckpointStore
from pretrain.checkpoints.unsharded import load_weights
from tests.helpers import (
    ROOT,
    forked,
    losses_of,
    metrics,
    named,
    numbers,
    resolved,
    run,
    start,
    train,
    wait_until,
    write_run,
)

# Takes the place of launch/pretrain.py: the system refuses to grow files, as a full disk does.
NO_ROOM = """
import resource, signal, sys
sys.path.insert(0, {root!r})
import launch.pretrain
from launch.common import run_command
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
run_command(launch.pretrain.main)
"""


def reference_run(config_path: Path, *overrides: str) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step by plain torch: one batch, AdamW, warmup and cosine written out."""
    config = load_config(config_path, overrides).resolved(300)
    model = DecoderLM(config.model)
    init_weights(model, config.run.seed)
    data = TokenDataset(config.data.parts[0].path, "train", config.data.sequence_length, config.run.seed)
    decayed = [
        p
        for name, p in model.named_parameters()
        if p.ndim == 2 and not name.endswith(("query_embedding", "key_embedding", "value_embedding"))
    ]
    others = [p for p in model.parameters() if all(p is not q for q in decayed)]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], betas=(0.9, 0.95)
    )
    figures = []
    for step in range(6):
        data.prepare_range(step * 8, step * 8 + 8)
        tokens = torch.stack([torch.from_numpy(data.sample(number)) for number in range(step * 8, step * 8 + 8)])
        loss = losses_of(model, tokens[:, :-1], tokens[:, 1:]).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rates = [0.005, 0.01, 0.01, 0.00775, 0.00325, 0.001]  # warmup over 2 steps, then 0.1 + 0.9·(1 + cos(π·k/3))/2
        for group in optimizer.param_groups:
            group["lr"] = rates[step]
        optimizer.step()
        optimizer.zero_grad()
        figures.append((loss.item(), norm.item()))
    return figures


@pytest.mark.parametrize("attention", ["mha", "mhe_add", "mhe_mul"])
def test_one_and_two_processes_equal_plain_torch(tmp_path: Path, prepared: Path, attention: str) -> None:
    config = write_run(tmp_path, prepared)
    override = f"--model.attention={attention}"
    expected = torch.tensor(reference_run(config, override))
    stage = {"mha": 0, "mhe_add": 1, "mhe_mul": 2}[attention]
    kernel = "shared_scores" if attention == "mhe_add" else "math"  # the reference takes torch's fused attention
    for name, processes in {"one": 1, "two": 2}.items():
        lines = train(
            config,
            override,
            f"--model.attention_kernel={kernel}",
            f"--parallel.zero_stage={stage}",
            f"--run.folder={tmp_path / name}",
            processes=processes,
        )
        torch.testing.assert_close(torch.tensor(numbers(lines, "loss", "grad_norm")), expected, rtol=2e-5, atol=1e-6)
    one, two = (numbers(metrics(tmp_path / name), "validation/loss") for name in ("one", "two"))
    assert len(one) == 2
    torch.testing.assert_close(torch.tensor(one), torch.tensor(two), rtol=2e-5, atol=0)
    assert expected[-1, 0] < expected[0, 0]


@pytest.mark.parametrize(("attention", "stage", "sequence"), [("mhe_add", 1, True)])
def test_tensor_and_data_parallel_ranks_equal_plain_torch(
    tmp_path: Path, prepared: Path, attention: str, stage: int, sequence: bool
) -> None:
    config = write_run(tmp_path, prepared)
    overrides = [f"--model.attention={attention}", "--model.vocab_size=301"]  # odd: the last shard is filled up
    lines = train(
        config,
        *overrides,
        f"--parallel.zero_stage={stage}",
        "--parallel.tensor=2",
        f"--parallel.sequence={sequence}",
        processes=4,
    )
    expected = torch.tensor(reference_run(config, *overrides))
    torch.testing.assert_close(torch.tensor(numbers(lines, "loss", "grad_norm")), expected, rtol=2e-5, atol=1e-6)


def test_tensor_and_data_parallel_ranks_round_as_one_process(tmp_path: Path, prepared: Path) -> None:
    """In bf16, where DeepSpeed has another optimizer: a replica counted twice would change the norm by far more."""
    config = write_run(tmp_path, prepared)
    alone = train(config, "--training.precision=bf16", f"--run.folder={tmp_path / 'alone'}")
    layout = ["--parallel.tensor=2", "--parallel.sequence=true"]
    ranks = train(config, "--training.precision=bf16", *layout, processes=4)
    figures, expected = (torch.tensor(numbers(lines, "loss", "grad_norm")) for lines in (ranks, alone))
    torch.testing.assert_close(figures[:, 0], expected[:, 0], rtol=2e-3, atol=0)
    torch.testing.assert_close(figures[:, 1], expected[:, 1], rtol=2e-2, atol=0)
    validation, expected_validation = (torch.tensor(numbers(lines, "validation/loss")) for lines in (ranks, alone))
    torch.testing.assert_close(validation, expected_validation, rtol=2e-3, atol=0)


def test_tensor_parallel_ranks_are_one_process_with_its_dropout_and_its_weights(tmp_path: Path, prepared: Path) -> None:
    config = write_run(tmp_path, prepared)
    overrides = ["--model.dropout=0.2", "--training.recompute_activations=true", "--model.vocab_size=301"]
    alone = train(config, *overrides, f"--run.folder={tmp_path / 'alone'}")
    ranks = train(config, *overrides, "--parallel.tensor=2", processes=2)
    for names in (("loss", "grad_norm"), ("validation/loss",)):
        figures, expected = (torch.tensor(numbers(lines, *names)) for lines in (ranks, alone))
        torch.testing.assert_close(figures, expected, rtol=2e-5, atol=1e-6)
    sharded, whole = (load_weights(tmp_path / name / "checkpoints/step_00000006") for name in ("run", "alone"))
    assert sharded.keys() == whole.keys()
    for name, weight in whole.items():
        torch.testing.assert_close(sharded[name], weight, rtol=0, atol=1e-4, msg=named(name))


@pytest.mark.parametrize("engine", [["--parallel.zero_stage=2"], ["--backend=fsdp"]])
def test_head_embeddings_start_and_learn_as_their_settings_say(tmp_path: Path, prepared: Path, engine: list[str]) -> None:
    config = write_run(tmp_path, prepared)
    overrides = ["--model.attention=mhe_add", "--model.num_seeds=2", "--model.head_embedding_std=0.5", "--training.steps=3"]
    train(config, *overrides, *engine, "--optimizer.head_embedding_lr_scale=0", processes=2)
    trained = load_weights(tmp_path / "run/checkpoints/step_00000003")
    model = DecoderLM(resolved(config, overrides).model)
    init_weights(model, seed=resolved(config).run.seed)
    embeddings = {name for name in trained if "attention" in name and name.endswith("_embedding")}
    assert {name for name, start in model.named_parameters() if torch.equal(start, trained[name])} == embeddings
    assert 0.4 < torch.cat([trained[name].flatten() for name in embeddings]).std() < 0.6
    assert embeddings


@pytest.mark.parametrize(
    ("precision", "stage", "tensor", "ranks"),
    [("fp32", 1, 1, 2)],
)
def test_interrupted_and_resumed_run_equals_uninterrupted_one(
    tmp_path: Path, prepared: Path, precision: str, stage: int, tensor: int, ranks: int
) -> None:
    config = write_run(tmp_path, prepared)
    overrides = [
        f"--training.precision={precision}",
        f"--parallel.zero_stage={stage}",
        f"--parallel.tensor={tensor}",
        f"--parallel.sequence={stage > 0}",
        "--model.dropout=0.1",
        "--training.steps=20",
    ]
    whole = train(config, *overrides, f"--run.folder={tmp_path / 'whole'}", processes=ranks)

    arguments = ["launch/pretrain.py", "--config", str(config), *overrides, f"--run.folder={tmp_path / 'parts'}"]
    process = start(arguments, "deepspeed", ranks)
    written = tmp_path / "parts" / "metrics.jsonl"
    wait_until(lambda: written.exists() and len(written.read_text().splitlines()) >= 4)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does on Ctrl-C
    output, errors = process.communicate(timeout=60)
    assert "resume with --resume=auto" in output, output + errors
    (stopped_at,) = CheckpointStore(tmp_path / "parts").steps()
    assert 4 <= stopped_at < 20

    result = run([*arguments, "--resume=auto"], processes=ranks)
    assert result.returncode == 0, result.stderr
    assert f"at step {stopped_at}" in result.stdout
    names = ("step", "loss", "grad_norm", "learning_rate")
    assert numbers(metrics(tmp_path / "parts"), *names) == numbers(whole, *names)  # bit for bit
    assert numbers(metrics(tmp_path / "parts"), "validation/loss")[-1] == numbers(whole, "validation/loss")[-1]
    ours, theirs = (load_weights(tmp_path / name / "checkpoints/step_00000020") for name in ("whole", "parts"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_killed_run_goes_on_from_its_last_complete_checkpoint(tmp_path: Path, prepared: Path) -> None:
    config = write_run(tmp_path, prepared)
    whole = train(config, f"--run.folder={tmp_path / 'whole'}")
    arguments = ["launch/pretrain.py", "--config", str(config), "--checkpoint.every_steps=2", "--training.steps=6"]
    folder = tmp_path / "run" / "checkpoints"
    with forked([*arguments, "--validation.samples=null", "--validation.every_steps=1"]) as ranks:
        wait_until(lambda: (folder / "latest").exists())
        ranks.send_signal(0, signal.SIGKILL)
        assert ranks.join(10) == [-signal.SIGKILL]
    (folder / ".step_00000099.partial").mkdir()  # what a process killed while saving leaves behind
    result = run([*arguments, "--resume=auto"])
    assert result.returncode == 0, result.stderr
    names = ("step", "loss", "grad_norm", "learning_rate")
    assert numbers(metrics(tmp_path / "run"), *names) == numbers(whole, *names)


def test_a_full_disk_keeps_the_old_checkpoint_good(tmp_path: Path, prepared: Path) -> None:
    config = write_run(tmp_path, prepared)
    settings = ["--checkpoint.every_steps=3", "--backend=fsdp"]  # starts sooner than deepspeed
    arguments = ["launch/pretrain.py", "--config", str(config), *settings]
    train(config, *settings, "--training.steps=3", processes=2)

    script = tmp_path / "no_room.py"
    script.write_text(NO_ROOM.format(root=str(ROOT)))
    result = run([str(script), *arguments[1:], "--resume=auto"], processes=2)
    assert result.returncode == 1
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "step_00000006: the checkpoint could not be saved" in errors[0]
    assert "step_00000003 is still complete" in errors[0]
    assert "Traceback" not in result.stderr
    checkpoints = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", "step_00000003"]
    verify(checkpoints / "step_00000003")
    assert run([*arguments, "--resume=auto"], processes=2).returncode == 0


def test_a_rank_that_cannot_save_ends_all_of_them_with_one_error(tmp_path: Path, prepared: Path) -> None:
    config = write_run(tmp_path, prepared)
    written = tmp_path / "run" / "metrics.jsonl"
    with forked(["launch/pretrain.py", "--config", str(config), "--training.steps=100000"], 2) as ranks:
        wait_until(lambda: written.exists() and len(written.read_text().splitlines()) >= 2)
        psutil.Process(ranks.pid(1)).rlimit(psutil.RLIMIT_FSIZE, (20_000, 20_000))
        for rank in (0, 1):
            ranks.send_signal(rank, signal.SIGINT)
        assert ranks.join(60) == [1, 1], ranks.report()
        errors = ranks.errors(0) + ranks.errors(1)
    assert [line.startswith("error:") for line in errors.splitlines()].count(True) == 1, errors
    assert "the checkpoint could not be saved" in errors
    assert "there is no earlier one" in errors
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_optimizer_settings_of_the_command_line_win_over_the_checkpoints(tmp_path: Path, finished: Path) -> None:
    shutil.copytree(finished.with_suffix(""), tmp_path / "run")
    # So small a learning rate leaves only the decay: Π (1 − lr·decay) over the cosine's 0.775, 0.325, 0.1 of the peak.
    overrides = ["--optimizer.lr=1e-6", "--optimizer.weight_decay=1e5", f"--run.folder={tmp_path / 'run'}"]
    overrides.append("--model.attention_kernel=shared_scores")  # not part of what was learned: may change, too
    result = run(["launch/pretrain.py", "--config", str(finished), "--resume=auto", *overrides])
    assert result.returncode == 0, result.stderr
    assert "changed optimizer.weight_decay: 0.1 → 100000.0" in result.stdout
    assert "changed model.attention_kernel: 'auto' → 'shared_scores'" in result.stdout
    before, after = (load_weights(tmp_path / f"run/checkpoints/step_0000000{step}") for step in (3, 6))
    expected = (1 - 0.0775) * (1 - 0.0325) * (1 - 0.01)
    name = "blocks.1.mlp.up.weight"
    torch.testing.assert_close(after[name], before[name] * expected, rtol=0, atol=1e-5)
    name = "blocks.1.attention.query_embedding"  # spared
    torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (["--model.num_layers=3"], "cannot resume from\n  model.num_layers: 2 there, 3 here"),
        (["--training.global_batch_size=4"], "cannot resume from\n  training.global_batch_size: 8 there, 4 here"),
        (["--training.steps=2", "--schedule.warmup_steps=1"], "stands at step 3, beyond training.steps (2)"),
        (["--resume=none"], "holds checkpoints already; pass --resume=auto"),
        (["--resume=nowhere"], "nowhere: no such checkpoint folder"),
        (["--resume=docs"], "docs: not a complete checkpoint of manyheads"),
    ],
)
def test_checkpoints_that_do_not_fit_are_refused(tmp_path: Path, finished: Path, change: list[str], expected: str) -> None:
    arguments = ["launch/pretrain.py", "--config", str(finished), "--resume=auto", *change]
    result = run(arguments)
    assert result.returncode == 1
    assert result.stderr.startswith("error: ") or "\nerror: " in result.stderr
    assert expected in result.stderr
    assert "Traceback" not in result.stderr

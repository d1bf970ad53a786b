"""Voting to stay (V2S of Grouped Head Attention, arXiv 2305.14380): the model is not trained, every batch casts a ballot."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from configs.errors import UserError
from data_pipeline.mix.mixture import training_samples
from data_pipeline.read.loader import TrainLoader
from model.gha.voting import Ballots, Election
from pretrain.checkpoints.state import NotFiniteError
from pretrain.distributed.collectives import together
from pretrain.grouping.election import write_election
from pretrain.grouping.grouping import HeadGrouping
from pretrain.grouping.prune import ELECTION
from pretrain.grouping.pruned_run import validate_once
from pretrain.grouping.report.page import write_report
from pretrain.loop.trainer import Trainer
from pretrain.report.metrics import Figure

FIRST_BATCHES = 10  # group the heads if training has not


def hold_election(trainer: Trainer, checkpoint: Path) -> Election | None:
    """Let the batches after `trainer.step` vote in order; write the result and its report. Every rank calls it.

    `checkpoint` is this step's; the result names it. If training has not grouped the heads, the first batches group them
    before they vote.

    Returns None if a signal arrived: nothing is written, and a later call lets the same batches vote again.
    """
    gha = trainer.config.gha
    grouping = trainer.hook(HeadGrouping)
    loader, steps = _batches(trainer)
    validate_once(trainer)  # for the report: the loss before pruning
    trainer.progress.say(f"vote    {len(steps):,} batches elect {gha.heads_per_group} of the heads of each group")
    grouping.watch(ballots=True)
    with loader:
        if grouping.labels_LN is None:
            grams = [_gram(trainer, grouping, loader, step) for step in steps[:FIRST_BATCHES]]
            try:
                grouping.regroup(sum(grams[1:], grams[0]))
            except NotFiniteError as error:
                raise trainer.diverged(str(error)) from None
        counted = _vote(trainer, grouping, loader, steps)
    if counted is None:
        return None
    ballots, total_LNN = counted
    election = ballots.elect(trainer.step, gha.feature_map, gha.heads_per_group)
    folder = Path(trainer.config.run.folder)

    def write() -> None:
        (folder / ELECTION).parent.mkdir(exist_ok=True)
        write_report(folder, election, total_LNN, trainer.config)
        write_election(folder / ELECTION, election, checkpoint)

    together(write, main_only=True)
    grouping.show(trainer, total_LNN)
    trainer.metrics.write(trainer.step, _margins(election))
    trainer.progress.say(f"elected {folder / ELECTION}; report.html beside it says why")
    return election


def _batches(trainer: Trainer) -> tuple[TrainLoader, range]:
    """The loader of training data and the steps whose batches vote."""
    training, layout, dataset = trainer.config.training, trainer.layout, training_samples(trainer.config)
    count = trainer.config.gha.vote_batches or dataset.samples_per_epoch // training.global_batch_size
    if count == 0:
        raise UserError("gha.vote_batches: an epoch of the data has no full batch; give a number")
    steps = range(trainer.step, trainer.step + count)
    sizes = (training.global_batch_size, training.micro_batch_size, layout.coordinate("data"), layout.size("data"))
    seed, on_gpu = trainer.config.run.seed, layout.device.type == "cuda"
    return TrainLoader(dataset, *sizes, steps=steps.stop, seed=seed, pin_memory=on_gpu), steps


def _gram(trainer: Trainer, grouping: HeadGrouping, loader: TrainLoader, step: int) -> Tensor:
    """The Gram matrices (L, N, N) of one batch."""
    for batch in loader.step(step):
        trainer.backend.eval_loss(batch)
    return grouping.collect()


def _vote(trainer: Trainer, grouping: HeadGrouping, loader: TrainLoader, steps: range) -> tuple[Ballots, Tensor] | None:
    """The ballots of all batches and the sum of their Gram matrices; None if a signal arrived."""
    gha, heads = trainer.config.gha, trainer.config.model.num_heads
    assert grouping.labels_LN is not None
    if grouping.groups * gha.heads_per_group >= heads:
        raise UserError(
            f"gha.heads_per_group = {gha.heads_per_group}: times {grouping.groups} groups must be below "
            f"model.num_heads ({heads})"
        )
    ballots = Ballots(grouping.labels_LN, grouping.groups, gha.ballot, gha.loss)
    total_LNN: Tensor | None = None
    for number, step in enumerate(steps, start=1):
        gram_LNN = _gram(trainer, grouping, loader, step)
        ballots.add(gram_LNN)
        total_LNN = gram_LNN if total_LNN is None else total_LNN + gram_LNN
        if trainer.agree_to_stop():
            return None
        if number % max(1, len(steps) // 10) == 0:
            trainer.progress.say(f"vote    {number:,} of {len(steps):,} batches")
    assert total_LNN is not None
    return ballots, total_LNN


def _margins(election: Election) -> dict[str, Figure]:
    """The smallest margin of each layer's groups: how near a layer was to keeping another head."""
    return {"vote/layers/smallest_margin": [min(of_layer.margins) for of_layer in election.layers]}

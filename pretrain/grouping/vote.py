"""Voting to stay (V2S of Grouped Head Attention, arXiv 2305.14380): the model stands still, every batch gives a ballot."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from configs.errors import UserError
from data_pipeline.read.dataset import TokenDataset
from data_pipeline.read.loader import TrainLoader
from model.gha.voting import Ballots, Election
from pretrain.distributed.collectives import together
from pretrain.grouping.election import write_election
from pretrain.grouping.grouping import HeadGrouping
from pretrain.grouping.prune import ELECTION
from pretrain.grouping.report import write_report
from pretrain.loop.trainer import Trainer

FIRST_LOOK = 10  # batches by which heads are grouped where training has not done so


def hold_election(trainer: Trainer, checkpoint: Path) -> Election | None:
    """Let the batches after `trainer.step` vote, in their order; write the result and its report. Every rank calls it.

    `checkpoint` is that of this step, which the result belongs to.

    None if a signal came meanwhile: nothing is written then, and the same batches vote again. Heads that training has not
    grouped are grouped by the first batches before they vote.
    """
    gha, training, data, layout = trainer.config.gha, trainer.config.training, trainer.config.data, trainer.layout
    grouping = next(hook for hook in trainer.hooks if isinstance(hook, HeadGrouping))
    dataset = TokenDataset(data.path, "train", data.sequence_length, trainer.config.run.seed)
    epoch = dataset.samples_per_epoch // training.global_batch_size
    count = gha.vote_batches or epoch
    if count == 0:
        raise UserError(f"gha.vote_batches: an epoch of {data.path} has no whole batch; give a number")
    last = trainer.step + count
    loader = TrainLoader(
        dataset,
        training.global_batch_size,
        training.micro_batch_size,
        layout.coordinate("data"),
        layout.size("data"),
        steps=last,
    )
    trainer.progress.say(f"vote    {count:,} batches elect {gha.heads_per_group} of the heads of each group")
    grouping.watch(ballots=True)

    def look(step: int) -> Tensor:
        for batch in loader.step(step):
            trainer.backend.eval_losses(batch)
        return grouping.collect()

    with loader:
        if grouping.labels_LN is None:
            looks = [look(step) for step in range(trainer.step, min(last, trainer.step + FIRST_LOOK))]
            grouping.regroup(sum(looks[1:], looks[0]))
        assert grouping.labels_LN is not None
        if grouping.groups * gha.heads_per_group >= trainer.config.model.num_heads:
            raise UserError(
                f"gha.heads_per_group = {gha.heads_per_group}: times {grouping.groups} groups must be below "
                f"model.num_heads ({trainer.config.model.num_heads})"
            )
        ballots = Ballots(grouping.labels_LN, grouping.groups, gha.ballot, gha.loss)
        total_LNN: Tensor | None = None
        for number, step in enumerate(range(trainer.step, last), start=1):
            gram_LNN = look(step)
            ballots.add(gram_LNN)
            total_LNN = gram_LNN if total_LNN is None else total_LNN + gram_LNN
            if trainer.vote_to_stop():
                return None
            if number % max(1, count // 10) == 0:
                trainer.progress.say(f"vote    {number:,} of {count:,} batches")
    folder = Path(trainer.config.run.folder)
    election = ballots.elect(trainer.step, gha.feature_map, gha.heads_per_group)

    def write() -> None:
        assert total_LNN is not None
        (folder / ELECTION).parent.mkdir(exist_ok=True)
        write_report(folder, election, total_LNN, trainer.config)
        write_election(folder / ELECTION, election, checkpoint)

    together(write, main_only=True)
    assert total_LNN is not None
    grouping.show(trainer, total_LNN)
    trainer.metrics.write(trainer.step, _margins(election))
    trainer.progress.say(f"elected {folder / ELECTION}; report.html beside it says why")
    return election


def _margins(election: Election) -> dict[str, float]:
    return {
        f"gha/layer_{layer:02d}/group_{group}_margin": margin
        for layer, of_layer in enumerate(election.layers)
        for group, margin in enumerate(of_layer.margins)
    }

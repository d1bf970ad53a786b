"""From a configuration to a finished run: build the parts, resume if asked, train."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from configs.durable import write_text
from configs.errors import UserError
from configs.load import flat_fields, to_yaml
from configs.schema import Config, ModelConfig, Section, as_yaml
from data_pipeline.read.manifest import read_manifest
from model.gha.voting import Election
from pretrain.build import build_trainer, make_resumer, streamed_text
from pretrain.checkpoints.folder import check_unused, newest_checkpoint, occupied, read_config
from pretrain.checkpoints.resume import STEP, Resumer, Start
from pretrain.checkpoints.store import CheckpointStore
from pretrain.distributed.collectives import barrier, broadcast_object, together
from pretrain.distributed.layout import Layout
from pretrain.distributed.pace import STANDARD, Pace
from pretrain.distributed.process import prepare_process
from pretrain.distributed.rendezvous import facts, group_timeout, wait_for_ranks
from pretrain.distributed.watchdog import Watchdog
from pretrain.grouping.origin import PRUNED
from pretrain.grouping.prune import prune, savings_table
from pretrain.grouping.vote import hold_election
from pretrain.loop.hooks import Checkpoints, Hook
from pretrain.loop.interruption import Interruption
from pretrain.loop.lock import run_lock
from pretrain.loop.profile import Profile
from pretrain.loop.profiled_steps import ProfiledSteps
from pretrain.loop.trainer import Trainer
from pretrain.report.environment import append_environment, environment
from pretrain.report.progress import Progress, SpokenLog, header
from pretrain.report.records import METRICS, read_metrics


def pretrain(config: Config, resume: str, pace: Pace = STANDARD, profiled: ProfiledSteps | None = None) -> int | None:
    """Run `config` to its end; every rank calls it. `resume` is what `--resume` takes, `profiled` what `--profile` does.

    Returns None when the run is complete, else the signal that stopped it; a stopped run can be resumed. Raises UserError for
    what the user can fix. After the rendezvous, an error on one rank ends the processes of all.
    """
    layout = Layout.from_environment(config.parallel)
    if profiled is not None and profiled.memory and layout.device.type != "cuda":
        raise UserError("--profile: memory is noted on GPUs only; leave it out")
    prepare_process(layout, config.training.deterministic)
    minutes = config.parallel.timeout_minutes
    same = {**facts(config, resume, layout.device), "--profile": repr(profiled)}
    rendezvous = wait_for_ranks(layout, same, minutes, pace)
    with Interruption() as interruption, Watchdog(rendezvous, config.parallel, pace) as watchdog:
        layout.open(rendezvous.store, group_timeout(minutes))
        with _locked(Path(config.run.folder)):
            stopped_by = _stages(config, resume, Session(layout, interruption, watchdog, profiled))
        barrier()
        layout.close()  # not after an error: it would break the connections of ranks that still run
    return stopped_by


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Make the run's folder, and hold its lock on the first rank."""
    with ExitStack() as held:

        def lock() -> None:
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(run_lock(folder))

        _together_in(folder, lock)
        yield


@dataclass(frozen=True)
class Session:
    """What the stages of a run share."""

    layout: Layout
    interruption: Interruption
    watchdog: Watchdog
    profiled: ProfiledSteps | None = None

    @property
    def hooks(self) -> list[Hook]:
        """Those of a trainer that its configuration does not ask for."""
        return [Watched(self.watchdog), *([] if self.profiled is None else [Profile(self.profiled)])]

    @contextmanager
    def trainer(self, config: Config, resume: str) -> Iterator[Trainer]:
        """A trainer that the watchdog watches, in the state that `resume` asks for; closed on exit."""
        trainer = _prepare(config, resume, self)
        try:
            trainer.backend.module.register_forward_pre_hook(self.watchdog.moved)
            with _spoken(trainer.progress):
                yield trainer
        except BaseException:
            trainer.close(waits=False)
            raise
        trainer.close()


class Watched(Hook):
    """Tells the watchdog of each step, before other hooks take their time."""

    priority = 0

    def __init__(self, watchdog: Watchdog) -> None:
        self.watchdog = watchdog

    def after_step(self, trainer: Trainer) -> None:
        self.watchdog.reached(trainer.step)

    at_end = after_step


def _stages(config: Config, resume: str, session: Session) -> int | None:
    """Train, vote, or run all stages of Grouped Head Attention, as `gha.stage` says."""
    if config.gha.stage in ("off", "constrain"):
        return _train(config, resume, session)
    if config.gha.stage == "vote":
        if resume == "none":
            raise UserError("gha.stage = 'vote': needs --resume: the checkpoint whose heads are voted on")
        return _elect(config, resume, session)[0]
    pruned = Path(config.run.folder) / PRUNED
    if not _is_pruned(CheckpointStore(pruned), resume):
        stopped_by, election = _elect(config, resume, session)
        if election is None:
            return stopped_by
        gc.collect()  # break the engine's reference cycles so that its memory is freed
        together(lambda: _prune(Path(config.run.folder), election), main_only=True)
        resume = "auto"
    with _locked(pruned):
        return _train(_fine_tuning(config, pruned), resume, session)


def _train(config: Config, resume: str, session: Session) -> int | None:
    with session.trainer(config, resume) as trainer:
        stopped_by = trainer.run()
        _say_end(trainer, stopped_by)
    return stopped_by


def _elect(config: Config, resume: str, session: Session) -> tuple[int | None, Election | None]:
    """Hold the election; a schedule first trains up to it. Returns the signal that stopped it, or the result."""
    with session.trainer(config, resume) as trainer:
        election, stopped_by = None, None
        if config.gha.stage == "schedule":
            stopped_by = trainer.run()
        if stopped_by is None:
            checkpoint = CheckpointStore(Path(config.run.folder)).path(trainer.step)
            if not broadcast_object(checkpoint.exists()):
                trainer.hook(Checkpoints).save_now(trainer)  # a run that resumed another run's checkpoint right at the vote
            election = hold_election(trainer, checkpoint)
            stopped_by = trainer.stopped_by if election is None else None
        if stopped_by is not None:
            _say_end(trainer, stopped_by)
    return stopped_by, election


def _prune(run: Path, election: Election) -> None:
    """Write the pruned run and print what pruning saves. One rank calls it."""
    checkpoint = CheckpointStore(run).path(election.step)
    before, after = (read_config(folder).model for folder in (checkpoint, prune(checkpoint, election, run / PRUNED)))
    print(f"pruned  {run / PRUNED}\n{savings_table(before, after)}", flush=True)


def _say_end(trainer: Trainer, stopped_by: int | None) -> None:
    if stopped_by is None:
        figures = METRICS + (" and in TensorBoard" if trainer.config.logging.tensorboard else "")
        trainer.progress.say(f"done    {trainer.config.run.folder}: {trainer.step} steps; figures in {figures}")
    elif trainer.step == 0:
        trainer.progress.say("stopped before the first step; there is nothing to resume from")
    else:
        trainer.progress.say(f"stopped at step {trainer.step}; resume with --resume=auto")


def _is_pruned(store: CheckpointStore, resume: str) -> bool:
    """True if the schedule has pruned its heads; rank 0 decides for all."""
    found = broadcast_object(store.newest())
    if found is not None and resume != "auto" and not resume.startswith(STEP):
        raise occupied(store.folder)
    return found is not None


def _with_head_dim(model: ModelConfig) -> ModelConfig:
    return model.model_copy(update={"head_dim": model.head_width})


def _fine_tuning(config: Config, pruned: Path) -> Config:
    """The configuration of the schedule's last stage: the run in `pruned`, with its heads and without the constraint.

    UserError if a field that decided which heads were pruned has changed since.
    """
    after, voted_on = read_config(newest_checkpoint(pruned)), CheckpointStore(pruned.parent).newest()
    before = config.model if voted_on is None else read_config(voted_on).model
    names = ("attention", "num_heads", "head_dim", "num_kv_heads")
    off = {"stage": "off"}
    was, asked = (
        {f"model.{name}": value for name, value in flat_fields(_with_head_dim(model)) if name in names}
        | dict(flat_fields(gha, "gha."))
        for model, gha in ((before, after.gha), (config.model, config.gha.model_copy(update=off)))
    )
    for name, value in asked.items():
        if value != was[name]:
            raise UserError(
                f"{name} = {as_yaml(value)}: the heads of {pruned} were chosen with {as_yaml(was[name])}; "
                f"put it back, take another --run.folder, or delete {pruned}"
            )
    decided = {name: getattr(after.model, name) for name in names}
    return config.model_copy(
        update={
            "run": config.run.model_copy(update={"folder": str(pruned)}),
            "model": config.model.model_copy(update=decided),
            "gha": config.gha.model_copy(update=off),
        }
    )


def _prepare(config: Config, resume: str, session: Session) -> Trainer:
    """Create the run's folder and a trainer in the state that `resume` asks for; print the header."""
    manifests, text = [read_manifest(source.path) for source in config.data.parts], streamed_text(config)
    tokens = manifests[0] if text is None else text
    config = config.resolved(tokens.vocab_size, tokens.end_of_document)
    resumer = make_resumer(config, session.layout, text)
    start = _starting_point(resumer, resume)
    if start is None and config.gha.stage == "vote":
        raise UserError(f"{resumer.store.folder}: holds no checkpoint to vote on")
    folder = Path(config.run.folder)
    _together_in(folder, lambda: folder.mkdir(exist_ok=True))  # that of the pruned run
    trainer = build_trainer(config, session.layout, start, session.hooks, session.interruption, text)
    # Written after all checks, so that a rejected run keeps its previous config.yaml.
    _together_in(folder, lambda: write_text(folder / "config.yaml", to_yaml(config)))
    machines = environment(session.layout, trainer.first_step)
    _together_in(folder, lambda: append_environment(folder, machines))
    together(resumer.store.clear_remains, main_only=True)
    trainer.progress.say(header(config, session.layout, text.words() if text else manifests, trainer.first_step))
    if start is not None:
        aside: list[Path] = []
        together(lambda: aside.extend(resumer.leave_later(start, resume)), main_only=True)
        moved = [f"aside   {path}: of a later step" for path in aside]
        for line in (f"resume  {start.folder} at step {trainer.first_step}", *moved, *_changes(start.config, config)):
            trainer.progress.say(line)
    return trainer


@contextmanager
def _spoken(progress: Progress) -> Iterator[None]:
    """Send the model's log messages to `progress`."""
    spoken, logger = SpokenLog(progress), logging.getLogger("model")
    logger.setLevel(logging.INFO)
    logger.addHandler(spoken)
    try:
        yield
    finally:
        logger.removeHandler(spoken)


def _starting_point(resumer: Resumer, resume: str) -> Start | None:
    """The checkpoint to start from, if any. UserError if the run's folder cannot be used."""

    def check_folder() -> None:
        resumer.store.recover()
        if resume == "none":
            check_unused(resumer.store.folder)
        read_metrics(resumer.store.folder.parent)  # a damaged file is an error before the model is built

    together(check_folder, main_only=True)
    return None if resume == "none" else resumer.find(resume)


def _together_in(folder: Path, write: Callable[[], object]) -> None:
    """Call `write`, which writes into the run's folder, on the first rank; all ranks get its UserError."""

    def written() -> None:
        try:
            write()
        except OSError as error:
            raise UserError(f"run.folder = {str(folder)!r}: cannot be written ({error.strerror})") from error

    together(written, main_only=True)


def _changes(then: Config, now: Config) -> list[str]:
    """One line for each field that differs from the checkpoint's configuration."""
    before, after = (dict(flat_fields(config)) for config in (then, now))
    return [
        f"changed {name}: {_shown(before[name])} → {_shown(value)}" for name, value in after.items() if before[name] != value
    ]


def _shown(value: object) -> str:
    sections = isinstance(value, list) and value and all(isinstance(element, Section) for element in value)
    return as_yaml([element.model_dump(exclude_defaults=True) for element in value] if sections else value)  # type: ignore[attr-defined]

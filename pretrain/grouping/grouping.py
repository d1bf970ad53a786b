"""Heads are grouped while a model trains (HUDS and GCT of Grouped Head Attention, arXiv 2305.14380): one object for all layers.

    step s      every attention layer computes the Gram matrix of its maps (model/gha/gram.py) and its groups' constraint
    after it    the matrices are summed over micro-batches and ranks and added to the running ones; heads are regrouped

A step's groups come from earlier steps, so they do not depend on how a batch is split over ranks and micro-batches. The
groups and the running matrices are the same on every rank, and checkpoints hold them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from configs.errors import UserError
from configs.schema import Config
from model.gha import clustering
from model.gha.constraint import HeadConstraint
from model.layers import Layers
from model.tensor_file import Entry, read_tensors, write_tensors
from pretrain.checkpoints.state import NotFiniteError
from pretrain.distributed.collectives import together
from pretrain.distributed.layout import Layout
from pretrain.grouping.observers import attention_layers, summed_grams
from pretrain.grouping.report.charts import similarity_image
from pretrain.loop.hooks import Hook
from pretrain.report.metrics import Figure

if TYPE_CHECKING:
    from pretrain.loop.trainer import Trainer

FILE = "gha.safetensors"  # in a checkpoint


class HeadGrouping(Hook):
    """Groups of all layers' heads, their constraint, and the end of the schedule's first stage."""

    priority = 10  # validation comes after it

    def __init__(self, config: Config, layout: Layout, module: nn.Module, layers: Layers, first_step: int = 0) -> None:
        """`module` has all layers or, in a pipeline, those of a stage. All ranks make one and call its methods together."""
        self.config, self.gha, self.layout = config, config.gha, layout
        model = config.model
        self.shape = model.num_layers, model.num_heads, model.num_heads
        self.attentions = attention_layers(module)
        self.constraints = {
            number: HeadConstraint(layers, model.head_width, self.gha.feature_map, self.gha.loss, self.gha.attention_rows)
            for number in self.attentions
        }
        self.running_LNN: Tensor | None = None
        self.labels_LN: Tensor | None = None
        self.groups = self.gha.groups or 0  # 0: chosen at the first grouping
        self.calm = 0  # consecutive regroupings whose centres moved less than gha.converged_shift
        self.prepare(first_step)

    def ends(self, step: int) -> bool:
        """True if the schedule votes after `step` steps."""
        if self.gha.stage != "schedule" or self.gha.vote_at_step is None:
            return False
        converged = self.gha.converged_shift is not None and self.calm >= self.gha.converged_groupings
        return converged or step >= self.gha.vote_at_step

    def prepare(self, step: int) -> None:
        """Set the weights of the constraint for optimizer step `step`, counted from 0, or switch the constraint off."""
        ramp = min(1.0, (step + 1) / (self.gha.warmup_steps + 1)) / self.config.model.num_layers
        for layer, constraint in self.constraints.items():
            self.attentions[layer].constraint = None if self.ended(step) else constraint
            constraint.alpha, constraint.beta = self.gha.alpha * ramp, self.gha.beta * ramp

    def begin(self, trainer: Trainer) -> None:
        trainer.done |= self.ends(trainer.step)

    def after_step(self, trainer: Trainer) -> None:
        if trainer.last.skipped:
            self.leave_out(trainer.step)
        else:
            try:
                shift_L = self.update(trainer.step)
            except NotFiniteError as error:
                raise trainer.diverged(str(error)) from None
            shown = trainer.step % self.config.logging.every_steps == 0 and not self.ended(trainer.step - 1)
            if shown and self.labels_LN is not None:
                self._report(trainer, shift_L)
        trainer.done |= self.ends(trainer.step)

    def leave_out(self, step: int) -> None:
        """`update` after a step that was skipped: its matrices count nowhere, and a regrouping that was due is left out."""
        if self.ended(step - 1):
            return
        for constraint in self.constraints.values():
            constraint.take()
        self.prepare(step)

    def update(self, step: int) -> Tensor | None:
        """After optimizer step `step`, counted from 1: collect its matrices, regroup if due, prepare the next step.

        Returns how far the centres moved in each layer, (L,), if the heads were regrouped.
        """
        if self.ended(step - 1):
            return None
        due, shift_L = self.labels_LN is None or step % self.gha.regroup_every == 0, None
        if due or self.gha.gram_decay > 0:
            gram_LNN, decay = self.collect(), self.gha.gram_decay
            self.running_LNN = gram_LNN if self.running_LNN is None or decay == 0 else decay * self.running_LNN + gram_LNN
        else:
            for constraint in self.constraints.values():
                constraint.take()
        if due:
            assert self.running_LNN is not None
            shift_L = self.regroup(self.running_LNN)
        if step <= self.gha.warmup_steps:
            self.calm = 0
        self.prepare(step)
        return shift_L

    def ended(self, step: int) -> bool:
        """True if the constraint has ended before optimizer step `step`, counted from 0."""
        return self.gha.end_step is not None and step >= self.gha.end_step

    def collect(self) -> Tensor:
        """`summed_grams` of all layers."""
        return summed_grams(self.constraints, *self.shape[:2], self.layout)

    def regroup(self, gram_LNN: Tensor) -> Tensor | None:
        """Regroup the heads. Returns how far the centres moved in each layer, (L,), or None the first time."""
        if not torch.isfinite(gram_LNN).all():
            raise NotFiniteError("the feature maps of heads are not finite, so they cannot be grouped")
        previous_LN, (layers, heads, _) = self.labels_LN, self.shape
        found = torch.empty(1 + layers * (heads + 1), dtype=torch.float64)
        if self.layout.is_main:  # decides for all ranks: another processor may round a tie differently
            found = torch.cat([part.flatten().double() for part in self._groups_of(gram_LNN)])
        if self.layout.world_size > 1:
            shared = found.to(self.layout.device)
            dist.broadcast(shared, src=0, group=self.layout.group("world"))
            found = shared.cpu()
        groups, shift_L, labels = found.split([1, layers, layers * heads])
        self.groups, self.labels_LN = int(groups), labels.long().view(layers, heads)
        self._hand_out()
        calm = self.gha.converged_shift is not None and float(shift_L.mean()) < self.gha.converged_shift
        self.calm = self.calm + 1 if calm and previous_LN is not None else 0
        return shift_L if previous_LN is not None else None

    def _groups_of(self, gram_LNN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Number of groups, how far the centres moved (L,), and each head's group (L, N)."""
        seed, previous_LN = self.config.run.seed, self.labels_LN
        groups = self.groups or clustering.choose_groups(gram_LNN, self.gha.max_groups, seed)
        labels_LN = clustering.align(clustering.kmeans(gram_LNN, groups, seed), previous_LN, groups)
        if previous_LN is None:
            previous_LN = labels_LN
        return torch.tensor(groups), clustering.centre_shift(gram_LNN, labels_LN, previous_LN, groups), labels_LN

    def watch(self, ballots: bool) -> None:
        """Make layers observe either a vote's passes, which have no gradient, or the passes of training."""
        for layer, constraint in self.constraints.items():
            self.attentions[layer].constraint, constraint.training = constraint, not ballots

    def _hand_out(self) -> None:
        assert self.labels_LN is not None
        labels_LN = self.labels_LN.to(self.layout.device)
        for layer, constraint in self.constraints.items():
            constraint.labels_N, constraint.groups = labels_LN[layer], self.groups

    def figures(self, gram_LNN: Tensor) -> dict[str, Tensor]:
        """Quality of the groups in each layer, (L,) each."""
        assert self.labels_LN is not None
        measures: tuple[Callable[[Tensor, Tensor, int], Tensor], ...] = (
            clustering.homogeneity,
            clustering.diversity,
            clustering.silhouette,
            clustering.dunn,
        )
        return {measure.__name__: measure(gram_LNN, self.labels_LN, self.groups) for measure in measures}

    def _report(self, trainer: Trainer, shift_L: Tensor | None) -> None:
        assert self.labels_LN is not None
        assert self.running_LNN is not None
        if not self.layout.is_main:
            return
        of_layers = self.figures(self.running_LNN) | ({} if shift_L is None else {"centre_shift": shift_L})
        sizes_LC = clustering.group_sizes(self.labels_LN, self.groups)
        values: dict[str, Figure] = {f"similarity/{name}": float(of_L.mean()) for name, of_L in of_layers.items()}
        values |= {f"similarity/layers/{name}": of_L.tolist() for name, of_L in of_layers.items()}
        values["similarity/layers/largest_group"] = sizes_LC.max(dim=1).values.tolist()
        trainer.metrics.write(trainer.step, values)
        every = self.config.validation.every_steps
        if every and trainer.step % every == 0:
            self.show(trainer, self.running_LNN)

    def show(self, trainer: Trainer, gram_LNN: Tensor) -> None:
        """Write images of the heads' similarities to TensorBoard, on the first rank."""
        if not self.layout.is_main:
            return
        assert self.labels_LN is not None
        for layer, (gram_NN, labels_N) in enumerate(zip(gram_LNN, self.labels_LN, strict=True)):
            trainer.metrics.image(trainer.step, f"similarity_images/layer_{layer:02d}", similarity_image(gram_NN, labels_N))

    def save(self, folder: Path) -> list[Path]:
        """Write groups and running matrices into a checkpoint. Returns the file on the first rank, which writes it."""
        if not self.layout.is_main:
            return []
        tensors = {"running": self.running_LNN, "labels": self.labels_LN}
        entries = [Entry.of(name, tensor) for name, tensor in tensors.items() if tensor is not None]
        values = {"maps": self._maps, "groups": str(self.groups), "calm": str(self.calm)}
        write_tensors(folder / FILE, entries, values)
        return [folder / FILE]

    @property
    def _maps(self) -> str:
        """The feature maps that heads are grouped by, in words."""
        rows = f" of {self.gha.attention_rows or 'all'} rows" if self.gha.feature_map == "attention" else ""
        return self.gha.feature_map + rows

    def load(self, folder: Path) -> str | None:
        """Restore what `save` wrote. Groups by other feature maps are ignored; the returned message tells the user so.

        A checkpoint of a run without groups has no such file. Every rank calls it; all raise UserError for a file that does
        not fit.
        """
        said: list[str | None] = []
        together(lambda: said.append(self._load(folder / FILE)))
        return said[0]

    def _load(self, path: Path) -> str | None:
        if not path.exists():
            return None
        tensors, values = read_tensors(path)
        try:
            running, labels = tensors.get("running"), tensors.get("labels")
            maps, groups, calm = values["maps"], int(values["groups"]), int(values["calm"])
            wrong = labels is not None and (
                labels.shape != self.shape[:2] or not 0 <= int(labels.min()) <= labels.max() < groups
            )
            if wrong or (running is not None and running.shape != self.shape):
                raise ValueError("it belongs to another model")
        except (KeyError, ValueError) as error:
            raise UserError(f"{path}: holds no groups of this model's heads ({error})") from error
        if maps != self._maps:
            return f"groups  {path} has those of {maps} maps: heads are regrouped by {self._maps} maps"
        if self.gha.groups not in (None, groups) and labels is not None:
            raise UserError(f"gha.groups = {self.gha.groups}: {path} has {groups} groups in each layer, which cannot change")
        self.running_LNN, self.labels_LN, self.groups, self.calm = running, labels, groups, calm
        if labels is not None:
            self._hand_out()
        return None

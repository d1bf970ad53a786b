"""What grouping heads costs: `python benchmarks/gha.py --json gha.json`.

A training step (forward, backward, AdamW; one process, no engine) with and without groups, alternating: the heads of every
layer are constrained and regrouped at every step, as in the paper. Heads are compared by `value`, `output` or `attention` (of
16 queries of each sequence). `direct` works on the flattened maps of all heads, as the paper's authors do: k-means from
differences of maps and centres, cosines head by head. `sklearn` uses scikit-learn's KMeans instead, with one initialisation,
and all cosines at once. `ratio` is relative to the step without groups just before. `cost` measures only the added work: from
the maps of a forward pass to groups, constraint and its gradient; the difference of two steps would be lost in noise. `to ours`
is that cost relative to ours. Figures are medians over rounds.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository instead of benchmarks/

import argparse
import itertools
import json
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from statistics import median
from time import perf_counter
from typing import Any

from configs.load import load_config
from configs.schema import Config
from launch.common import output_file, run_command, whole_number

GROUPS, WARM = 8, 2
GOALS = {"value": 1.03, "output": 1.03, "attention": 1.10}
SETTINGS = """
run: {{folder: unused}}
model: {{attention: {variant}, hidden_size: {width}, num_layers: {layers}, num_heads: {heads}, vocab_size: 4096}}
data: {{path: unused, sequence_length: {length}}}
training: {{steps: 1000, global_batch_size: {batch}, micro_batch_size: {batch}}}
gha: {{stage: constrain, groups: {groups}, feature_map: {kind}, attention_rows: 16}}
"""


@dataclass(frozen=True)
class Row:
    """One way of grouping the heads of one variant; times in seconds, medians over `runs` rounds."""

    variant: str
    way: str  # a feature map, with the method if it is not ours
    plain_s: float
    step_s: float
    ratio: float
    cost_s: float | None  # of the added work only; not measured for attention maps
    runs: int


class Steps:
    """Training steps of one model on random tokens."""

    def __init__(self, config: Config) -> None:
        import torch

        from model.build import build_model
        from model.initialization import init_weights

        self.config, self.number = config, 0
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = build_model(config.model).to(self.device)
        init_weights(self.model, seed=0)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-4)
        shape = config.training.global_batch_size, config.data.sequence_length + 1
        self.tokens = torch.randint(0, 4096, shape, generator=torch.Generator().manual_seed(0)).to(self.device)

    def step(self, extra_loss: Callable[[], Any] | None = None) -> None:
        loss = self.forward()
        if extra_loss is not None:
            loss = loss + extra_loss()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.number += 1

    def forward(self) -> Any:
        return self.model.layers.losses(self.model(self.tokens[:, :-1]), self.tokens[:, 1:]).mean()

    def added(self) -> Callable[[], None] | None:
        """Run a forward pass; return a function that does with its maps all that groups add to a step."""
        return None


class Grouped(Steps):
    """With this library's groups."""

    def __init__(self, config: Config) -> None:
        from pretrain.distributed.layout import Layout
        from pretrain.grouping.grouping import HeadGrouping

        super().__init__(config)
        self.grouping = HeadGrouping(config, Layout.from_environment(), self.model, self.model.layers)

    def step(self, extra_loss: Callable[[], Any] | None = None) -> None:
        super().step()
        self.grouping.update(self.number)

    def added(self) -> Callable[[], None] | None:
        import torch

        if self.config.gha.feature_map == "attention":
            return None
        calls: list[tuple[Any, ...]] = []
        for layer, attention in self.grouping.attentions.items():
            attention.constraint = Recorder(self.grouping.constraints[layer], calls)
        self.forward()
        self.grouping.prepare(self.number)

        def work() -> None:
            for constraint, heads_SBF, maps in calls:
                heads_SBF = heads_SBF.detach().requires_grad_()  # otherwise values would also get the gradient of attention
                observed = heads_SBF if constraint.feature_map == "output" else maps.values
                joined = constraint(heads_SBF, maps)
                torch.autograd.grad(joined, observed, torch.zeros_like(joined))
            self.grouping.update(self.number)

        return work


class Recorder:
    """Replaces a layer's constraint and records the arguments of its calls."""

    def __init__(self, constraint: Any, calls: list[tuple[Any, ...]]) -> None:
        self.constraint, self.layers, self.calls = constraint, constraint.layers, calls

    def __call__(self, heads_SBF: Any, maps: Any) -> Any:
        self.calls.append((self.constraint, heads_SBF, maps))
        return heads_SBF


class Flattened(Steps):
    """With flattened maps, clustered at every step."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.maps: list[Any] = []
        model: Any = self.model
        for block in model.block_modules():
            if config.gha.feature_map == "output":
                block.attention.out.register_forward_pre_hook(lambda _module, inputs: self.see(inputs[0]))
            else:
                block.attention.register_forward_pre_hook(lambda module, inputs: self.see(self.values(module, inputs[0])))

    def values(self, attention: Any, x_SBH: Any) -> Any:
        """The concatenated values of all heads, (S, B, N·D)."""
        kind, width = self.config.model.attention, self.config.model.head_width
        if kind == "mha":
            return attention.key_value(x_SBH).unflatten(-1, (-1, 2 * width))[..., width:].flatten(2)
        v_SB1D, e_ND = attention.qkv(x_SBH)[..., None, 2 * width :], attention.value_embedding
        return (v_SB1D + e_ND if kind == "mhe_add" else v_SB1D * (1 + e_ND)).flatten(2)

    def see(self, heads_SBF: Any) -> None:
        self.maps.append(heads_SBF.unflatten(-1, (self.config.model.num_heads, -1)).permute(2, 0, 1, 3).flatten(1))

    def step(self, extra_loss: Callable[[], Any] | None = None) -> None:
        super().step(self.loss)

    def loss(self) -> Any:
        import torch

        terms = [self.term(maps_NF) for maps_NF in self.maps]
        self.maps.clear()
        return torch.stack(terms).mean()

    def added(self) -> Callable[[], None] | None:
        import torch

        self.forward()
        leaves = [maps_NF.detach().requires_grad_() for maps_NF in self.maps]
        self.maps.clear()

        def work() -> None:
            self.maps.extend(leaves)
            torch.autograd.grad(self.loss(), leaves)

        return work

    def term(self, maps_NF: Any) -> Any:
        """The constraint of one layer."""
        raise NotImplementedError


class Direct(Flattened):
    """Clustering and cosines as in the authors' code."""

    def term(self, maps_NF: Any) -> Any:
        import torch

        labels_N, alpha, beta = self.cluster(maps_NF.detach()), self.config.gha.alpha, self.config.gha.beta
        centres = [maps_NF[labels_N == group].mean(0) for group in range(GROUPS)]
        own = [torch.cosine_similarity(x, centres[group], dim=0) for x, group in zip(maps_NF, labels_N.tolist(), strict=True)]
        pairs = [torch.cosine_similarity(a, b, dim=0) for a, b in itertools.combinations(centres, 2)]
        return beta * torch.stack(pairs).mean() - alpha * torch.stack(own).mean()

    def cluster(self, maps_NF: Any) -> Any:
        """Lloyd's algorithm until centres move by less than 1e-4 (squared); an empty group takes a random head."""
        import torch

        generator = torch.Generator().manual_seed(0)

        def centre(member_N: Any) -> Any:
            chance = int(torch.randint(len(maps_NF), (), generator=generator))
            return maps_NF[member_N].mean(0) if member_N.any() else maps_NF[chance]

        centres_CF = maps_NF[torch.randperm(len(maps_NF), generator=generator)[:GROUPS]]
        for _ in range(100):
            labels_N = (maps_NF[:, None] - centres_CF).square().sum(-1).argmin(1)
            before_CF, centres_CF = centres_CF, torch.stack([centre(labels_N == group) for group in range(GROUPS)])
            if (centres_CF - before_CF).square().sum(1).sqrt().sum() ** 2 < 1e-4:
                break
        return labels_N


class Sklearn(Flattened):
    """Clustering by scikit-learn."""

    def term(self, maps_NF: Any) -> Any:
        import torch
        import torch.nn.functional as F
        from sklearn.cluster import KMeans

        labels = KMeans(GROUPS, n_init=1, random_state=0).fit_predict(maps_NF.detach().cpu().numpy())
        labels_N = torch.as_tensor(labels, dtype=torch.long, device=maps_NF.device)
        member_NC = F.one_hot(labels_N, GROUPS).to(maps_NF.dtype)
        centres_CF = (member_NC / member_NC.sum(0)).T @ maps_NF
        within = F.cosine_similarity(maps_NF, centres_CF[labels_N], dim=1).mean()
        unit_CF = F.normalize(centres_CF, dim=1)
        between = (unit_CF @ unit_CF.T).triu(1).sum() / (GROUPS * (GROUPS - 1) / 2)
        return self.config.gha.beta * between - self.config.gha.alpha * within


def seconds(work: Callable[[], None]) -> float:
    import torch

    started = perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return perf_counter() - started


def measure(variant: str, configs: dict[str, Config], runs: int, direct_runs: int) -> Iterator[Row]:
    """Rows of a variant. The ways alternate, so that other load on the machine affects all of them."""
    ways: dict[str, Steps] = {"plain": Steps(configs["value"])}
    ways |= {kind: Grouped(config) for kind, config in configs.items()}
    for kind in ("value", "output"):
        ways |= {f"direct {kind}": Direct(configs[kind]), f"sklearn {kind}": Sklearn(configs[kind])}
    plain = ways.pop("plain")
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    costs: dict[str, list[float]] = {name: [] for name in ways}
    for run in range(-WARM, runs):
        for name, way in ways.items():
            if run < direct_runs or not isinstance(way, Flattened):
                pair = seconds(plain.step), seconds(way.step)
                if run >= 0:
                    times[name].append(pair)
                if 0 <= run < direct_runs and (work := way.added()) is not None:
                    costs[name] += [seconds(work), seconds(work)][1:]  # the first is a warmup
    for name, pairs in times.items():
        plain_s, taken_s = (median(column) for column in zip(*pairs, strict=True))
        cost = median(costs[name]) if costs[name] else None
        yield Row(variant, name, plain_s, taken_s, median(taken / alone for alone, taken in pairs), cost, len(pairs))


def line(row: Row, ours: Row | None) -> str:
    goal = GOALS.get(row.way)
    verdict = "" if goal is None else f"≤ {goal:.2f} {'met' if row.ratio <= goal else 'MISSED'}"
    cost = "" if row.cost_s is None else f"{row.cost_s * 1e3:.1f}"
    slower = "" if not ours or not ours.cost_s or not row.cost_s else f"{row.cost_s / ours.cost_s:.0f}x"
    return (
        f"{row.variant:<9} {row.way:<14} {row.plain_s * 1e3:>9.1f} {row.step_s * 1e3:>9.1f} {row.ratio:>7.3f}  {verdict:<13}"
        f"{cost:>9} {slower:>9} {row.runs:>5}"
    )


COLUMNS = f"{'plain ms':>9} {'step ms':>9} {'ratio':>7}  {'goal':<13}{'cost ms':>9} {'to ours':>9} {'runs':>5}"
HEADER = f"{'attention':<9} {'way':<14} {COLUMNS}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", default="mhe_add,mhe_mul,mha", metavar="A,B", help="default: %(default)s")
    for name, default in (("layers", 4), ("width", 512), ("heads", 64), ("length", 512), ("batch", 2)):
        parser.add_argument(f"--{name}", type=whole_number(1), default=default, metavar="N", help="default: %(default)s")
    parser.add_argument("--runs", type=whole_number(1), default=40, metavar="N", help="measured steps; default: %(default)s")
    parser.add_argument(
        "--direct-runs",
        type=whole_number(1),
        default=5,
        metavar="N",
        help="of those with flattened maps, and of costs; default: %(default)s",
    )
    parser.add_argument("--threads", type=whole_number(1), metavar="N", help="default: all cores")
    parser.add_argument("--json", type=output_file(".json"), metavar="FILE", help="write the rows there, too")
    arguments = parser.parse_args()
    import tempfile

    import torch

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{arguments.layers} layers × {arguments.width}, {arguments.heads} heads, "
        f"{arguments.batch} × {arguments.length} tokens, {GROUPS} groups, {platform.machine()}, {device}"
    )
    print(HEADER, flush=True)
    rows: list[Row] = []
    sizes = {name: getattr(arguments, name) for name in ("layers", "width", "heads", "length", "batch")}
    with tempfile.TemporaryDirectory() as folder:
        for variant in arguments.variants.split(","):
            configs = {}
            for kind in GOALS:
                path = Path(folder, f"{kind}.yaml")
                path.write_text(SETTINGS.format(variant=variant, kind=kind, groups=GROUPS, **sizes), encoding="utf-8")
                configs[kind] = load_config(path, world_size=1).resolved(4096)
            found = list(measure(variant, configs, arguments.runs, arguments.direct_runs))
            ours = {row.way: row for row in found}
            for row in found:
                print(line(row, ours.get(row.way.rpartition(" ")[2]) if " " in row.way else None), flush=True)
            rows += found
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_command(main)

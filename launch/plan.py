"""What a run will take on a cluster: `python launch/plan.py configs/mhe_add_1b_zero2.yaml --gpus 16 --gpu h100`."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository, so that `pretrain` is the package

import argparse
import json
from collections.abc import Sequence

from configs.durable import write_text
from configs.errors import UserError
from configs.load import load_config, smallest_world, to_yaml
from configs.schema import Config, ModelConfig
from launch.common import RULES, output_file, run_command, whole_number
from launch.contenders import contender
from model.costs.solve import COSTS, Matched, What, match
from pretrain.hardware import SHIPPED
from pretrain.matching import vocabulary_of, with_changes
from pretrain.planning.cluster import Cluster, make_cluster
from pretrain.planning.plan import Plan, plan
from pretrain.planning.search import Candidate, best, candidates, layout_faults, smallest_change, with_fields
from pretrain.planning.table import as_json, changes_words, compare_table, plan_table, search_table

SHOWN = 10  # layouts of a search


def arguments() -> tuple[argparse.Namespace, list[str]]:
    """What the command line says, and overrides of the configuration."""
    parser = argparse.ArgumentParser(description="What a run will take: memory, time, energy, checkpoints (docs/planning.md).")
    parser.add_argument("config", metavar="CONFIG", help="YAML file of the run; --section.field=value overrides a field")
    parser.add_argument("--gpus", type=whole_number(1, 2**20), help="processes of the run, one on each device")
    parser.add_argument("--gpu", default="h100", help="the device's name in the hardware table (default: h100)")
    parser.add_argument("--nodes", type=whole_number(1, 2**20), help="nodes; without --gpus all of their devices are used")
    parser.add_argument("--network", help="the link between nodes, by its name in the hardware table")
    parser.add_argument(
        "--hardware", type=Path, default=SHIPPED, metavar="FILE", help="another table than pretrain/hardware.yaml"
    )
    parser.add_argument(
        "--vocab-size", type=whole_number(1, 2**24), help="tokens of the tokenizer, where no data is at hand yet"
    )
    parser.add_argument("--search", action="store_true", help="list the best layouts, and what each loses")
    parser.add_argument("--compare", metavar="VARIANT,…", help="attention variants side by side, such as mha,gqa,mhe_add,mla")
    parser.add_argument("--match", choices=COSTS, help="with --compare: as much of this as the first one")
    parser.add_argument(
        "--write", metavar="OUT.yaml", help="write the configuration of the best layout, or the given one if it fits"
    )
    parser.add_argument("--json", type=output_file(".json"), metavar="FILE", help="all figures")
    given, rest = parser.parse_known_args()
    overrides = [text for text in rest if text.startswith("--") and "=" in text]
    if unknown := [text for text in rest if text not in overrides]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)} (an override is written --section.field=value)")
    if given.gpus is None and given.nodes is None:
        parser.error("give --gpus N or --nodes N")
    if given.gpus and given.nodes and given.gpus % given.nodes:
        parser.error(f"--gpus {given.gpus}: must be a multiple of --nodes ({given.nodes})")
    if given.match and not given.compare:
        parser.error("--match: only with --compare")
    if given.compare and (given.search or given.write):
        parser.error("--compare: not with --search or --write")
    return given, overrides


def main() -> None:
    given, overrides = arguments()
    if given.write:
        if Path(given.write).exists():
            raise UserError(f"{given.write}: exists; name another file")
        output_file(".yaml", ".yml")(given.write)
    per_node = given.gpus // given.nodes if given.gpus and given.nodes else None
    cluster = make_cluster(given.gpu, given.network, per_node, given.hardware)
    ranks = given.gpus or given.nodes * cluster.per_node
    world = smallest_world(given.config, overrides) if given.search else ranks
    config = load_config(given.config, overrides, RULES, world)
    vocabulary = _vocabulary(given, config)
    result: object
    if given.compare:
        result = _compare(given, overrides, vocabulary, ranks, cluster)
    elif given.search:
        result = _search(given, config, vocabulary, ranks, cluster)
    else:
        result = _plan(given, config, vocabulary, ranks, cluster)
    if given.json:
        write_text(given.json, json.dumps(result, indent=1) + "\n")


def _plan(given: argparse.Namespace, config: Config, vocabulary: int, ranks: int, cluster: Cluster) -> object:
    made = plan(config.resolved(vocabulary), ranks, cluster)
    print(plan_table(made, given.config))
    change = None
    if not made.fits:
        change = smallest_change(candidates(made.config, ranks, cluster, RULES))
        print()
        if change is None:
            print("No layout of these devices holds it: take more of them, or a smaller model.")
        else:
            rate = change.plan.tokens_per_second
            print(f"The smallest change that fits: {changes_words(change.changes)}")
            print(f"({change.plan.memory.total / 2**30:,.1f} GiB, {rate:,.0f} tokens/s; --search lists others)")
    if given.write:
        if not made.fits and change is None:
            raise UserError(f"{given.write}: nothing to write, as no layout fits")
        _write(given.write, config, change, ranks, cluster)
    return as_json(made) | ({"smallest_change": dict(change.changes)} if change else {})


def _search(given: argparse.Namespace, config: Config, vocabulary: int, ranks: int, cluster: Cluster) -> object:
    found = candidates(config.resolved(vocabulary), ranks, cluster, RULES)
    if not found:
        raise UserError(f"{given.config}: no layout on {ranks} devices passes the checks; change training.global_batch_size")
    listed = best(found, SHOWN)
    print(search_table(listed, len(found)))
    first = listed[0]
    if not first.plan.fits:
        raise UserError(f"{given.config}: no layout fits {ranks} × {cluster.device.title}; take more of them")
    print()
    print(plan_table(first.plan, given.config))
    if first.changes:
        print(f"\nThe best: {changes_words(first.changes)}")
    if given.write:
        _write(given.write, config, first, ranks, cluster)
    return [as_json(one.plan) | {"changes": dict(one.changes), "reasons": one.reasons} for one in listed]


def _compare(given: argparse.Namespace, overrides: Sequence[str], vocabulary: int, ranks: int, cluster: Cluster) -> object:
    plans: dict[str, Plan] = {}
    for name in given.compare.split(","):
        config = contender(given.config, overrides, name, RULES, ranks)
        if given.match and plans:
            target = next(iter(plans.values())).config.model
            config = with_changes(config, _matched(config, target, name, vocabulary, given.match, ranks))
        plans[name] = plan(config.resolved(vocabulary), ranks, cluster)
    print(compare_table(plans))
    return {name: as_json(of) for name, of in plans.items()}


def _matched(config: Config, target: ModelConfig, name: str, vocabulary: int, what: What, ranks: int) -> Matched:
    """The contender's model with as much of the cost as the first one's."""

    def fits(model: ModelConfig) -> bool:
        return not layout_faults(config.model_copy(update={"model": model}), ranks, RULES)

    try:
        return match(config.resolved(vocabulary).model, target, what, config.row_length, fits=fits)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def _write(path: str, config: Config, change: Candidate | None, ranks: int, cluster: Cluster) -> None:
    changed = with_fields(config, change.changes) if change else config
    text = f"# For {ranks} processes on {cluster.device.title}, from launch/plan.py\n{to_yaml(changed)}"
    write_text(Path(path), text)
    if load_config(path, (), RULES, ranks) != changed:
        raise UserError(f"{path}: does not read back as what was planned")
    print(f"\nwrote {path}")


def _vocabulary(given: argparse.Namespace, config: Config) -> int:
    if config.model.vocab_size is not None:
        return config.model.vocab_size
    if given.vocab_size is not None:
        return int(given.vocab_size)
    try:
        return vocabulary_of(config)
    except UserError as error:
        raise UserError(f"model.vocab_size is null and there is no data: {error}; pass --vocab-size N") from error


if __name__ == "__main__":
    run_command(main, one_process=True)

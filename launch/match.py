"""`--match parameters --to CONFIG`: a run whose model costs what another's does, as model/costs/solve.py solves it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from configs import launcher
from configs.errors import UserError
from configs.load import Check, load_config, smallest_world
from configs.schema import Config, ModelConfig
from model.costs.solve import COSTS, WAYS, match
from model.faults import model_faults
from pretrain.matching import fits, vocabulary_of, with_changes


def add_match(parser: argparse.ArgumentParser) -> None:
    """The options of commands whose model may be matched to another."""
    parser.add_argument(
        "--match",
        choices=COSTS,
        help="change model.ffn_hidden_size (kv_bytes: num_seeds, num_kv_heads, latent_dim or num_heads) until the model costs "
        "what that of --to does, within 0.5 %% (docs/fair_comparisons.md)",
    )
    parser.add_argument("--to", metavar="CONFIG", help="with --match: the YAML file of the other model, taken as it is")
    parser.add_argument("--match-by", choices=WAYS, help="with --match: change the MLP's width, the layers or the heads")


def check_match(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """End with a usage error for options that lack each other."""
    if arguments.match and not arguments.to:
        parser.error("--match: needs --to CONFIG, the configuration to match")
    if not arguments.match and (arguments.to or arguments.match_by):
        parser.error(f"{'--to' if arguments.to else '--match-by'}: only with --match {'|'.join(COSTS)}")


def matched(config: Config, arguments: argparse.Namespace, rules: Sequence[Check]) -> Config:
    """The configuration with the model that `--match` asks for; the first rank says what has changed.

    `rules` are checks that the new model must pass beside those of the schema. Learned positions of the other model are those
    of its own file; the vocabulary is this run's for both, and FLOPs are those in sequences of this run.
    """
    vocabulary = vocabulary_of(config)
    other = other_model(arguments.to, vocabulary)
    model = config.resolved(vocabulary).model
    try:
        found = match(model, other, arguments.match, config.row_length, arguments.match_by, fits(config, rules))
    except UserError as error:
        raise UserError(f"--match {arguments.match} --to {arguments.to}: {error}") from error
    if launcher.rank() == 0:
        embeds = "" if arguments.match == "kv_bytes" else f", vocabulary {vocabulary:,}"
        print(f"matched {arguments.match} of {arguments.to}: {found.words()}{embeds}", flush=True)
    return with_changes(config, found)


def other_model(path: str, vocabulary: int) -> ModelConfig:
    """The resolved model of another configuration, with this vocabulary. UserError if it names another one."""
    other = load_config(path, checks=[model_faults], world_size=smallest_world(path))
    if other.model.vocab_size not in (None, vocabulary):
        wanted = f"the run's vocabulary has {vocabulary}; models are compared with one: give both the same, or null"
        raise UserError(f"{path}: model.vocab_size = {other.model.vocab_size}: {wanted}")
    model = other.resolved(vocabulary).model
    return model.model_copy(update={"vocab_size": vocabulary})  # whatever multiple its own would be padded to

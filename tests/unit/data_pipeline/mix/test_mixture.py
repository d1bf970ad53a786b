"""Mixtures of prepared folders, to the token: on any number of ranks, interrupted, and with other weights from a step on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.errors import UserError
from configs.load import load_config, to_yaml
from configs.schema import Config, Fault
from data_pipeline.faults import data_faults
from data_pipeline.mix.mixture import origin, training_samples, training_sources
from data_pipeline.mix.plan import Plan
from data_pipeline.prepare.documents import ReadOptions
from data_pipeline.prepare.inspect import inspected
from data_pipeline.prepare.prepare import PrepareOptions, prepare
from data_pipeline.read.dataset import TokenDataset
from data_pipeline.read.loader import TrainLoader
from data_pipeline.read.manifest import TOKENIZER, read_manifest
from tests.helpers import write_run

LENGTH, BATCH, END = 16, 8, 0  # END: the id that ends a document


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared folders `a` and `b` of one tokenizer, `c` of another, `d` without held-out documents."""
    root = tmp_path_factory.mktemp("sources")
    sizes = {"a": (90, (8, 1, 1), None), "b": (50, (8, 1, 1), "a"), "c": (60, (8, 1, 1), None), "d": (40, (1, 0, 0), "a")}
    for name, (lines, split, tokenizer) in sizes.items():
        (root / f"{name}.txt").write_text("\n".join(f"{name} line {number} of {number * 7919}" for number in range(lines)))
        options: dict[str, Any] = {"vocab_size": 300} if tokenizer is None else {"tokenizer": root / tokenizer / TOKENIZER}
        prepare(PrepareOptions((str(root / f"{name}.txt"),), root / name, split=split, read=ReadOptions("line"), **options))
    return root


def configuration(folders: Path, tmp_path: Path, data: str, *overrides: str) -> Config:
    path = write_run(tmp_path, tmp_path / "none")
    text = "".join(line for line in path.read_text().splitlines(keepends=True) if not line.startswith("data:"))
    path.write_text(f"{text}\ndata: {{sequence_length: {LENGTH}, {data.format(folders)}}}\n")
    return load_config(str(path), ["--training.steps=30", *overrides], checks=[data_faults])


MIXED = "sources: [{{path: {0}/a, weight: 3}}, {{path: {0}/b, weight: 1}}]"
LATER = ", schedule: [{{from_step: 11, weights: {{a: 1, b: 4}}}}]"


def global_batches(config: Config, steps: range, ranks: int) -> list[np.ndarray]:
    """All ranks' micro-batches in the order of samples: each step's tokens and last label."""
    batches: list[list[np.ndarray]] = [[] for _ in steps]
    size = BATCH // (2 * ranks)
    for rank in range(ranks):
        with TrainLoader(training_samples(config), BATCH, 2, rank, ranks, steps.stop) as loader:
            for place, step in enumerate(steps):
                of_rank = [np.hstack([b.tokens.numpy(), b.labels.numpy()[:, -1:]]) for b in loader.step(step)]
                assert len(of_rank) == size
                batches[place].append(np.stack(of_rank))
    return [np.stack(of_step, axis=1).reshape(BATCH, LENGTH + 1) for of_step in batches]


def test_every_token_of_a_source_once_an_epoch_on_any_number_of_ranks(folders: Path, tmp_path: Path) -> None:
    config = configuration(folders, tmp_path, MIXED + LATER)
    whole = global_batches(config, range(30), 1)
    for ranks in (2, 4):
        np.testing.assert_array_equal(global_batches(config, range(30), ranks), whole)
    np.testing.assert_array_equal(global_batches(config, range(17, 30), 2), whole[17:])  # as a run that resumes
    rows = [tuple(row) for batch in whole for row in batch.tolist()]
    counts = {"a": 0, "b": 0}
    for name in counts:
        source = TokenDataset(folders / name, "train", LENGTH, config.run.seed)
        source.prepare_range(0, 7 * source.samples_per_epoch)
        own = {tuple(source.sample(number).tolist()): number for number in range(7 * source.samples_per_epoch)}
        assert len(own) == 7 * source.samples_per_epoch  # no two samples are alike
        taken = [own[row] for row in rows if row in own]
        assert sorted(taken) == list(range(len(taken)))  # an epoch of it has each of its tokens once
        counts[name] = len(taken)
    assert sum(counts.values()) == len(rows)
    assert abs(counts["a"] - (11 * 8 * 3 / 4 + 19 * 8 / 5)) < 2
    sizes = [TokenDataset(folders / name, "train", LENGTH).samples_per_epoch for name in counts]
    for use, (name, count) in zip(Plan(config.data, config.training, sizes).usage(30), counts.items(), strict=True):
        assert (use.label, use.samples, use.share) == (name, count, count / 240)


@pytest.mark.parametrize("number", [0, 91, 200])
def test_a_sample_says_where_it_comes_from(folders: Path, tmp_path: Path, number: int) -> None:
    config = configuration(folders, tmp_path, MIXED + LATER, "--training.skip_samples=[[91, 92]]")
    plain = configuration(folders, tmp_path, MIXED + LATER)
    found, row = (
        origin(config, number),
        global_batches(plain, range(number // BATCH, number // BATCH + 1), 1)[0][number % BATCH],
    )
    assert found.step == {0: 0, 91: None, 200: 199 // BATCH}[number]
    np.testing.assert_array_equal(found.tokens, row)
    held = (folders / f"{found.source.label}.txt").read_text().splitlines()
    text = inspected(config, number)
    head, _, shown = text.partition("\n\n")
    assert f"source    {found.source.label}: {folders}/{found.source.label}\n" in head
    assert ("left out" in head) == (number == 91)
    lines = shown.split("<|endoftext|>")[1:-1]  # those that are whole
    assert all(line in held for line in lines)
    # The documents, by their own tokens: those of the sample are theirs, one after the other.
    ends = np.flatnonzero(np.fromfile(folders / found.source.label / "train.bin", np.uint16) == END) + 1
    tokens = np.split(np.fromfile(folders / found.source.label / "train.bin", np.uint16), ends[:-1])
    joined = np.concatenate([tokens[document] for document in found.documents])
    assert " ".join(map(str, found.tokens)) in " ".join(map(str, joined))


def test_later_weights_change_nothing_before(folders: Path, tmp_path: Path) -> None:
    before = global_batches(configuration(folders, tmp_path, MIXED), range(12), 1)
    after = global_batches(configuration(folders, tmp_path, MIXED + LATER), range(12), 1)
    np.testing.assert_array_equal(before[:11], after[:11])
    assert not np.array_equal(before[11], after[11])


def test_shares_change_at_a_step_whatever_is_left_out(folders: Path, tmp_path: Path) -> None:
    plain, left_out = (
        configuration(folders, tmp_path, MIXED + LATER, f"--training.skip_samples={r}") for r in ([], [[16, 29]])
    )
    of_steps = [Plan(config.data, config.training, (60, 20)) for config in (plain, left_out)]
    assert [[phase.first for phase in plan.phases] for plan in of_steps] == [[0, 11 * 8], [0, 11 * 8 + 13]]
    before, after = (of_steps[1].usage(step) for step in (11, 13))
    assert [use.samples for use in before] == [76, 25]  # three quarters of 88 and of 13 that are passed over
    assert after[1].samples - before[1].samples == pytest.approx(16 * 4 / 5, abs=1)


def test_a_source_alone_is_that_source(folders: Path, tmp_path: Path) -> None:
    """Also until another joins it."""
    alone = global_batches(configuration(folders, tmp_path, "path: {0}/a"), range(6), 1)
    joined = "sources: [{{path: {0}/a, weight: 1}}, {{path: {0}/b, weight: 1}}], "
    joined += "schedule: [{{from_step: 0, weights: {{a: 1}}}}, {{from_step: 4, weights: {{a: 1, b: 1}}}}]"
    for data in ("sources: [{{path: {0}/a, weight: 9}}]", joined):
        np.testing.assert_array_equal(global_batches(configuration(folders, tmp_path, data), range(4), 1), alone[:4])


def test_epochs_say_how_sources_relate(folders: Path, tmp_path: Path) -> None:
    config = configuration(folders, tmp_path, "sources: [{{path: {0}/a, epochs: 1}}, {{path: {0}/b, epochs: 3}}]")
    sizes = [TokenDataset(folders / name, "train", LENGTH).samples_per_epoch for name in "ab"]
    a, b = Plan(config.data, config.training, sizes).usage(1000)
    assert b.epochs / a.epochs == pytest.approx(3, rel=1e-3)


FAULTS: dict[str, tuple[str, list[str]]] = {
    "a weight of zero": (
        "sources: [{{path: {0}/a, weight: 0}}, {{path: {0}/b, weight: -1}}]",
        ["data.sources[0].weight = 0: must be above 0", "data.sources[1].weight = -1: must be above 0"],
    ),
    "two of one name": (
        "sources: [{{path: {0}/a, weight: 1, name: x}}, {{path: {0}/b, weight: 1, name: x}}]",
        ["data.sources[1].name = 'x': another source has it; each needs its own"],
    ),
    "no weight": (
        "sources: [{{path: {0}/a, weight: 0}}, {{path: {0}/b, weight: 0}}]",
        ["data.sources[0].weight = 0: must be above 0", "data.sources[1].weight = 0: must be above 0"],
    ),
    "no split": (
        "sources: [{{path: {0}/d, weight: 1}}]",
        ["data.sources[0].path = '{0}/d': has no documents in split valid; give it a share in --split of launch/prepare.py"],
    ),
    "other tokenizers": (
        "sources: [{{path: {0}/a, weight: 1}}, {{path: {0}/c, weight: 1}}]",
        [
            (
                "data.sources[1].path = '{0}/c': prepared with another tokenizer than {0}/a; "
                "prepare it with --tokenizer {0}/a/tokenizer.json"
            )
        ],
    ),
    "the same twice": (
        "sources: [{{path: {0}/a, weight: 1}}, {{path: {0}/copy, weight: 1}}]",
        [
            (
                "data.sources[1].path = '{0}/copy': has the same text as {0}/a, whose samples would come twice; "
                "give that one more weight"
            )
        ],
    ),
    "neither": (
        "max_epochs: 2",
        ["data.path = null: needed, or a list of sources, or a stream with an input; one of the three"],
    ),
    "both": (
        "path: {0}/a, sources: [{{path: {0}/b, weight: 1}}]",
        ["data.path = '{0}/a': data.path and data.sources are given; keep one of them"],
    ),
    "weight and epochs": (
        "sources: [{{path: {0}/a, weight: 1}}, {{path: {0}/b, epochs: 1}}, {{path: {0}/d}}]",
        [
            "data.sources[1] = 'b': all sources need a weight, or all a number of epochs",
            "data.sources[2] = 'd': needs a weight or a number of epochs; one of the two",
        ],
    ),
    "a schedule": (
        MIXED + ", schedule: [{{from_step: 5, weights: {{a: 1, x: 1}}}}, {{from_step: 5, weights: {{b: 0}}}}]",
        [
            "data.schedule[0].weights = 'x': a name of a source (a, b)",
            "data.schedule[1].from_step = 5: above 5: steps ascend",
            "data.schedule[1].weights.b = 0.0: above 0; leave out a source without samples",
        ],
    ),
    "a schedule without weights": (
        MIXED + ", schedule: [{{from_step: 5}}, {{from_step: 6, weights: {{a: 1}}, epochs: {{a: 1}}}}]",
        [
            "data.schedule[0] = 5: needs weights or epochs; one of the two",
            "data.schedule[1] = 6: needs weights or epochs; one of the two",
        ],
    ),
    "an unknown key": (
        "sources: [{{path: {0}/a, wieght: 1}}, 7]",
        [
            "data.sources[0].wieght = 1: unknown key; did you mean weight? known here: path, name, weight, epochs",
            "data.sources[1] = 7: must be a mapping with the fields path, name, weight, epochs",
        ],
    ),
    "too many epochs": (MIXED + ", max_epochs: 0.5", ["data.max_epochs = 0.5: a would be used "]),
}


def test_short_ranges_of_one_step_leave_out_no_epoch_together(folders: Path, tmp_path: Path) -> None:
    """Each leaves out half an epoch: at most two may lie between the samples of two steps."""
    size = read_manifest(folders / "a").splits["train"].samples(LENGTH)
    half, alone = size // 2, "sources: [{{path: {0}/a, weight: 1}}]"
    for gap, allowed in ((1, False), (2 * BATCH, True), (5 * BATCH, True)):
        ranges = [[start, start + half] for start in range(gap, gap + 6 * (half + gap), half + gap)]
        config = configuration(folders, tmp_path, alone, f"--training.skip_samples={ranges}", "--run.seed=9")
        if allowed:
            (source,) = training_sources(config)
            samples = training_samples(config, [source])
            for step in range(6 * gap // BATCH):
                samples.prepare_range(step * BATCH, (step + 2) * BATCH)
                assert len(list((folders / "a" / "index").glob("*-train-*-seed9-*"))) <= 3
            source.release()
            continue
        with pytest.raises(
            UserError, match=rf"^training.skip_samples: from sample 0 to \d+ it leaves out more than an epoch of {folders}/a"
        ):
            training_samples(config)


def test_an_epoch_of_a_mixture_has_as_many_samples_as_its_sources(folders: Path, tmp_path: Path) -> None:
    """What `gha.vote_batches: null` takes."""
    sizes = [read_manifest(folders / name).splits["train"].samples(LENGTH) for name in "ab"]
    assert training_samples(configuration(folders, tmp_path, MIXED)).samples_per_epoch == sum(sizes)


def test_epochs_from_a_step_on(folders: Path, tmp_path: Path) -> None:
    later = ", schedule: [{{from_step: 11, epochs: {{a: 1, b: 3}}}}]"
    config = configuration(folders, tmp_path, MIXED + later)
    plan = Plan.of(config.data, config.training)
    sizes = [read_manifest(folders / name).splits["train"].samples(LENGTH) for name in "ab"]
    assert plan.phases[0].shares == (0.75, 0.25)
    assert plan.phases[1].first == 11 * BATCH
    assert plan.phases[1].shares == pytest.approx(
        [sizes[0] / (sizes[0] + 3 * sizes[1]), 3 * sizes[1] / (sizes[0] + 3 * sizes[1])]
    )


def test_folders_whose_names_are_numbers(folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "b", folders / "2024", dirs_exist_ok=True)
    later = ", schedule: [{{from_step: 11, weights: {{7: 1, 2024: 3}}}}]"
    sources = "sources: [{{path: {0}/a, weight: 1, name: 7}}, {{path: {0}/2024, weight: 1}}]"
    config = configuration(folders, tmp_path, sources + later, f"--validation.sets={{2023: {folders}/a}}")
    assert [source.label for source in config.data.parts] == ["7", "2024"]
    assert Plan.of(config.data, config.training).phases[1].shares == (0.25, 0.75)
    assert config.validation.sets == {"2023": f"{folders}/a"}
    path = tmp_path / "again.yaml"
    path.write_text(to_yaml(config))
    assert load_config(path) == config


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_said_before_the_start(folders: Path, tmp_path: Path, name: str) -> None:
    data, expected = FAULTS[name]
    if not (folders / "copy").exists():
        shutil.copytree(folders / "a", folders / "copy")
    with pytest.raises(UserError) as caught:
        configuration(folders, tmp_path, data)
    found: list[Fault | str] = caught.value.faults  # type: ignore[attr-defined]
    assert len(found) >= len(expected), found
    for text, fault in zip(expected, found, strict=name != "too many epochs"):
        assert str(fault).startswith(text.format(folders)), fault

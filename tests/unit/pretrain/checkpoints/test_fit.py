"""What a run may change when it resumes, and which changes make another layout of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from configs.errors import UserError
from configs.load import load_config
from configs.schema import Config, SourceConfig, StreamConfig
from configs.schema.data import PhaseConfig
from pretrain.checkpoints.fit import check_fit, same_layout
from pretrain.checkpoints.folder import TrainState, read_config, read_state
from tests.helpers import write_run
from tests.random_checkpoint import write_checkpoint


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load_config(write_run(tmp_path, tmp_path / "data")).resolved(300)


@pytest.fixture
def folder(config: Config) -> Path:
    return write_checkpoint(config, {"model": {"w": torch.ones(3)}}, TrainState(3, 1, "d" * 64))


def changed(config: Config, section: str, **fields: object) -> Config:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=fields)})


def check(folder: Path, config: Config, data: str = "d" * 64, tokenizer: str = "{}") -> None:
    check_fit(folder, read_config(folder), read_state(folder), config, data, tokenizer)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("run.seed", 99, "run.seed: 1234 there, 99 here"),
        ("training.global_batch_size", 4, "training.global_batch_size: 8 there, 4 here"),
        ("data.sequence_length", 8, "data.sequence_length: 16 there, 8 here"),
        ("data.packing", "best_fit", "data.packing: 'concatenate' there, 'best_fit' here"),
        ("model.num_heads", 4, "model.num_heads: 8 there, 4 here"),
        ("optimizer.kind", "muon", "optimizer.kind: 'adamw' there, 'muon' here"),
    ],
)
def test_what_a_run_may_not_change(folder: Path, config: Config, field: str, value: object, expected: str) -> None:
    section, _, name = field.partition(".")
    with pytest.raises(UserError) as caught:
        check(folder, changed(config, section, **{name: value}))
    assert str(caught.value).endswith(f"cannot resume from\n  {expected}")


STREAM = StreamConfig(input=["texts"], tokenizer="data", shards=4)


@pytest.mark.parametrize(
    ("there", "here", "data", "expected"),
    [
        (STREAM, {"workers": 3}, "d", None),
        (
            STREAM,
            {"shards": 2, "input": ["more"]},
            "d",
            "input: ['texts'] there, ['more'] here\n  data.stream.shards: 4 there, 2",
        ),
        (STREAM, {"shuffle_documents": 0}, "d", "data.stream.shuffle_documents: 1000 there, 0 here"),
        (STREAM, {"text_field": "content"}, "d", "data.stream.text_field: 'text' there, 'content' here"),
        (STREAM, {"document": "line"}, "d", "data.stream.document: 'file' there, 'line' here"),
        (STREAM, {}, "e", "data.stream.input: texts has other files than there"),
        (STREAM, None, "d", "data: streamed there (data.stream), prepared here"),
        (None, {}, "d", "data: streamed here (data.stream), prepared there"),
    ],
)
def test_a_stream_goes_on_only_with_the_same_text(
    config: Config, there: StreamConfig | None, here: dict[str, object] | None, data: str, expected: str | None
) -> None:
    def on(stream: StreamConfig | None) -> Config:
        return config if stream is None else changed(config, "data", path=None, stream=stream)

    folder = write_checkpoint(on(there), {"model": {"w": torch.ones(3)}}, TrainState(3, 1, "d" * 64))
    now = on(None if here is None else STREAM.model_copy(update=here))
    if expected is None:
        check(folder, now, data * 64)
        return
    with pytest.raises(UserError) as caught:
        check(folder, now, data * 64)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("there", "here", "next_sample"),  # where it is wrong
    [
        ([], [[24, 32]], None),  # three steps of 8 have taken the samples 0 to 23
        ([], [[23, 32]], 24),
        ([[4, 6]], [], 26),
        ([[4, 6]], [[4, 6], [26, 99]], None),
        ([[4, 6]], [[4, 6], [25, 99]], 26),
        ([[4, 6]], [[4, 5], [5, 6]], None),  # the same samples
        ([[4, 6], [26, 30]], [[4, 6]], None),  # the range begins at the next sample
        ([[4, 6], [25, 30]], [[4, 6]], 31),
        ([[4, 6], [40, 50]], [[4, 6], [41, 50]], None),
        ([[0, 1000]], [], 1024),
    ],
)
def test_samples_are_left_out_and_put_back_from_the_next_one_on(
    config: Config, there: list[list[int]], here: list[list[int]], next_sample: int | None
) -> None:
    then, now = (changed(config, "training", skip_samples=ranges) for ranges in (there, here))
    folder = write_checkpoint(then, {"model": {"w": torch.ones(3)}}, TrainState(3, 1, "d" * 64))
    if next_sample is None:
        check(folder, now)
        return
    with pytest.raises(UserError) as caught:
        check(folder, now)
    assert str(caught.value).splitlines()[1:] == [
        f"  training.skip_samples: {there} there, {here} here; it may change from sample {next_sample}, the next one, on"
    ]


def test_before_the_first_step_any_sample_can_be_left_out(config: Config) -> None:
    folder = write_checkpoint(config, {"model": {"w": torch.ones(3)}}, TrainState(0, 1, "d" * 64))
    check(folder, changed(config, "training", skip_samples=[[0, 9]]))


def test_other_data_and_other_tokenizers_are_refused(folder: Path, config: Config) -> None:
    with pytest.raises(UserError, match="other data than"):
        check(folder, config, data="e" * 64)
    with pytest.raises(UserError, match="another tokenizer than"):
        check(folder, config, tokenizer="{ }")
    with pytest.raises(UserError, match=r"stands at step 3, beyond training\.steps \(2\)"):
        check(folder, changed(config, "training", steps=2))


def mixed(config: Config, shares: str, *schedule: tuple[int, str]) -> Config:
    """`shares`, such as "a3 b1": sources in folders of these names, and their weights."""

    def weights(text: str) -> dict[str, float]:
        return {part[0]: float(part[1:]) for part in text.split()}

    sources = [SourceConfig(path=f"data/{name}", weight=weight) for name, weight in weights(shares).items()]
    later = [PhaseConfig(from_step=step, weights=weights(text)) for step, text in schedule]
    return changed(config, "data", path=None, sources=sources, schedule=later)


THERE = "a3 b1"
SHARES: dict[str, tuple[str, list[tuple[int, str]], str]] = {  # shares, schedule, "" or "other"
    "the same": (THERE, [], ""),
    "the same in other numbers": ("a6 b2", [], ""),
    "others": ("a3 b2", [], "other"),
    "in another order": ("b1 a3", [], "other"),
    "others from the next step on": (THERE, [(3, "a1 b9")], ""),
    "others from a step that was taken": (THERE, [(2, "a1 b9")], "other"),
    "one more from the next step on": ("a3 b1 c1", [(0, THERE), (3, "c1")], ""),
    "one more": ("a3 b1 c1", [], "other"),
    "one less": ("a1", [], "gone"),
    "the same again": (THERE, [(2, "a9 b3")], ""),
}


@pytest.mark.parametrize("name", SHARES)
def test_shares_of_sources_may_change_from_the_next_step_on(config: Config, name: str) -> None:
    shares, schedule, expected = SHARES[name]
    folder = write_checkpoint(
        mixed(config, THERE), {"model": {"w": torch.ones(3)}}, TrainState(3, 1, "a" * 64 + "," + "b" * 64)
    )
    now = mixed(config, shares, *schedule)
    data = ",".join(part[0] * 64 for part in shares.split())
    if not expected:
        check(folder, now, data)
        return
    message = {
        "other": r"data: other shares of the sources in the first 3 steps; change them from there on by data\.schedule$",
        "gone": r"other data than data/b \(its manifest differs, or it is no source any more\)$",
    }
    with pytest.raises(UserError, match=message[expected]):
        check(folder, now, data)


def test_shares_change_by_steps_whatever_is_left_out(config: Config) -> None:
    """Samples were left out before, and more are left out where the shares change."""
    there = changed(mixed(config, THERE), "training", skip_samples=[[4, 12]])
    train = TrainState(3, 1, f"{'a' * 64},{'b' * 64}")
    folder = write_checkpoint(there, {"model": {"w": torch.ones(3)}}, train)
    data = f"{'a' * 64},{'b' * 64}"
    for more in ([], [[32, 48]]):  # 32: the next sample
        now = changed(mixed(config, THERE, (3, "a1 b9")), "training", skip_samples=[[4, 12], *more])
        check(folder, now, data)
        with pytest.raises(UserError, match="in the first 3 steps"):
            check(folder, changed(mixed(config, THERE, (2, "a1 b9")), "training", skip_samples=[[4, 12], *more]), data)


def test_equal_shares_in_other_numbers(config: Config) -> None:
    data = ",".join(name * 64 for name in "abc")
    folder = write_checkpoint(mixed(config, "a0.7 b0.2 c0.1"), {"model": {"w": torch.ones(3)}}, TrainState(3, 1, data))
    check(folder, mixed(config, "a7 b2 c1"), data)


def test_a_source_alone_may_be_joined_by_others(folder: Path, config: Config) -> None:
    joined = mixed(config, "d1 e1", (0, "d1"), (3, "d1 e1"))
    check(folder, joined, "d" * 64 + "," + "e" * 64)


LAYOUTS: list[dict[str, Any]] = [
    {"zero_stage": 3},
    {"tensor": 2, "sequence": True},
    {"pipeline": 2, "zero_stage": 0},
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_fits_and_is_told_from_the_same(folder: Path, config: Config, layout: dict[str, Any]) -> None:
    other = changed(config, "parallel", **layout)
    check(folder, other)
    assert not same_layout(read_config(folder), read_state(folder), other, 1)


def test_the_same_layout(folder: Path, config: Config) -> None:
    train = read_state(folder)
    assert same_layout(read_config(folder), train, config, 1)
    assert same_layout(read_config(folder), train, changed(config, "parallel", sequence=True), 1)  # no effect on one rank
    assert same_layout(read_config(folder), train, changed(config, "optimizer", lr=1.0), 1)
    assert not same_layout(read_config(folder), train, config, 2)
    other = config.model_copy(update={"backend": "fsdp"})
    check(folder, other)
    assert not same_layout(read_config(folder), train, other, 1)

"""Overrides: texts as typed, faults that name them, and nothing hidden by an unknown key."""

import re
from pathlib import Path

import pytest

from configs.load import ConfigError, load_config, to_yaml
from tests.unit.configs.good import GOOD, faults_of


@pytest.mark.parametrize(
    "text", ["20240101", "6_4", "runs/a #2", "runs/a: b", "true", "null", "1e3", "2024-99-99", "[a]", '"a"']
)
def test_a_field_of_text_takes_an_override_as_typed(good: Path, tmp_path: Path, text: str) -> None:
    config = load_config(good, [f"--run.folder={text}", *([] if text == "null" else [f"--data.path={text}"])])
    assert config.run.folder == text
    assert text == "null" or config.data.path == text  # which may be null
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "again.yaml") == config


def test_a_home_folder_is_expanded(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    good.write_text(GOOD.replace("data/x", "~/data"))
    config = load_config(good, ["--run.folder=~/runs/a"])
    assert (config.data.path, config.run.folder) == ("/home/ada/data", "/home/ada/runs/a")


def test_an_unknown_key_hides_no_other_fault_of_its_section(good: Path) -> None:
    unknown, other = faults_of(good, "--model.atention=x", "--model.num_kv_heads=7")
    assert unknown.startswith("model.atention = 'x': unknown key; did you mean attention?")
    assert other.startswith("model.num_kv_heads = 7: only gqa, ")
    assert other.endswith("have it, not mhe_add; set it to null")


def test_an_average_is_one_of_two_or_none(good: Path, tmp_path: Path) -> None:
    good.write_text(GOOD.replace("micro_batch_size: 2", "micro_batch_size: 2, average: {decay: 0.5}"))
    assert load_config(good).training.average.model_dump() == {"decay": 0.5, "last": None}
    config = load_config(good, ["--training.average.decay=null", "--training.average.last=3"])
    assert config.training.average.model_dump() == {"decay": None, "last": 3}
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "again.yaml") == config
    for given in ("", "average: null", "average: {}"):
        good.write_text(GOOD.replace("micro_batch_size: 2", f"micro_batch_size: 2, {given}".rstrip(", ")))
        assert load_config(good).training.average.model_dump() == {"decay": None, "last": None}
        assert load_config(good, ["--training.average.last=2"]).training.average.last == 2
    assert load_config(good, ["--training.average={last: 2}"]).training.average.last == 2


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        (["--training.average.decay=1"], "must be below 1.0"),
        (["--training.average.decay=0"], "must be above 0.0"),
        (["--training.average.last=1"], "must be at least 2"),
        (["--training.average.dekay=0.5"], "unknown key; did you mean decay? known here: decay, last"),
        (["--training.average=0.5"], "must be a mapping with the fields decay, last"),
        (
            ["--training.average.last=2", "--training.average.decay=0.5"],
            "one average only: set it or training.average.decay to null",
        ),
        (["--training.average.last=2", "--checkpoint.every_steps=0"], "needs checkpoint.every_steps above 0"),
    ],
)
def test_faults_of_an_average_have_its_name(good: Path, overrides: list[str], fault: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(good, overrides)
    (line,) = str(caught.value).splitlines()[1:]
    assert line.startswith(f"  {overrides[0]}: {fault}")


def test_faults_of_overrides_name_the_override(good: Path) -> None:
    good.write_text(GOOD.replace("steps: 10", "steps: 0"))
    with pytest.raises(ConfigError) as caught:
        load_config(good, ["--model.num_heads=7", "--optimizer.lr=1e-3"])
    assert str(caught.value).splitlines() == [
        f"{good}: 2 faults",
        "  --model.num_heads=7: must divide hidden_size (64) unless head_dim is given",
        "  training.steps = 0: must be at least 1",
    ]


def test_fields_of_a_section_in_a_section(good: Path) -> None:
    good.write_text(GOOD.replace("micro_batch_size: 2", "micro_batch_size: 2, skip: {spike_sigma: 4.0}"))
    config = load_config(good, ["--training.skip.nonfinite=3", "--training.skip_samples=[[8, 16], [0, 1]]"])
    assert (config.training.skip.nonfinite, config.training.skip.spike_sigma) == (3, 4.0)
    assert config.training.skip_samples == [[8, 16], [0, 1]]
    assert load_config(good, ["--training.skip={nonfinite: 5}"]).training.skip.model_dump() == {
        "nonfinite": 5,
        "spike_sigma": None,
    }


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("--training.skip.nonfinite=-1", "must be at least 0"),
        ("--training.skip.spike_sigma=many", "must be a valid number"),
        ("--training.skip.sigma=1", "unknown key; did you mean spike_sigma? known here: nonfinite, spike_sigma"),
        ("--training.skip=3", "must be a mapping with the fields nonfinite, spike_sigma"),
    ],
)
def test_faults_of_a_section_in_a_section_have_its_name(good: Path, override: str, fault: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(good, [override])
    assert str(caught.value).splitlines()[1:] == [f"  {override}: {fault}"]


@pytest.mark.parametrize(
    "text", ["null", "3", "[3, 4]", "[[4, 3]]", "[[3, 3]]", "[[-1, 3]]", "[[1, 2, 3]]", "[[0, 1.5]]", "[[false, true]]"]
)
def test_ranges_of_samples_that_are_none(good: Path, text: str) -> None:
    (fault,) = faults_of(good, f"--training.skip_samples={text}")
    assert fault.endswith(": must be a list of ranges [from, to] with 0 <= from < to <= 10^15, such as [[0, 8]]")


def test_what_could_not_be_read_back_from_the_runs_config_is_refused(good: Path, tmp_path: Path) -> None:
    """A text and overrides may together be longer than a text may be."""
    listed = "".join(f"\n  - {{path: {'s' * 150}{number}, weight: 1}}" for number in range(500))
    data = f"data:\n  sequence_length: 32\n  sources:{listed}"
    good.write_text(GOOD.replace("data: {path: data/x, sequence_length: 32}", data))
    few, many = (", ".join(f"s{number}: {'v' * 200}" for number in range(count)) for count in (20, 250))
    config = load_config(good, [f"--validation.sets={{{few}}}"])
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "again.yaml") == config
    (fault,) = faults_of(good, f"--validation.sets={{{many}}}")
    assert re.fullmatch(
        r"the run could not be resumed: written out with all overrides and defaults in config\.yaml, it has 1\d\d,\d{3} "
        r"characters; at most 131,072 are read; name fewer sources, sets or ranges of samples",
        fault,
    )

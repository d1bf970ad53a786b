"""The page of a head election: its structure, its texts, and figures against the formulas for the smaller model."""

from __future__ import annotations

import base64
import errno
import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from configs.errors import UserError
from configs.schema import Config, ModelConfig
from model.costs.flops import flops_per_token
from model.costs.memory import kv_cache_bytes_per_token
from model.costs.parameters import parameters
from model.gha.voting import BallotKind
from pretrain.grouping.report.decisions import savings
from pretrain.grouping.report.page import write_report
from tests.unit.pretrain.grouping.report.elections import config, one_layer, voted
from tests.unit.pretrain.report.pages import Page

RED, BLACK = (178, 24, 43), (0, 0, 0)


@pytest.mark.parametrize("attention", ["mha", "mqa", "skv", "mhe_add", "mhe_mul"])
def test_figures_are_those_of_the_smaller_model(attention: str, tmp_path: Path) -> None:
    election, G_LNN = voted(layers=2, heads=8, groups=2, heads_per_group=2)
    before = config(attention)
    after = ModelConfig(
        attention=attention, hidden_size=64, num_layers=2, num_heads=4, head_dim=6, vocab_size=128, max_position_embeddings=32
    )
    found = savings(before, election)
    for figure, count in (
        ("Heads of a layer", lambda model: model.num_heads),
        ("Parameters of an attention layer", lambda model: parameters(model)["attention"] / 2),
        ("Parameters of the model", lambda model: sum(parameters(model).values())),
        ("KV cache, bytes per token (bf16)", kv_cache_bytes_per_token),
        ("Training FLOPs per token (sequences of 32)", lambda model: flops_per_token(model, 32)),
    ):
        assert found.pop(figure) == (count(before.model), count(after))
    assert not found
    page = write_report(tmp_path, election, G_LNN, before).read_text()
    attention_before, attention_after = parameters(before.model)["attention"] // 2, parameters(after)["attention"] // 2
    saved = f"{100 * (attention_before - attention_after) / attention_before:.1f}%"
    assert f"<td>{attention_before:,}</td><td>{attention_after:,}</td><td>{saved}</td>" in page


def test_the_papers_decoder_saves_what_it_says() -> None:
    """16 layers of width 1024 with 16 heads, of which 8 stay: 201.3 M to 167.8 M without embeddings (arXiv 2305.14380)."""
    model: dict[str, Any] = {"attention": "mha", "hidden_size": 1024, "num_layers": 16, "num_heads": 16, "bias": False}
    before = config()
    before = before.model_copy(update={"model": ModelConfig(**model, vocab_size=64, max_position_embeddings=32)})
    election = one_layer([head // 2 for head in range(16)], [1] * 16, range(0, 16, 2))
    election = replace(election, layers=election.layers * 16)
    dense, pruned = savings(before, election)["Parameters of the model"]
    rest = 1024 * (64 + 32 + 33)  # embeddings of tokens and positions, norms
    assert (dense - rest, pruned - rest) == (pytest.approx(201.3e6, rel=3e-4), pytest.approx(167.8e6, rel=3e-4))


@pytest.mark.parametrize(("attention", "stays"), [("mhe_add", 3 * 6 * 65), ("mqa", 2 * 6 * 65)])
def test_parameters_that_stay_are_named(attention: str, stays: int, tmp_path: Path) -> None:
    election, G_LNN = voted(2, 8, 2)
    assert f"{stays:,} parameters of a layer" in write_report(tmp_path, election, G_LNN, config(attention)).read_text()


@pytest.mark.parametrize(
    ("layers", "heads", "groups", "heads_per_group", "ballot"),
    [(2, 8, 2, 1, "votes"), (5, 16, 4, 2, "scores"), (12, 128, 8, 3, "votes"), (3, 12, 12, 1, "votes")],
)
def test_the_page_shows_every_layer_and_head(
    layers: int, heads: int, groups: int, heads_per_group: int, ballot: BallotKind, tmp_path: Path
) -> None:
    election, G_LNN = voted(layers, heads, groups, heads_per_group, ballot)
    path = write_report(tmp_path, election, G_LNN, config(heads=heads, layers=layers))
    assert path == tmp_path / "gha" / "report.html"
    page = Page(path.read_text())
    assert page.within("title#.") != []
    for number, layer in enumerate(election.layers):
        place = f"details#layer-{number}."
        assert ", ".join(map(str, layer.kept)) in page.within(place, "summary#.")
        members = page.within(place, "td#.left members", "span#.stay")
        assert sorted(int(text.split()[0]) for text in members) == list(layer.kept)
        others = page.within(place, "td#.left members", "span#.go")
        assert sorted(int(text.split()[0]) for text in [*members, *others]) == list(range(heads))
        names = [text for text in page.within(place, "svg#.", "title#.") if text.startswith("head ")]
        bars = [re.fullmatch(r"head (\d+), group (\d+): (\S+) \w+, (\w+)", name) for name in names]
        assert sorted(int(bar[1]) for bar in bars if bar) == list(range(heads))
        for bar in bars:
            assert bar is not None
            head = int(bar[1])
            assert int(bar[2]) == layer.labels[head]
            assert float(bar[3]) == pytest.approx(layer.scores[head], rel=1e-3)
            assert (bar[4] == "stays") == (head in layer.kept)


def test_the_page_stands_alone(tmp_path: Path) -> None:
    election, G_LNN = voted(3, 8, 2)
    text = write_report(tmp_path, election, G_LNN, config(layers=3)).read_text()
    page = Page(text)
    links = [value or "" for _, name, value in page.attributes if name in ("href", "src", "xlink:href", "action", "style")]
    assert len(links) == 3  # an image of each layer
    assert all(link.startswith("data:image/png;base64,") for link in links)
    assert not re.search(r"https?:|//\w|@import|url\(|<script|<link|\bon\w+=", re.sub(r"base64,[^\"]+", "", text))
    for link, layer in zip(links, election.layers, strict=True):
        with Image.open(io.BytesIO(base64.b64decode(link.partition(",")[2]))) as picture:
            colours = np.asarray(picture.convert("RGB"))
        assert colours.shape == (362, 362, 3)  # 8 heads of 45 pixels and a line
        line = 45 * layer.labels.count(0)
        assert [tuple(colours[at, at]) for at in (0, 200 + 45, line, -1)] == [RED, RED, BLACK, RED]
    names = [value for tag, name, value in page.attributes if (tag, name) == ("svg", "aria-label")]
    assert len(names) == text.count("<svg") == 2 + 2 * 3
    assert all(names)


def test_texts_are_escaped(tmp_path: Path) -> None:
    election, G_LNN = voted(2, 8, 2)
    folder = tmp_path / "a<b>&\" it's"
    page = Page(write_report(folder, election, G_LNN, config()).read_text())
    assert page.within("title#.")[0] == "Head election of a<b>&\" it's, step 7"
    prune = page.within("code#.")[0].splitlines()[0]
    assert prune == "python launch/prune.py " + "'" + str(folder).replace("'", "'\"'\"'") + "'"


def test_the_next_commands(tmp_path: Path) -> None:
    election, G_LNN = voted(2, 8, 2)

    def commands(settings: Config) -> list[str]:
        return Page(write_report(tmp_path, election, G_LNN, settings).read_text()).within("code#.")[0].splitlines()

    deepspeed = "deepspeed --log_level warning"
    go_on = f"launch/pretrain.py --config {tmp_path}/pruned/config.yaml --resume=auto"
    assert commands(config(stage="vote")) == [f"python launch/prune.py {tmp_path}", f"{deepspeed} {go_on}"]
    assert commands(config(stage="vote", backend="fsdp"))[1] == f"torchrun --nproc-per-node=gpu {go_on}"
    election = replace(election, step=10)  # the configuration's last
    assert commands(config(stage="vote"))[1] == f"{deepspeed} {go_on} --training.steps=N"
    schedule = commands(config(stage="schedule", vote_at_step=5))
    assert schedule == [f"{deepspeed} launch/pretrain.py --config {tmp_path}/config.yaml --resume=auto"]


def test_doubtful_decisions_are_spelled_out_narrowest_first(tmp_path: Path) -> None:
    election = one_layer([0, 1, 0, 1, 2, 2], [55, 80, 45, 20, 48, 52], [0, 1, 5])
    G_LNN = torch.eye(6).double()[None]
    page = Page(write_report(tmp_path, election, G_LNN, config(heads=6, layers=1)).read_text())
    assert page.within("li#.") == [
        "layer 0, group 2: head 5 before head 4, margin 4.0%",
        "layer 0, group 0: head 0 before head 2, margin 10.0%",
    ]
    assert "2 of 3 decisions are doubtful" in page.within("span#.doubtful")
    assert page.within("details#layer-0.", "span#.doubtful") == ["4.0%"]
    assert page.within("details#layer-0.", "td#.doubtful") == ["10.0%", "4.0%"]


def test_empty_groups_and_equal_maps_leave_a_page(tmp_path: Path) -> None:
    labels = [0, 0, 0, 2, 2, 2]
    election = one_layer(labels, [0, 0, 0, 100, 0, 0], [0, 1, 3], heads_per_group=1)
    page = Page(write_report(tmp_path, election, torch.ones(1, 6, 6).double(), config(heads=6, layers=1)).read_text())
    assert not any("nan" in text for _, text in page.texts[1:])
    assert "none" in page.within("details#layer-0.", "td#.left")


def test_a_page_is_replaced_whole_and_faults_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    election, G_LNN = voted(2, 8, 2)
    path = write_report(tmp_path, election, G_LNN, config())
    path.write_text("old")
    write_report(tmp_path, election, G_LNN, config())
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]
    assert path.read_text().startswith("<!doctype html>")
    path.write_text("old")
    monkeypatch.setattr("configs.durable.sync", _full)
    with pytest.raises(UserError, match=r"report\.html: cannot be written \(no space\)"):
        write_report(tmp_path, election, G_LNN, config())
    assert path.read_text() == "old"
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/gha/report\.html: cannot be written"):
        write_report(tmp_path / "file", election, G_LNN, config())


def _full(path: Path) -> None:
    raise OSError(errno.ENOSPC, "no space")

"""Groups of a fabricated study: means, equal tokens and time, references, retention and elasticity by hand."""

from __future__ import annotations

from collections.abc import Mapping
from math import exp
from pathlib import Path
from typing import Any

import pytest

from model.costs.parameters import parameters
from pretrain.studies.collected import collect, laws
from pretrain.studies.groups import Group, Part
from pretrain.studies.laws import Law, Refused
from pretrain.studies.page import study_page
from pretrain.studies.wording import law_words
from tests.unit.pretrain.report.pages import Page
from tests.unit.pretrain.studies.fabricated import TOKENS, config_of, write_child

LOSSES = {"mha": (3.0, 3.2), "mqa": (3.1, 3.4), "sha": (3.5, 3.6)}


def child(study: Path, part: str, axes: Mapping[str, Any], loss: float, half: float = 1.0, **fields: Any) -> Path:
    """Its loss after all ten steps is `loss`, after five it is `half` higher."""
    return write_child(study, part, {axis: str(label) for axis, label in axes.items()}, {5: loss + half, 10: loss}, **fields)


def group(part: Part, label: str) -> Group:
    return next(one for one in part.groups if one.label == label)


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> Part:
    """mha, mqa and sha with two heads and two seeds; mha is twice as slow."""
    study = tmp_path_factory.mktemp("study")
    for variant, losses in LOSSES.items():
        for seed, loss in enumerate(losses):
            axes = {"variant": variant, "model.num_layers": 2, "run.seed": seed}
            child(study, "variants", axes, loss, attention=variant, seed=seed, seconds=2.0 if variant == "mha" else 1.0)
    return collect(study)[0]


def test_runs_that_differ_in_their_seeds_are_a_group(variants: Part) -> None:
    assert variants.roles == {"variant": "variant", "run.seed": "seed"}
    assert [one.label for one in variants.groups] == ["mha", "mqa", "sha"]
    loss = variants.loss(group(variants, "mha"))
    assert loss is not None
    assert (loss.mean, loss.deviation, loss.count) == (pytest.approx(3.1), pytest.approx(0.02**0.5), 2)
    assert group(variants, "mqa").figures["tokens_per_second"].mean == TOKENS


def test_equal_time_is_that_of_the_fastest(variants: Part) -> None:
    assert (variants.common("tokens"), variants.common("seconds")) == (10 * TOKENS, 10.0)
    slow, fast = (variants.at_equal(group(variants, name), "seconds") for name in ("mha", "mqa"))
    assert slow is not None
    assert fast is not None
    assert (slow.mean, fast.mean) == (pytest.approx(4.1), pytest.approx(3.25))  # mha is after five steps of ten


def test_retention_and_elasticity_by_hand(variants: Part) -> None:
    retention = variants.retention(group(variants, "mqa"))
    assert retention is not None
    by_seed = [1 - (exp(3.1) - exp(3.0)) / exp(3.0), 1 - (exp(3.4) - exp(3.2)) / exp(3.2)]
    assert (retention.mean, retention.count) == (pytest.approx(sum(by_seed) / 2), 2)
    elasticity = variants.elasticity(group(variants, "mha"))
    assert elasticity is not None
    mha, sha = (group(variants, name).figures["attention_parameters"].mean for name in ("mha", "sha"))
    gains = [(exp(3.5) - exp(3.0)) / exp(3.5), (exp(3.6) - exp(3.2)) / exp(3.6)]
    assert elasticity.mean == pytest.approx(sum(gains) / 2 / (mha / sha - 1))
    assert variants.elasticity(group(variants, "sha")) is None


def test_differences_are_of_equal_seeds(variants: Part) -> None:
    found = variants.against(group(variants, "mqa"), group(variants, "mha"))
    assert found is not None
    assert (found.mean, found.paired, found.separated) == (pytest.approx(0.15), True, False)
    assert found.half == pytest.approx(12.706 * 0.05)  # Student's t of one degree of freedom; 0.1 and 0.2 are 0.05 off


def test_the_best_learning_rate_of_each_variant(tmp_path: Path) -> None:
    rates = {"mha": {1e-3: 3.4, 1e-2: 3.2, 1e-1: 9.0}, "mqa": {1e-3: 3.3, 1e-2: 3.5}}
    for variant, of_rates in rates.items():
        for rate, loss in of_rates.items():
            child(tmp_path, "rates", {"model.attention": variant, "optimizer.lr": rate}, loss, attention=variant, lr=rate)
    part = collect(tmp_path)[0]
    assert part.roles == {"model.attention": "variant", "optimizer.lr": "rate"}
    assert [(one.variant, one.rate, part.at_edge(one)) for one in part.tuned] == [("mha", 1e-2, False), ("mqa", 1e-3, True)]
    reference = part.reference(group(part, "mqa, lr 0.01"), "mha")
    assert reference is not None
    assert reference.label == "mha, lr 0.01"


def test_references_have_as_many_heads_and_equal_axes(tmp_path: Path) -> None:
    for variant in ("mha", "mqa"):
        for heads in (1, 2):
            for text in ("code", "prose"):
                if (variant, heads) != ("mha", 1):
                    axes = {"model.attention": variant, "model.num_heads": heads, "text": text}
                    child(tmp_path, "heads", axes, 3.0, attention=variant, num_heads=heads)
    part = collect(tmp_path)[0]
    assert part.roles["text"] == "other"
    found = {one.label: part.reference(one, "mha") for one in part.groups if one.variant == "mqa"}
    assert {label: other.label if other else None for label, other in found.items()} == {
        "mqa, 1 head, text code": None,
        "mqa, 1 head, text prose": None,
        "mqa, 2 heads, text code": "mha, 2 heads, text code",
        "mqa, 2 heads, text prose": "mha, 2 heads, text prose",
    }


def test_an_unfinished_study_says_what_is_missing(tmp_path: Path) -> None:
    child(tmp_path, "one", {"run.seed": 0}, 3.0, seed=0)
    child(tmp_path, "one", {"run.seed": 1}, 3.0, seed=1, status="failed", done=3)
    (part,) = collect(tmp_path, {"one": {seed: {"run.seed": seed} for seed in "012"}})
    assert part.counts() == "3 runs: 1 finished, 1 failed, 1 missing"
    assert [len(one.runs) for one in part.groups] == [1]


def test_laws_of_sizes(tmp_path: Path) -> None:
    for layers, width in ((1, 4), (2, 8), (4, 16), (8, 32), (8, 64)):
        model = {"num_layers": layers, "hidden_size": width}
        size = sum(parameters(config_of(tmp_path, **model).model).values())
        child(tmp_path, "sizes", {"size": f"{width}"}, 2 + 30 * size**-0.4, **model)
    (part,) = collect(tmp_path)
    fits = laws(part)
    found = {fit.what: fit.law for fit in fits}
    assert list(found) == ["N", "C"]
    of_parameters = found["N"]
    assert isinstance(of_parameters, Law)
    assert (of_parameters.floor, of_parameters.slope) == (pytest.approx(2, rel=0.01), pytest.approx(0.4, rel=0.01))
    assert not isinstance(found["C"], Refused)
    assert law_words(fits[0]).startswith("L(N) of sizes: 2.0")
    page = Page(study_page("laws", [part], [fits]))
    assert [words[:4] for words in page.within("figcaption#.") if words.startswith("L(")] == ["L(N)", "L(C)"]
    assert len([words for words in page.within("title#.") if "5 sizes" in words]) == 4  # measured and beyond, twice

"""Sentences about a fabricated study, whose losses are known."""

from __future__ import annotations

from pathlib import Path

from pretrain.studies.collected import collect
from pretrain.studies.findings import findings, matched
from pretrain.studies.pool import pools
from tests.unit.pretrain.studies.fabricated import write_child

NOISE = (0.0, 0.01, 0.03)  # of three seeds, the same in all groups, so that differences of pairs have no spread


def said(study: Path, part: str) -> list[str]:
    return list(findings(next(one for one in collect(study) if one.name == part)))


def test_variants_and_heads(tmp_path: Path) -> None:
    for variant, above in (("mha", 0.0), ("mqa", 0.1)):
        for heads in (1, 2):
            for seed, noise in enumerate(NOISE):
                axes = {"model.attention": variant, "model.num_heads": str(heads), "run.seed": str(seed)}
                # MQA of one head is MHA of one head; they are told from another all the same, by 0.1.
                loss = 3.0 + above - 0.2 * (heads - 1) + noise
                write_child(tmp_path, "heads", axes, {10: loss}, attention=variant, num_heads=heads, seed=seed)
    lowest, against, equal, more = said(tmp_path, "heads")
    next_one = "The next, mqa, 2 heads, is +0.1000 ± 0.0000 above: separated."
    assert lowest == f"Lowest loss: mha, 2 heads, 2.8133 ± 0.0153 (3). {next_one}"
    assert against == "Loss minus that of mha, with as many heads: mqa +0.1000 to +0.1000 (higher in 2 of 2)."
    assert equal.endswith("0.5 %, loss minus its, with as many heads: mqa +0.1000 ± 0.0000 (separated).")
    of_both = (f"{variant} −0.2000 ± 0.0000 from 1 to 2 (separated)" for variant in ("mha", "mqa"))
    assert more == f"More heads change the loss by: {'; '.join(of_both)}."


def test_labels_against_the_first_and_rates_at_the_edge(tmp_path: Path) -> None:
    for text, above in (("code", 0.0), ("prose", 0.5)):
        for rate in (1e-3, 2e-3):
            axes = {"text": text, "optimizer.lr": f"{rate:g}"}
            write_child(tmp_path, "texts", axes, {10: 3.0 + above + rate}, lr=rate)
    lowest, labels, edge = said(tmp_path, "texts")
    assert lowest == "Lowest loss: text code, lr 0.001, 3.0010 (1). The next, text prose, lr 0.001, is +0.5000 above: one seed."
    assert labels == "text, all else equal: prose minus code +0.5000 (one seed)."
    assert edge.endswith("a better one may lie beyond: text code, lr 0.001; text prose, lr 0.001.")


def test_parts_of_equal_cost(tmp_path: Path) -> None:
    """`wide` was matched to `narrow`, which is one of two groups of another part, in parameters."""
    for seed, noise in enumerate(NOISE):
        axes = {"run.seed": str(seed)}
        for heads in (1, 2):
            write_child(
                tmp_path, "many", {"model.num_heads": str(heads)} | axes, {10: 3.0 + heads + noise}, seed=seed, num_heads=heads
            )
        match = {"cost": "parameters", "to": {"model.num_heads": 2}}
        write_child(tmp_path, "plain", axes, {10: 4.5 + noise}, seed=seed, num_heads=1, head_dim=8, match=match)
    (members,) = pools(collect(tmp_path))
    assert [member.label for member in members] == ["many: 1 head", "plain", "many: 2 heads"]
    assert list(matched(members)) == ["plain minus what has as many parameters, many: 2 heads: −0.5000 ± 0.0000 (separated)."]


def test_nothing_is_said_of_no_runs(tmp_path: Path) -> None:
    write_child(tmp_path, "part", {"run.seed": "0"}, {}, "failed")
    assert said(tmp_path, "part") == []

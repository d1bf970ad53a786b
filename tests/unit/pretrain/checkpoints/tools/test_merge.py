"""An average of checkpoints' weights: exact, a run that everything but training can use, complete or none."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import astuple
from fractions import Fraction
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch

from configs.errors import UserError
from pretrain.checkpoints.folder import read_config, read_state, verify
from pretrain.checkpoints.resume import Resumer
from pretrain.checkpoints.store import CheckpointStore
from pretrain.checkpoints.tools import tensors
from pretrain.checkpoints.tools.merge import merge
from pretrain.checkpoints.tools.tensors import Tensors
from pretrain.checkpoints.tools.verify import verify_all
from pretrain.checkpoints.unsharded import load_weights
from pretrain.distributed.layout import Layout
from pretrain.interop.model_card import origin_of
from tests.random_checkpoint import random_checkpoint
from tests.unit.pretrain.checkpoints.layouts import SHAPES, reseal, values, write_checkpoint


def others(count: int) -> list[dict[str, dict[str, torch.Tensor]]]:
    draw = torch.Generator().manual_seed(6)
    return [
        {
            kind: {name: torch.randn(x.shape, generator=draw) * 10.0**n for name, x in of.items()}
            for kind, of in values().items()
        }
        for n in range(count)
    ]


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.5, 3.0, 0.001]])
def test_the_average_of_other_layouts_rounded_once(
    tmp_path: Path, weights: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensors, "BLOCK", 12)
    layouts = ("unsharded", "zero on 4", "tensor on 2")
    sources = [
        write_checkpoint(tmp_path / f"run{n}", layout, state, step=n + 5)
        for n, (layout, state) in enumerate(zip(layouts, others(3), strict=True))
    ]
    folder = merge(sources, weights, tmp_path / "merged")
    assert folder == tmp_path / "merged/checkpoints/step_00000007"
    found = Tensors(folder / "engine")
    assert sorted(found.index.tensors) == sorted(f"model/{name}" for name in SHAPES)
    for name in SHAPES:
        stacked = [state["model"][name].double().numpy().ravel() for state in others(3)]
        parts = [Fraction(weight) / sum(map(Fraction, weights)) for weight in weights]
        exact = [
            float(sum(Fraction(x) * part for x, part in zip(row, parts, strict=True))) for row in zip(*stacked, strict=True)
        ]
        assert np.array_equal(found.rows(f"model/{name}", 0, 99).ravel(), np.array(exact).astype(np.float32)), name


def test_a_single_checkpoint_twice_is_itself(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "run", "zero on 4", values())
    found = Tensors(merge([source, source], [0.3, 0.4], tmp_path / "merged") / "engine")
    for name, tensor in values()["model"].items():
        assert np.array_equal(found.rows(f"model/{name}", 0, 99), tensor.numpy())


def test_a_merged_run_is_complete_and_says_what_it_is_of(tmp_path: Path) -> None:
    runs = [random_checkpoint(tmp_path, noise=noise, name=f"run{noise}") for noise in (0.1, 0.2)]
    sources = [run / "checkpoints/step_00000003" for run in runs]
    folder = merge(sources, [1.0, 3.0], tmp_path / "merged")
    verify(folder)
    assert verify_all(folder)[0] == []
    assert (tmp_path / "merged/checkpoints/latest").read_text() == "step_00000003\n"
    config, first = read_config(folder), read_config(sources[0])
    assert config.run.folder == str(tmp_path / "merged")
    assert config == first.model_copy(update={"run": config.run})
    assert (tmp_path / "merged/config.yaml").read_bytes() == (folder / "config.yaml").read_bytes()
    assert (folder / "tokenizer.json").read_bytes() == (sources[0] / "tokenizer.json").read_bytes()
    old = [load_weights(source) for source in sources]
    for name, weight in load_weights(folder).items():
        torch.testing.assert_close(weight, (old[0][name] + 3 * old[1][name]) / 4, rtol=1e-6, atol=1e-7)
    data = [first.data.path]
    assert [astuple(one) for one in read_state(folder).merged] == [
        (str(source), sha256((source / "complete.json").read_bytes()).hexdigest(), 3, weight, data)
        for source, weight in zip(sources, (0.25, 0.75), strict=True)
    ]


def test_the_card_of_a_merged_model_names_the_data_of_each(tmp_path: Path) -> None:
    runs = [random_checkpoint(tmp_path, noise=noise, name=f"run{noise}") for noise in (0.1, 0.2)]
    sources = [run / "checkpoints/step_00000003" for run in runs]
    for merged, other in (("same", None), ("apart", "data/other")):
        if other is not None:
            config = (sources[1] / "config.yaml").read_text()
            (sources[1] / "config.yaml").write_text(re.sub(r"(?m)^  path: .*$", f"  path: {other}", config))
            reseal(sources[1])
        folder = merge(sources, [1.0, 3.0], tmp_path / merged)
        config_of_all = read_config(folder)
        lines = origin_of(folder, config_of_all).lines
        assert lines["merged from 1"] == f"`{sources[0]}`, weight 0.25, trained on {config_of_all.data.path}"
        assert lines["merged from 2"] == f"`{sources[1]}`, weight 0.75, trained on {other or config_of_all.data.path}"
        assert ("data" in lines) == (other is None)


def test_no_run_resumes_from_it(tmp_path: Path) -> None:
    source = random_checkpoint(tmp_path) / "checkpoints/step_00000003"
    folder = merge([source, source], [1.0, 1.0], tmp_path / "merged")
    config, tokenizer = read_config(folder), (folder / "tokenizer.json").read_text()
    resumer = Resumer(CheckpointStore(tmp_path / "merged"), Layout(), config, "d" * 64, tokenizer)
    for resume in ("auto", str(folder)):
        with pytest.raises(UserError, match=f"^{folder}: holds an average of weights and no optimizer's state"):
            resumer.find(resume)
    assert folder.is_dir()  # it is not taken for damaged


def test_what_cannot_be_averaged(tmp_path: Path) -> None:
    first = write_checkpoint(tmp_path / "a", "unsharded", values())
    output = tmp_path / "merged"

    def refused(other: Path, message: str) -> None:
        with pytest.raises(UserError, match=message) as caught:
            merge([first, other], [1.0, 1.0], output)
        assert "\n" not in str(caught.value)
        assert [path for path in tmp_path.iterdir() if "merged" in path.name] == []

    wider = write_checkpoint(tmp_path / "wider", "unsharded", values(), "--model.hidden_size=32", "--model.attention=mha")
    refused(
        wider,
        "/a/.* and .*/wider/.* are not of the same model: model.attention 'mhe_add' and 'mha', model.hidden_size 16 and 32",
    )
    foreign = write_checkpoint(tmp_path / "foreign", "unsharded", values())
    (foreign / "tokenizer.json").write_text("other")
    reseal(foreign)
    refused(foreign, "have different tokenizers")
    new = values()
    new["model"]["up"] = torch.zeros(2, 2)
    refused(write_checkpoint(tmp_path / "shape", "unsharded", new), "do not both have model/up in float32 and in one shape")
    new["model"]["up"] = values()["model"]["up"].double()
    refused(write_checkpoint(tmp_path / "double", "unsharded", new), "do not both have model/up in float32")
    del new["model"]["up"]
    refused(write_checkpoint(tmp_path / "fewer", "unsharded", new), "do not both have model/up")
    damaged = shutil.copytree(first, tmp_path / "damaged")
    content = bytearray((damaged / "engine/rank_00000.safetensors").read_bytes())
    content[-1] ^= 1
    (damaged / "engine/rank_00000.safetensors").write_bytes(content)
    refused(damaged, "damaged/engine/rank_00000.safetensors: its content is not what was written")


def test_values_that_are_no_numbers(tmp_path: Path) -> None:
    huge = {"model": {"w": torch.full((3,), 3e38)}, "exp_avg": {"w": torch.zeros(3)}}
    source = write_checkpoint(tmp_path / "a", "unsharded", huge)
    assert Tensors(merge([source, source], [1.0, 1.0], tmp_path / "fits") / "engine").rows("model/w", 0, 1) == np.float32(3e38)
    path = source / "engine/rank_00000.safetensors"
    path.write_bytes(path.read_bytes().replace(np.float32(3e38).tobytes(), np.float32(np.inf).tobytes()))
    reseal(source)
    with pytest.raises(UserError, match=r"^model/w: its average is not finite"):
        merge([source, source], [1.0, 1.0], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_folder_that_is_there(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "a", "unsharded", values())
    with pytest.raises(UserError, match="a: already exists and is not empty"):
        merge([source, source], [1.0, 1.0], tmp_path / "a")
    with pytest.raises(UserError, match="there is no folder"):
        merge([source, source], [1.0, 1.0], tmp_path / "none/merged")


def test_the_one_file_holds_each_tensor_as_one_part(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "a", "zero on 4", values())
    index = json.loads((merge([source, source], [1.0, 1.0], tmp_path / "m") / "engine/index.json").read_text())
    assert index["tensors"]["model/scale"] == {"shape": [], "dtype": "F32", "parts": [[0, [], []]]}
    assert index["tensors"]["model/up"]["parts"] == [[0, [0, 0], [8, 5]]]

"""Exported folders: what transformers loads from them is the checkpoint; whole or not there at all."""

from __future__ import annotations

import json
import math
import resource
import shutil
import signal
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedConfig

from configs.errors import UserError
from configs.schema import ModelConfig
from data_pipeline.read.manifest import file_record
from model.build import unsharded_shapes
from model.decoder import DecoderLM
from model.huggingface import gguf_file, stock
from model.huggingface.fold import FoldedAttention
from model.huggingface.shards import write_shards
from model.huggingface.streamed import our_logits
from pretrain.checkpoints.folder import MARKER
from pretrain.inference import load_model
from pretrain.interop import export as exporting
from pretrain.interop.export import Format, export
from tests.random_checkpoint import random_checkpoint

LLAMA = ["--model.position=rope", "--model.norm=rmsnorm", "--model.activation=swiglu", "--model.embedding_position=before"]
BIG = 10**9


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return random_checkpoint(tmp_path)


def quiet(text: str) -> None:
    pass


def logits_of(folder: Path, tokens_BS: Tensor, **options: Any) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    with torch.inference_mode():
        return model(tokens_BS).logits


@pytest.mark.parametrize(
    ("kind", "overrides", "architecture"),
    [
        ("auto", [], "GPTBigCodeForCausalLM"),
        ("stock", ["--model.attention=mha"], "GPT2LMHeadModel"),
        ("auto", [*LLAMA, "--model.key_embedding=false"], "LlamaForCausalLM"),
        ("stock", [*LLAMA, "--model.tie_embeddings=false"], "LlamaForCausalLM"),
        ("auto", LLAMA, "ManyheadsForCausalLM"),  # llama would keep eight heads of keys and values, not one
        ("native", ["--model.attention=mhe_mul", "--model.position=alibi"], "ManyheadsForCausalLM"),
    ],
)
def test_transformers_loads_the_checkpoint(tmp_path: Path, kind: Format, overrides: list[str], architecture: str) -> None:
    source, output = random_checkpoint(tmp_path, *overrides), tmp_path / "out"
    said: list[str] = []
    assert export(source, output, kind, BIG, None, said.append) == output
    assert json.loads((output / "config.json").read_text())["architectures"] == [architecture]
    loaded, text = load_model(source), "A def statement: f(x)  # naïve 東京\n"
    tokenizer = AutoTokenizer.from_pretrained(output)
    ids = tokenizer(text)["input_ids"]
    assert ids == loaded.tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    end = loaded.tokenizer.end_of_document
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (end, end, end)
    assert GenerationConfig.from_pretrained(output).eos_token_id == end
    tokens_BS, model = torch.tensor([ids[:16]]), cast("Any", loaded.model)
    with torch.inference_mode():
        expected = model.cpu().logits(tokens_BS)[..., : loaded.tokenizer.vocab_size]
    found = logits_of(output, tokens_BS, trust_remote_code=architecture.startswith("Many"))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
    report = json.loads((output / "equivalence.json").read_text())
    assert 0 < report["float64"]["largest"] <= report["float64"]["allowed"] <= 1e-9 * report["largest_logit"]
    assert 0 < report["float32"]["largest"] <= report["float32"]["allowed"] < 1e-3 * report["largest_logit"]
    card = (output / "README.md").read_text()
    assert (
        f"| parameters as trained | {sum(shape.numel() for shape in unsharded_shapes(loaded.config.model).values()):,}" in card
    )
    assert "d" * 64 in card
    assert str(tmp_path) not in card.replace(str(tmp_path / "data"), "")
    assert said[-2] == f"written {output}"
    assert ("trust_remote_code=True" in said[-1]) == (architecture == "ManyheadsForCausalLM")


def test_files_of_a_largest_size(run_folder: Path, tmp_path: Path) -> None:
    largest = 20_000
    for name, size in (("one", BIG), ("several", largest)):
        export(run_folder, tmp_path / name, "stock", size, None, quiet)
    index = json.loads((tmp_path / "several/model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "several").glob("*.safetensors"))
    assert len(files) > 2
    assert files == sorted(set(index["weight_map"].values()))
    parts = {name: load_file(tmp_path / "several" / name) for name in files}
    assert all(index["weight_map"][name] == file for file, tensors in parts.items() for name in tensors)
    for tensors in parts.values():
        assert len(tensors) == 1 or sum(4 * tensor.numel() for tensor in tensors.values()) <= largest
    whole = load_file(tmp_path / "one/model.safetensors")
    assert whole.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(4 * tensor.numel() for tensor in whole.values())
    tokens_BS = torch.arange(12)[None]
    assert torch.equal(logits_of(tmp_path / "several", tokens_BS), logits_of(tmp_path / "one", tokens_BS))


def test_tensors_are_made_and_written_one_by_one(tmp_path: Path) -> None:
    alive: list[weakref.ref[Tensor]] = []

    def make() -> Tensor:
        assert not [tensor for tensor in alive if tensor() is not None]
        made = torch.full((50, 20), float(len(alive)))
        alive.append(weakref.ref(made))
        return made

    names = [f"layer.{number}" for number in range(6)]
    files = write_shards(tmp_path, dict.fromkeys(names, make), dict.fromkeys(names, torch.Size((50, 20))), 3 * 4000)
    assert [sorted(load_file(tmp_path / file)) for file in files] == [names[:3], names[3:]]
    assert {name: float(tensor.max()) for file in files for name, tensor in load_file(tmp_path / file).items()} == {
        name: float(number) for number, name in enumerate(names)
    }


def test_models_are_compared_with_one_block_in_memory() -> None:
    config = ModelConfig(hidden_size=8, num_layers=3, num_heads=2, vocab_size=9, max_position_embeddings=8)
    weights = {name: value.detach().clone() for name, value in DecoderLM(config).named_parameters()}
    copies: dict[str, list[weakref.ref[Tensor]]] = {}

    def read(name: str) -> Tensor:
        copy = weights[name].clone()
        block = name.split(".")[1] if name.startswith("blocks.") else "outside"
        others = [tensor for other, tensors in copies.items() if other not in (block, "outside") for tensor in tensors]
        assert not [tensor for tensor in others if tensor() is not None]
        copies.setdefault(block, []).append(weakref.ref(copy))
        return copy

    model = DecoderLM(config)
    model.load_state_dict(weights)
    tokens_BS = torch.arange(8)[None]
    with torch.inference_mode():
        expected = model.logits(tokens_BS)
    torch.testing.assert_close(our_logits(config, read, tokens_BS, torch.float32), expected)
    assert sorted(copies) == ["0", "1", "2", "outside"]


def test_an_unequal_model_is_refused(run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(attention: Any) -> Any:
        weight, bias = exact(attention)
        return stock.Affine(weight, bias * (1 + 1e-6))

    exact = FoldedAttention.output
    monkeypatch.setattr(FoldedAttention, "output", forgetful)
    with pytest.raises(UserError, match="not equal: in float64 its logits differ by up to"):
        export(run_folder, tmp_path / "out", "stock", BIG, None, quiet)
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_what_is_in_the_files_is_compared(run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = exporting.write_shards

    def careless(folder: Path, makes: Any, *others: Any) -> list[str]:
        name = "transformer.h.1.mlp.c_fc.weight"
        return write(folder, {**makes, name: lambda: makes[name]() + 1e-2}, *others)

    monkeypatch.setattr(exporting, "write_shards", careless)
    with pytest.raises(UserError, match=r"h\.1\.mlp\.c_fc\.weight is not in the files as it was made; nothing was written"):
        export(run_folder, tmp_path / "out", "stock", BIG, None, quiet)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["stock", "native", "gguf"])
def test_a_disk_that_takes_no_more(run_folder: Path, tmp_path: Path, kind: Format) -> None:
    (tmp_path / "out").mkdir()
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        with pytest.raises(
            UserError, match=r"out: cannot be written \((File too large|.*is the disk full\?)\); nothing was written"
        ):
            export(run_folder, tmp_path / "out", kind, BIG, None, quiet)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert list((tmp_path / "out").iterdir()) == []
    assert not list(tmp_path.glob(".out*"))


def test_two_exports_into_one_folder(run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compare = exporting._compare

    def overtaken(*arguments: Any) -> Any:
        monkeypatch.setattr(exporting, "_compare", compare)
        export(run_folder, tmp_path / "out", "native", BIG, None, quiet)
        return compare(*arguments)

    monkeypatch.setattr(exporting, "_compare", overtaken)
    with pytest.raises(UserError, match=r"out: cannot be written \(Directory not empty\)"):
        export(run_folder, tmp_path / "out", "stock", BIG, None, quiet)
    assert json.loads((tmp_path / "out/config.json").read_text())["model_type"] == "manyheads"
    assert logits_of(tmp_path / "out", torch.arange(6)[None], trust_remote_code=True).shape == (1, 6, 300)
    assert not list(tmp_path.glob(".out*"))


def test_the_written_configuration_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, save = random_checkpoint(tmp_path, *LLAMA, "--model.key_embedding=false"), PreTrainedConfig.save_pretrained

    def careless(settings: Any, folder: Path, **options: Any) -> None:
        save(settings, folder, **options)
        written = json.loads((folder / "config.json").read_text())
        written["rope_parameters"]["rope_theta"] = 123.0
        (folder / "config.json").write_text(json.dumps(written))

    monkeypatch.setattr(PreTrainedConfig, "save_pretrained", careless)
    with pytest.raises(UserError, match="not equal: in float64"):
        export(source, tmp_path / "out", "stock", BIG, None, quiet)


def test_a_gguf_file_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, output = random_checkpoint(tmp_path, *LLAMA, "--model.key_embedding=false"), tmp_path / "out"
    export(source, output, "gguf", BIG, None, quiet)
    assert sorted(path.name for path in output.iterdir()) == ["README.md", "equivalence.json", "model.gguf"]
    assert (output / "model.gguf").read_bytes()[:4] == b"GGUF"
    assert "llama.cpp rounds" in (output / "README.md").read_text()
    monkeypatch.setattr(gguf_file, "_interleaved", lambda rows, head_width: 0 * rows)
    with pytest.raises(UserError, match=r"self_attn\.[qk]_proj\.\w+ is not in the files as it was made"):
        export(source, tmp_path / "other", "gguf", BIG, None, quiet)


@pytest.mark.parametrize("kind", ["native", "stock", "gguf"])
@pytest.mark.parametrize(("factor", "what"), [(math.inf, "weights"), (math.nan, "weights"), (1e38, "(logits|weights)")])
def test_a_checkpoint_of_a_diverged_run(tmp_path: Path, kind: Format, factor: float, what: str) -> None:
    source = random_checkpoint(tmp_path, *LLAMA, "--model.key_embedding=false", factor=factor)
    message = rf"run/checkpoints/step_00000003: its {what} are not finite: its training diverged; take an earlier checkpoint$"
    with pytest.raises(UserError, match=message):
        export(source, tmp_path / "out", kind, BIG, None, quiet)
    assert not (tmp_path / "out").exists()


def test_bad_input(run_folder: Path, tmp_path: Path) -> None:
    def refused(
        message: str,
        source: Path = run_folder,
        output: Path = tmp_path / "out",
        kind: Format = "stock",
        text: Path | None = None,
    ) -> None:
        before = sorted(tmp_path.iterdir())
        with pytest.raises(UserError, match=message):
            export(source, output, kind, BIG, text, quiet)
        assert sorted(tmp_path.iterdir()) == before

    refused("no such checkpoint folder", source=tmp_path / "nothing")
    refused("not a complete checkpoint of manyheads", source=tmp_path)
    refused("already exists and is not empty", output=run_folder)
    refused("there is no folder", output=tmp_path / "a/b")
    refused("File name too long", output=tmp_path / ("a" * 300))
    refused("File name too long", source=tmp_path / ("a" * 300))
    (tmp_path / "data").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path / "data")
        refused("is the current folder or a mount point", output=Path("."))
    (tmp_path / "link").symlink_to(tmp_path / "data")
    refused("is a link; name the folder itself", output=tmp_path / "link")
    (tmp_path / "short.txt").write_text("a few words")
    refused("--text: has .* tokens, 15 are needed", text=tmp_path / "short.txt")
    refused("cannot be read as UTF-8 text", text=tmp_path / "missing.txt")
    (checkpoint,) = (run_folder / "checkpoints").glob("step_*")
    damaged = tmp_path / "damaged"
    shutil.copytree(checkpoint, damaged)
    file = damaged / "engine/rank_00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    refused("its content is not what was written", source=damaged)
    (damaged / "state.json").unlink()
    refused("missing from the checkpoint", source=damaged)


def test_another_tokenizer(run_folder: Path, tmp_path: Path) -> None:
    (checkpoint,) = (run_folder / "checkpoints").glob("step_*")
    (tmp_path / "other").mkdir()
    other = random_checkpoint(tmp_path / "other", vocabulary=600) / "checkpoints" / checkpoint.name / "tokenizer.json"
    shutil.copyfile(other, checkpoint / "tokenizer.json")
    with pytest.raises(UserError, match=r"tokenizer\.json: has \d+ bytes, \d+ were written"):
        export(run_folder, tmp_path / "out", "stock", BIG, None, quiet)
    marker = json.loads((checkpoint / MARKER).read_text())
    record = file_record(checkpoint / "tokenizer.json")
    marker["files"]["tokenizer.json"] = {"bytes": record.bytes, "sha256": record.sha256}
    (checkpoint / MARKER).write_text(json.dumps(marker))
    with pytest.raises(UserError, match="has 600 ids, the model only 320: not its tokenizer"):
        export(run_folder, tmp_path / "out", "stock", BIG, None, quiet)


def refuse_weights(folder: Path, names: Sequence[str]) -> None:
    assert not any(name.endswith("safetensors") for name in names)


@pytest.mark.parametrize("kind", ["stock", "gguf"])
def test_a_model_that_is_native_only(tmp_path: Path, kind: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused before the weights are read."""
    source = random_checkpoint(tmp_path, "--model.position=rope")
    monkeypatch.setattr(exporting, "verify", refuse_weights)
    with pytest.raises(UserError, match=rf"--format {kind}: .*embedding_position: before.*; or take --format native"):
        export(source, tmp_path / "out", kind, BIG, None, quiet)
    assert not (tmp_path / "out").exists()

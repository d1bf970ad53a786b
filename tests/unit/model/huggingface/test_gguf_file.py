"""GGUF files run by llama.cpp itself: logits, greedy tokens and token ids are those of our models."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import textwrap
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from configs.errors import UserError
from configs.schema import ModelConfig
from data_pipeline.prepare.tokenizer import PROBES, Tokenizer, train
from model.decoder import DecoderLM
from model.generation import generate
from model.huggingface.gguf_file import gguf_refusal, write_gguf
from model.huggingface.stock import GPT2, STOCK_ARCHITECTURES, Shape, find_stock
from model.initialization import init_weights

LENGTH, NEW_TOKENS = 64, 24
PROMPTS = ("def parse_args(self", "    return  the value, it's\n\n  ", "naïve 東京 🙂 123", "x")
GELU_MODELS: list[tuple[str, dict[str, Any]]] = [
    ("gpt_bigcode", {"attention": "mhe_add"}),
    ("gpt_bigcode", {"attention": "mhe_mul", "tie_embeddings": True, "position": "none", "bias": False}),
    ("gpt2", {"attention": "gqa", "num_kv_heads": 2}),
    ("starcoder2", {"attention": "mhe_mul", "position": "rope", "embedding_position": "before"}),
    ("starcoder2", {"attention": "gqa", "num_kv_heads": 2, "position": "rope", "bias": False, "rope_theta": 500.0}),
    ("mpt", {"attention": "mhe_mul", "position": "alibi", "bias": False}),
]
LLAMA = {"position": "rope", "norm": "rmsnorm", "activation": "swiglu", "embedding_position": "before"}
SILU_MODELS: list[tuple[str, dict[str, Any]]] = [
    ("llama", LLAMA | {"attention": "mhe_add"}),
    ("llama", LLAMA | {"attention": "mhe_add", "key_embedding": False, "bias": False, "tie_embeddings": True}),
    (
        "llama",
        LLAMA | {"attention": "gqa", "num_kv_heads": 2, "embedding_position": "after", "head_dim": 12, "rope_theta": 500.0},
    ),
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(train(map(inspect.getsource, (json, textwrap)), 512), "here")


def model_of(fields: dict[str, Any]) -> DecoderLM:
    """Two layers with random norms and biases, too, and head embeddings as large as the weights."""
    sizes: dict[str, Any] = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 576, "init_std": 0.3}
    learned = fields.get("position", "learned") == "learned"
    defaults: dict[str, Any] = {"tie_embeddings": False, "max_position_embeddings": LENGTH if learned else None}
    model = DecoderLM(ModelConfig(**sizes | defaults | fields))
    init_weights(model, seed=1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return model.eval()


def written(path: Path, model: DecoderLM, tokenizer: Tokenizer, text: str | None = None) -> str:
    """The GGUF file of the model; the name of its architecture."""
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    match = find_stock(model.config)
    assert match.stock is not None, match.reason
    shape = Shape(tokenizer.vocab_size, LENGTH, match.heads, match.kv_heads)
    end = tokenizer.end_of_document
    write_gguf(path, match.stock, model.config, shape, parameters.__getitem__, text or tokenizer.text, end, "tiny")
    return match.stock.name


# One thread, attention in float32. A separate process, which is killed, since deleting a server sometimes hangs.
SERVER = """
import sys, xllamacpp
parameters = xllamacpp.CommonParams()
parameters.model.path, parameters.n_ctx, parameters.n_parallel = sys.argv[1], int(sys.argv[2]), 1
parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
parameters.warmup, parameters.verbosity = False, 0
parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = xllamacpp.Server(parameters)
print(server.listening_address, flush=True)
sys.stdin.read()
"""


class LlamaCpp:
    """What llama.cpp's server answers."""

    def __init__(self, address: str) -> None:
        self._address = address

    def __call__(self, route: str, **body: Any) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self._address + route, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def ids(self, text: str) -> list[int]:
        return self("/tokenize", content=text, add_special=True)["tokens"]

    def greedy(self, prompt: str) -> list[int]:
        return self("/completion", prompt=prompt, n_predict=NEW_TOKENS, temperature=0, return_tokens=True)["tokens"]

    def log_probabilities(self, ids: list[int], vocab_size: int) -> Tensor | None:
        """Of the token after `ids`, (vocab_size,); None if it returns none because the likeliest is a part of a character."""
        answer = self("/completion", prompt=ids, n_predict=1, temperature=0, n_probs=vocab_size)
        if "completion_probabilities" not in answer:
            return None
        found = {entry["id"]: entry["logprob"] for entry in answer["completion_probabilities"][0]["top_logprobs"]}
        return torch.tensor([found[number] for number in range(vocab_size)])


@contextmanager
def llama_cpp(path: Path) -> Iterator[LlamaCpp]:
    command = [sys.executable, "-c", SERVER, str(path), str(LENGTH)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield LlamaCpp(process.stdout.readline().strip())
        finally:
            process.kill()


def table_gelu(x: Tensor) -> Tensor:
    """The tanh approximation of GELU (Hendrycks and Gimpel, arXiv 1606.08415), from and to float16."""
    x = x.half().float()
    return (0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))).half().float()


def errors_of(model: DecoderLM, engine: LlamaCpp, tokenizer: Tokenizer) -> Tensor:
    """The largest of any token's log-probability after each of some pieces of text."""
    ids = [tokenizer.end_of_document, *tokenizer.encode("".join(PROMPTS))]
    with torch.inference_mode():
        ours = model.logits(torch.tensor([ids]))[0, :, : tokenizer.vocab_size].log_softmax(-1)
    pairs = [(ours[end - 1], engine.log_probabilities(ids[:end], tokenizer.vocab_size)) for end in range(1, len(ids), 3)]
    errors = [float((our - its).abs().max()) for our, its in pairs if its is not None]
    assert len(errors) > 5
    return torch.tensor(errors)


def greedy_checked(model: DecoderLM, engine: LlamaCpp, tokenizer: Tokenizer, error: float) -> float:
    """Compare greedy tokens after each prompt, up to the first that this error could change; returns the compared share."""
    compared, kinds, end = [], set(), tokenizer.end_of_document
    for prompt in PROMPTS:
        prompt_BS = torch.tensor([[end, *tokenizer.encode(prompt)]])
        tokens = generate(model, prompt_BS, NEW_TOKENS, temperature=0, stop_token=end, vocab_size=tokenizer.vocab_size)
        ours_BS = torch.stack(list(tokens), dim=1)
        with torch.inference_mode():
            logits = model.logits(torch.cat([prompt_BS, ours_BS], dim=1))[
                0, prompt_BS.shape[1] - 1 : -1, : tokenizer.vocab_size
            ]
        best = logits.topk(2).values
        open_steps = (best[:, 0] - best[:, 1] < 2 * error).nonzero().flatten().tolist()
        sure = min(open_steps, default=NEW_TOKENS)
        assert engine.greedy(prompt)[:sure] == ours_BS[0, :sure].tolist()
        compared.append(sure / NEW_TOKENS)
        kinds.update(ours_BS[0, :sure].tolist())
    assert len(kinds) > 10  # not a single repeated token
    return sum(compared) / len(compared)


@pytest.mark.parametrize(
    ("architecture", "fields"), GELU_MODELS, ids=lambda value: value if isinstance(value, str) else value["attention"]
)
def test_models_with_gelu(
    architecture: str, fields: dict[str, Any], tokenizer: Tokenizer, tmp_path: Path, monkeypatch: Any
) -> None:
    model = model_of(fields)
    assert written(tmp_path / "model.gguf", model, tokenizer) == architecture
    with llama_cpp(tmp_path / "model.gguf") as engine:
        errors = errors_of(model, engine, tokenizer)
        assert errors.max() < 1e-2
        assert greedy_checked(model, engine, tokenizer, float(errors.max())) > 0.75
        # With llama.cpp's GELU almost no error remains; not the largest, since its inputs may round the other way.
        monkeypatch.setattr(F, "gelu", table_gelu)
        print(
            "MED",
            errors.max(),
            errors.median(),
            errors_of(model, engine, tokenizer).median(),
            errors_of(model, engine, tokenizer).max(),
        )
        assert errors_of(model, engine, tokenizer).median() < errors.median() / 20


@pytest.mark.parametrize(
    ("architecture", "fields"), SILU_MODELS, ids=lambda value: value if isinstance(value, str) else value["attention"]
)
def test_models_with_silu(architecture: str, fields: dict[str, Any], tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = model_of(fields)
    assert written(tmp_path / "model.gguf", model, tokenizer) == architecture
    with llama_cpp(tmp_path / "model.gguf") as engine:
        error = float(errors_of(model, engine, tokenizer).max())
        assert error < 1e-4
        assert greedy_checked(model, engine, tokenizer, error) == 1


def test_text_has_the_same_ids(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Except for the name of a special token, which llama.cpp reads as the token; each prompt begins with one."""
    written(tmp_path / "model.gguf", model_of({"attention": "mha"}), tokenizer)
    end = tokenizer.end_of_document
    with llama_cpp(tmp_path / "model.gguf") as engine:
        for text in (*PROBES, *PROMPTS, inspect.getsource(textwrap)):
            if "<|endoftext|>" not in text:
                assert engine.ids(text) == [end, *tokenizer.encode(text)]
        assert engine.ids("x<|endoftext|>") == [end, *tokenizer.encode("x"), end]
    assert tokenizer.encode("<|endoftext|>") != [end]


def test_ids_without_a_token_are_unused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tree = json.loads(tokenizer.text)
    gap = max(tree["model"]["vocab"].values())
    name = next(token for token, number in tree["model"]["vocab"].items() if number == gap)
    tree["model"]["vocab"][name] = gap + 2
    text = json.dumps(tree)
    model = model_of({"attention": "mha"})
    written(tmp_path / "model.gguf", model, Tokenizer(text, "here"), text)
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    kinds, tokens = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("token_type", "tokens"))
    assert tokens[gap:] == [f"[PAD{gap}]", f"[PAD{gap + 1}]", name]
    assert [int(kind) for kind in kinds[gap:]] == [gguf.TokenType.UNUSED, gguf.TokenType.UNUSED, gguf.TokenType.NORMAL]
    with llama_cpp(tmp_path / "model.gguf") as engine:
        assert len(engine.greedy("x")) > 0


def with_part(part: str, **fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda tree: (tree[part] or {}).update(fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_part("pre_tokenizer", add_prefix_space=True), "pre_tokenizer"),
        (with_part("pre_tokenizer", type="Whitespace"), "pre_tokenizer"),
        (with_part("model", ignore_merges=True), "model.ignore_merges"),
        (lambda tree: tree.update(normalizer={"type": "NFC"}), "normalizer: NFC"),
        (lambda tree: tree["added_tokens"][0].update(special=False), "is not special"),
    ],
)
def test_another_kind_of_tokenizer_is_refused(
    change: Callable[[dict[str, Any]], None], message: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    tree = json.loads(tokenizer.text)
    change(tree)
    with pytest.raises(UserError, match=message):
        written(tmp_path / "model.gguf", model_of({"attention": "mha"}), tokenizer, json.dumps(tree))


def test_heads_of_one_channel_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="head_dim 1"):
        written(tmp_path / "model.gguf", model_of({"attention": "mha", "num_heads": 32}), tokenizer)
    assert not (tmp_path / "model.gguf").exists()


def test_an_unknown_architecture_is_refused() -> None:
    assert [gguf_refusal(stock) for stock in STOCK_ARCHITECTURES] == [None] * len(STOCK_ARCHITECTURES)
    assert "no architecture for bloom" in (gguf_refusal(replace(GPT2, name="bloom")) or "")

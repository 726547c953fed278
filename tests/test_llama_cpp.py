"""Exported files in a real llama.cpp, against torch: log-probabilities, embeddings, greedy text, tokens."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_models import CASES, TOKENIZERS, build, byte_level, frozen, strings, word_pieces
from torch import Tensor

from stompp_hf import export_gguf
from stompp_hf.surgery.members import binary_layers

pytestmark = pytest.mark.llama_cpp
RUNNER = Path(__file__).parent / "run_llama_cpp.py"
EXACT, GELU, ROUNDED = 1e-5, 2e-3, 0.15
"""Largest difference of a log-probability: files in float32 (with llama.cpp's table of GELU); Q1_0."""
MARGIN = 0.05
LANGUAGE_MODELS = [name for name in CASES if name != "bert"]
PROMPTS = [[(7 * i + 13 * j) % 300 + 2 for i in range(24)] for j in range(3)]
STEPS = 16


def run(path: Path, requests: list[tuple[str, dict[str, Any]]]) -> list[Any]:
    """What llama.cpp answers."""
    done = subprocess.run(
        [sys.executable, str(RUNNER), str(path)],
        input=json.dumps(requests),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def generated(path: Path, vocabulary: int) -> list[Any]:
    body = {"n_predict": STEPS, "temperature": 0, "n_probs": vocabulary, "cache_prompt": False, "return_tokens": True}
    return run(path, [("/completion", {**body, "prompt": prompt, "ignore_eos": True}) for prompt in PROMPTS])


def log_probabilities(model: Any, ids: list[int]) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].double().log_softmax(-1)


def largest_difference(model: Any, path: Path, vocabulary: int) -> float:
    """Of a log-probability, over all tokens, prompts and steps; torch reads what llama.cpp wrote."""
    worst = 0.0
    for prompt, answer in zip(PROMPTS, generated(path, vocabulary), strict=True):
        expected = log_probabilities(model, prompt + answer["tokens"])[len(prompt) - 1 :]
        assert len(answer["completion_probabilities"]) == STEPS
        for step, found in enumerate(answer["completion_probabilities"]):
            by_token = {entry["id"]: entry["logprob"] for entry in found["top_logprobs"]}
            assert len(by_token) >= vocabulary - 2  # ignore_eos
            for token, value in by_token.items():
                if value > -1e3:
                    worst = max(worst, abs(value - float(expected[step, token])))
    return worst


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_log_probabilities(name: str, tmp_path: Path) -> None:
    tokenizer = byte_level(ascii_only=True)
    model = frozen(build(name, tokenizer))
    full = export_gguf(model, tmp_path / "f32.gguf", tokenizer, binary="float32", real="float32")
    packed = export_gguf(model, tmp_path / "q1_0.gguf", tokenizer)
    exact = GELU if name.startswith(("gemma", "gpt2")) else EXACT
    found = largest_difference(model, full, len(tokenizer)), largest_difference(model, packed, len(tokenizer))
    print(f"{name}: {found[0]:.2g} in float32, {found[1]:.2g} in Q1_0")
    assert found[0] < exact
    assert found[1] < ROUNDED


def test_groups_of_scales(tmp_path: Path) -> None:
    tokenizer = byte_level(ascii_only=True)
    wider = build("llama", tokenizer, hidden_size=256, intermediate_size=512, initializer_range=0.05)
    model = frozen(wider, weight_scale="group")
    for layer in binary_layers(model).values():
        layer.weight_scale.data.mul_(0.5 + torch.rand_like(layer.weight_scale))
    full = export_gguf(model, tmp_path / "f32.gguf", tokenizer, binary="float32", real="float32")
    packed = export_gguf(model, tmp_path / "q1_0.gguf", tokenizer)
    assert largest_difference(model, full, len(tokenizer)) < EXACT
    assert largest_difference(model, packed, len(tokenizer)) < ROUNDED


def test_embeddings(tmp_path: Path) -> None:
    tokenizer = word_pieces()
    model = frozen(build("bert", tokenizer))
    texts = [text for text in strings(60) if 20 < len(tokenizer(text)["input_ids"]) < 64][:12]
    for pooling in ("mean", "cls"):
        path = export_gguf(model, tmp_path / f"{pooling}.gguf", tokenizer, pooling=pooling)
        full = {"binary": "float32", "real": "float32"}
        exact = export_gguf(model, tmp_path / f"{pooling}-f32.gguf", tokenizer, pooling=pooling, **full)
        for file, least in ((path, 0.999), (exact, 1 - 1e-5)):
            answers = run(file, [("/embedding", {"content": text, "embd_normalize": -1}) for text in texts])
            for text, answer in zip(texts, answers, strict=True):
                with torch.no_grad():
                    hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
                expected = hidden.mean(0) if pooling == "mean" else hidden[0]
                found = torch.tensor(answer[0]["embedding"]).reshape(-1)
                assert torch.cosine_similarity(found, expected, dim=0) > least


def test_greedy_text(tmp_path: Path) -> None:
    """The same tokens, or another one where torch itself all but tosses a coin."""
    tokenizer = byte_level("qwen2", ascii_only=True)
    model = frozen(build("qwen2", tokenizer))
    path = export_gguf(model, tmp_path / "model.gguf", tokenizer)
    same = 0
    for prompt, answer in zip(PROMPTS, generated(path, len(tokenizer)), strict=True):
        same += compare_greedy(model, prompt, answer["tokens"])
    assert same > STEPS  # the larger part of one text at least


def compare_greedy(model: Any, prompt: list[int], tokens: list[int]) -> int:
    """Number of tokens until the two part; where they do, torch's own choice must be by less than MARGIN."""
    for step, token in enumerate(tokens):
        best = log_probabilities(model, prompt + tokens[:step])[-1].topk(2)
        if token != int(best.indices[0]):
            assert float(best.values[0] - best.values[1]) < MARGIN
            return step
    return len(tokens)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokens(name: str, tmp_path: Path) -> None:
    tokenizer = TOKENIZERS[name]()
    kind = "bert" if name.startswith("WordPiece") else "llama"
    path = export_gguf(frozen(build(kind, tokenizer)), tmp_path / "model.gguf", tokenizer)
    texts = strings(500)
    requests = [("/tokenize", {"content": text, "add_special": True}) for text in texts]
    found = [answer["tokens"] for answer in run(path, requests)]
    assert found == [tokenizer(text)["input_ids"] for text in texts]


def test_chat(tmp_path: Path) -> None:
    """A special token in a text is one token, and the text comes back."""
    tokenizer = byte_level("qwen2")
    path = export_gguf(frozen(build("qwen2", tokenizer)), tmp_path / "model.gguf", tokenizer)
    tokens = tokenizer("one </s> two")["input_ids"]
    requests = [("/tokenize", {"content": "one </s> two", "parse_special": True}), ("/detokenize", {"tokens": tokens})]
    first, second = run(path, requests)
    assert first["tokens"] == tokens and second["content"] == "one </s> two"

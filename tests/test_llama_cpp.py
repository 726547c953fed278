"""Exported files in a real llama.cpp, against torch: log-probabilities, embeddings, greedy text, tokens."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_models import CASES, TOKENIZERS, build, byte_level, frozen, strings, word_pieces
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from stompp_hf import export_gguf
from stompp_hf.surgery.members import binary_layers

pytestmark = pytest.mark.llama_cpp
RUNNER = Path(__file__).parent / "run_llama_cpp.py"
EXACT, GELU, ROUNDED = 1e-5, 2e-3, 0.15
"""Largest difference of a log-probability: files in float32 (with llama.cpp's table of GELU); Q1_0."""
MARGIN = 0.05
LANGUAGE_MODELS = [name for name in CASES if name != "bert"]
PROMPTS = [[(7 * i + 13 * j) % 300 + 2 for i in range(24)] for j in range(3)]
STEPS = 24


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


def generated(path: Path, vocabulary: int, prompts: list[list[int]] = PROMPTS) -> list[Any]:
    """Greedy text after each prompt, with the log-probabilities of all tokens at each step."""
    body = {"n_predict": STEPS, "temperature": 0, "n_probs": vocabulary, "cache_prompt": False, "return_tokens": True}
    return run(path, [("/completion", {**body, "prompt": prompt, "ignore_eos": True}) for prompt in prompts])


def log_probabilities(model: Any, ids: list[int]) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].double().log_softmax(-1)


def difference(model: Any, prompt: list[int], answer: Any) -> float:
    """The largest of a log-probability, over all tokens and steps; torch reads what llama.cpp wrote."""
    expected = log_probabilities(model, prompt + answer["tokens"])[len(prompt) - 1 :]
    listed, worst = iter(answer["completion_probabilities"]), 0.0
    found = next(listed)
    for step, token in enumerate(answer["tokens"]):
        if found is None or found["id"] != token:
            continue  # half a character: llama.cpp leaves it out
        entries = [entry for entry in found["top_logprobs"] if entry["logprob"] > -1e3]
        assert len(entries) >= expected.shape[1] - 2  # but for the end, which is to be ignored
        ids, values = zip(*((entry["id"], entry["logprob"]) for entry in entries), strict=True)
        worst = max(worst, float((expected[step, list(ids)] - torch.tensor(values, dtype=torch.float64)).abs().max()))
        found = next(listed, None)
    assert found is None
    return worst


def largest_difference(model: Any, path: Path, vocabulary: int) -> float:
    """Over all prompts."""
    return max(difference(model, *both) for both in zip(PROMPTS, generated(path, vocabulary), strict=True))


SOME_REAL = [("llama", ["*.q_proj", "*.down_proj"]), ("gpt2", ["*.c_attn", "*.mlp.c_proj"])]
"""Layers that stay real, which need the same form as binary ones, or another."""


@pytest.mark.parametrize(("name", "real"), [*((name, None) for name in LANGUAGE_MODELS), *SOME_REAL])
def test_log_probabilities(name: str, real: list[str] | None, tmp_path: Path) -> None:
    tokenizer = byte_level(ascii_only=True)
    model = frozen(build(name, tokenizer), exclude_modules=real)
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
    answers = zip(PROMPTS, generated(path, len(tokenizer)), strict=True)
    same = [same_tokens(model, prompt, answer["tokens"]) for prompt, answer in answers]
    print(f"of {STEPS} tokens the first {same} are the same")
    assert max(same) == STEPS


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What examples/run_clm.py makes by default, with binary weights; CLM_RUN=FOLDER takes one that is there."""
    if given := os.environ.get("CLM_RUN"):
        return Path(given)
    folder = tmp_path_factory.mktemp("clm")
    script = Path(__file__).parents[1] / "examples" / "run_clm.py"
    command = [sys.executable, str(script), "--output_dir", str(folder), "--binarize", "weights"]
    subprocess.run(command, check=True, capture_output=True)
    return folder


def test_the_example(example: Path, tmp_path: Path) -> None:
    """A trained model: text, log-probabilities, tokens."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(example), AutoTokenizer.from_pretrained(example)
    path = export_gguf(model, tmp_path / "model.gguf", tokenizer)
    prompts = [tokenizer(" ".join(text.split()))["input_ids"][:30] for text in (os.__doc__, json.__doc__, str.__doc__)]
    answers = list(zip(prompts, generated(path, len(tokenizer), prompts), strict=True))
    same = [same_tokens(model, prompt, answer["tokens"]) for prompt, answer in answers]
    worst = max(difference(model, prompt, answer) for prompt, answer in answers)
    print(f"of {STEPS} tokens the first {same} are the same; log-probabilities differ by up to {worst:.2g}")
    assert worst < ROUNDED
    check_tokens(path, tokenizer)


def same_tokens(model: Any, prompt: list[int], tokens: list[int]) -> int:
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
    check_tokens(path, tokenizer)


def check_tokens(path: Path, tokenizer: Any) -> None:
    """500 strings."""
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


def test_the_benchmark_runs() -> None:
    script = Path(__file__).parents[1] / "examples" / "benchmarks" / "gguf_speed.py"
    command = [sys.executable, str(script), "--tiny", "True", "--repeats", "1"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    sizes = [float(row.split("|")[2]) for row in printed.splitlines() if row.startswith(("| F16", "| Q"))]
    assert len(sizes) == 4 and sizes == sorted(sizes, reverse=True)

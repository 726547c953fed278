"""What a binary language model weighs as a GGUF file, and how fast llama.cpp runs it, against F16 and Q8_0.

    pip install "stompp-hf[gguf]" xllamacpp
    python examples/benchmarks/gguf_speed.py           # a Llama of 335M parameters; ten minutes, 6 GB of memory
    python examples/benchmarks/gguf_speed.py --tiny True

A Llama with random weights, frozen with StoMPPConfig(binarize="weights"), written by export_gguf in several types, and
run by llama.cpp on one thread. Files take turns in one process, each round from another one on: a prompt of random
tokens that no cache knows, then tokens one by one. Given are medians of what llama.cpp measures, in wall time, and the
median of the rounds' ratios to F16. Prints a Markdown table.
"""

import json
import random
import tempfile
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
import xllamacpp
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from training_cost import BenchmarkArguments, machine
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, logging

from stompp_hf import Progression, StoMPPConfig, binarize_model, export_gguf
from stompp_hf.surgery.members import binary_layers

WHOLE = "F16"
FILES: dict[str, dict[str, Any]] = {
    WHOLE: {"binary": "float16"},
    "Q8_0": {"binary": "q8_0", "real": "q8_0"},
    "Q1_0, table in F16": {},
    "Q1_0, table in Q8_0": {"real": "q8_0"},
}
"""Options of export_gguf."""


@dataclass
class Arguments:
    """How much is run."""

    tiny: bool = field(default=False, metadata={"help": "A model of a moment, to try the script."})
    repeats: int = field(default=9, metadata={"help": "Rounds."})
    prompt: int = field(default=128, metadata={"help": "Tokens of the prompt."})
    decode: int = field(default=32, metadata={"help": "Tokens that are generated."})
    seed: int = field(default=0, metadata={"help": "Of weights, prompts and the order of files."})


def build(args: Arguments) -> Any:
    """A frozen model with random weights, and its head tied to the table, as small models have it."""
    torch.manual_seed(args.seed)
    wide = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 24, "num_attention_heads": 16}
    narrow = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    size = narrow if args.tiny else wide
    config = LlamaConfig(
        **size, vocab_size=500 if args.tiny else 32000, num_key_value_heads=size["num_attention_heads"] // 2,
        tie_word_embeddings=True, max_position_embeddings=2048,
    )  # fmt: skip
    model = binarize_model(LlamaForCausalLM(config), StoMPPConfig(binarize="weights"))
    Progression(model, total_steps=1).step(1)
    return model.eval()


def bytes_tokenizer() -> Any:
    """A token a byte, and one of two: prompts are given as numbers, and the table's other rows have no token."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "th"]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [("t", "h")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def serve(path: Path, args: Arguments) -> Any:
    """llama.cpp with one file, on one thread."""
    options = xllamacpp.CommonParams()
    options.model.path, options.n_ctx, options.n_parallel = str(path), args.prompt + args.decode, 1
    options.n_gpu_layers, options.fit_params = 0, False
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = 1
    return xllamacpp.Server(options)


def speeds(server: Any, prompt: list[int], args: Arguments) -> tuple[float, float]:
    """Tokens a second of the prompt, and of what follows."""
    body = {"prompt": prompt, "n_predict": args.decode, "cache_prompt": False, "ignore_eos": True, "temperature": 0}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{server.listening_address}/completion", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request) as answer:
        found = json.load(answer)["timings"]
    if (found["prompt_n"], found["predicted_n"]) != (args.prompt, args.decode):
        raise RuntimeError(f"llama.cpp read {found['prompt_n']} tokens and wrote {found['predicted_n']}")
    return found["prompt_per_second"], found["predicted_per_second"]


def main() -> dict[str, tuple[int, float, float]]:
    """Write, run, print; returns bytes and tokens a second by file."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    draw = random.Random(args.seed)
    model, tokenizer = build(args), bytes_tokenizer()
    binary = sum(layer.weight.numel() for layer in binary_layers(model).values())
    real = sum(tensor.numel() for tensor in model.parameters()) - binary
    with tempfile.TemporaryDirectory() as folder:
        paths = {
            name: export_gguf(model, Path(folder, f"{number}.gguf"), tokenizer, **options)
            for number, (name, options) in enumerate(FILES.items())
        }
        del model
        sizes = {name: path.stat().st_size for name, path in paths.items()}
        servers = {name: serve(path, args) for name, path in paths.items()}
        rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in FILES}
        for number in range(args.repeats + 1):
            prompt = [draw.randrange(256) for _ in range(args.prompt)]
            names = list(FILES)[number % len(FILES) :] + list(FILES)[: number % len(FILES)]
            for name in names:
                found = speeds(servers[name], prompt, args)
                if number:  # the first round loads what the file system has not yet
                    rounds[name].append(found)
        servers.clear()
    print(f"{binary / 1e6:.1f}M binary and {real / 1e6:.1f}M real parameters; {args.repeats} rounds of {args.prompt}")
    print(f"tokens and {args.decode} after them; xllamacpp {xllamacpp.__version__}, {machine(BenchmarkArguments())}\n")
    print("| file | MB | prefill, tokens a second | over F16 | decode, tokens a second | over F16 |")
    print("|---|---|---|---|---|---|")
    results = {}
    for name, found in rounds.items():
        prefill, decode = (median(column) for column in zip(*found, strict=True))
        pairs = list(zip(found, rounds[WHOLE], strict=True))
        faster = [median(own[which] / whole[which] for own, whole in pairs) for which in (0, 1)]
        print(
            f"| {name} | {sizes[name] / 1e6:.1f} | {prefill:.0f} | {faster[0]:.2f} | {decode:.1f} | {faster[1]:.2f} |"
        )
        results[name] = sizes[name], prefill, decode
    return results


if __name__ == "__main__":
    main()

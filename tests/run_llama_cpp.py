"""Run a GGUF file in llama.cpp: python run_llama_cpp.py model.gguf < requests.json > answers.json.

A process of its own, since llama.cpp aborts where others raise. A request is [path, body] of llama-server's API, and
numbers are as exact as llama.cpp has them: one thread, a float32 cache, no flash attention.
"""

import json
import sys
import urllib.request
from typing import Any

import xllamacpp


def parameters(path: str, threads: int = 1, embedding: bool = False, context: int = 64) -> Any:
    """Options of a server for one file."""
    made = xllamacpp.CommonParams()
    made.model.path, made.n_ctx, made.n_parallel, made.n_gpu_layers = path, context, 1, 0
    made.n_batch = made.n_ubatch = context
    made.warmup = made.fit_params = False
    made.cache_type_k = made.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    made.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    made.cpuparams.n_threads = made.cpuparams_batch.n_threads = threads
    made.embedding = embedding
    return made


def ask(server: Any, path: str, body: dict[str, Any]) -> Any:
    """Post a request."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(server.listening_address + path, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


if __name__ == "__main__":
    requests = json.load(sys.stdin)
    server = xllamacpp.Server(parameters(sys.argv[1], embedding=any("embedding" in path for path, _ in requests)))
    json.dump([ask(server, path, body) for path, body in requests], sys.stdout)

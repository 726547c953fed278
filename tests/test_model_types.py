"""A model of every type that transformers has and that builds small (marker `sweep`), and of a few odd ones, always."""

import pytest
from model_types import judge_apart
from transformers import CONFIG_MAPPING

ODD = {
    "canine": "characters, hashed, and two down-sampling convolutions",
    "deberta-v2": "attention with positions apart",
    "falcon": "a subclass of nn.Linear",
    "inkling2_text": "checkpoints that transformers renames while loading",
    "mamba": "a state space, of which forward reads weights without calling layers",
    "mixtral": "fused experts stay real",
    "prophetnet": "an embedding that gives two tensors",
    "qwen2_5_vl": "two towers, and images of many sizes",
    "wav2vec2": "parametrized and ordinary convolutions",
}


@pytest.mark.parametrize("model_type", ODD)
def test_odd_types(model_type: str) -> None:
    record = judge_apart(model_type)
    assert record["verdict"] == "ok" and record["layers"] > 1, record["why"]


@pytest.mark.sweep
@pytest.mark.parametrize("model_type", list(CONFIG_MAPPING))
def test_every_type(model_type: str) -> None:
    record = judge_apart(model_type)
    if record["verdict"] in ("not judged", "nothing"):
        pytest.skip(record["why"])
    assert record["verdict"] == "ok", record.get("trace", record["why"])

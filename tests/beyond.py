"""Models with binary attention and embeddings, for the tests of what becomes binary beyond the layers."""

from typing import Any

import models
import pytest
import torch
import vision
from models import logits
from torch import Tensor, nn

from stompp_hf import BinaryAttention
from stompp_hf.modules.attention import Call

STEPS, MIDDLE = 12, 5
BOTH = {"attention": "binarize", "embeddings": "binarize"}
BERT, LLAMA = models.CASES["bert"], models.CASES["llama"]
CASES = {**{name: models.CASES[name] for name in ("bert", "gpt2", "llama", "t5", "bart")}, "vit": vision.CASES["vit"]}
MODULES = {"bert": 2, "gpt2": 2, "llama": 2, "t5": 6, "bart": 6, "vit": 2}
WORDS = {"bert": "bert.embeddings.word_embeddings", "llama": "model.embed_tokens"}
every_case = pytest.mark.parametrize("name", CASES)
SELF = "bert.encoder.layer.0.attention.self"


def build(name: str, implementation: str = "sdpa", seed: int = 0) -> Any:
    """The model of a case, with attention that is far from uniform."""
    model = CASES[name].build(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if any(part in key for part in (".query.", ".key.", ".q_proj.", ".k_proj.", ".q.", ".k.", ".c_attn.")):
                parameter *= 8.0
    model.set_attn_implementation(implementation)
    return model


def attentions(model: nn.Module) -> dict[str, BinaryAttention]:
    return {name: m for name, m in model.named_modules() if isinstance(m, BinaryAttention)}


def assert_two_levels(model: nn.Module, batch: dict[str, Tensor]) -> None:
    """What multiplies values is 0 or twice the head's scale, and both occur; padded keys get 0."""
    seen: list[tuple[BinaryAttention, Tensor]] = []

    def ask(module: BinaryAttention, args: Any) -> Any:
        query, key, value, call = args
        return query, key, value, Call(**{**vars(call), "wants_weights": True})

    def note(module: BinaryAttention, args: Any, output: Any) -> None:
        seen.append((module, output[1]))

    handles = [a.register_forward_pre_hook(ask) for a in attentions(model).values()]
    handles += [a.register_forward_hook(note) for a in attentions(model).values()]
    logits(model, batch)
    for handle in handles:
        handle.remove()
    assert len(seen) == len(attentions(model))
    for module, weights in seen:
        for head in range(module.heads):
            levels = {0.0, 2 * module.probability_scale[head].item()}
            assert set(weights[:, head].unique().tolist()) <= levels
        assert 0 < (weights > 0).float().mean() < 1
    if "attention_mask" in batch and len(seen) == 2:
        hidden = batch["attention_mask"] == 0
        assert all((weights[hidden[:, None, None, :].expand_as(weights)] == 0).all() for _, weights in seen)

"""Tiny random models of many architectures, small batches for them, and one training loop.

Every number of binary layers and every name in `left` is written by hand from the architecture, not taken from the
library. Dropout stays at each architecture's default, so that the state of the random generator matters.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from stompp_hf import BinaryConv1D, BinaryLayer, Progression, StoMPPConfig
from stompp_hf.modules import OWN_TENSORS

VOCAB, BATCH, LENGTH, LABELS = 100, 4, 8, 3
QUICK = {"end": 0.8, "refresh_rate": 2, "check_every": 4}
"""Options for runs of a dozen steps."""

_BERT = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_BERT |= {"intermediate_size": 48, "max_position_embeddings": 32, "num_labels": LABELS}
_LLAMA = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_LLAMA |= {"intermediate_size": 48, "num_key_value_heads": 1, "max_position_embeddings": 32, "attention_dropout": 0.1}
_GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32}
_GPT2 |= {"bos_token_id": 1, "eos_token_id": 2}
_T5 = {"vocab_size": VOCAB, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2}
_BART = {"vocab_size": VOCAB, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2}
_BART |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 32}


@dataclass(frozen=True)
class Case:
    """One architecture: how to build it, and what binarizing it must give."""

    auto: type
    config: Callable[[], hf.PretrainedConfig]
    layers: int
    stages: int
    left: dict[str, str] = field(default_factory=dict)

    @property
    def generates(self) -> bool:
        """Whether its labels are tokens."""
        return self.auto is not hf.AutoModelForSequenceClassification

    def build(self, seed: int = 0) -> hf.PreTrainedModel:
        """The model, with the same weights for the same seed, in training mode."""
        torch.manual_seed(seed)
        return self.auto.from_config(self.config()).train()

    def batch(self, seed: int = 0) -> dict[str, Tensor]:
        """Inputs with one padded row, and labels."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, VOCAB, (BATCH, LENGTH), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, LENGTH - 3 :] = 0
        labels = torch.where(mask.bool(), ids, -100) if self.generates else torch.arange(BATCH) % LABELS
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _classifier(config: type, layers: int, stages: int, left: dict[str, str], **changes: object) -> Case:
    return Case(hf.AutoModelForSequenceClassification, lambda: config(**{**_BERT, **changes}), layers, stages, left)


def _causal(config: Callable[..., hf.PretrainedConfig], layers: int, left: str, **options: object) -> Case:
    return Case(hf.AutoModelForCausalLM, lambda: config(**options), layers, 2, {"lm_head": left})


def _seq2seq(config: Callable[..., hf.PretrainedConfig], **options: object) -> Case:
    # encoder block: 4 attention + 2 feed-forward; decoder block: 4 + 4 attention + 2 feed-forward
    return Case(hf.AutoModelForSeq2SeqLM, lambda: config(**options), 2 * 6 + 2 * 10, 4, {"lm_head": "tied"})


CASES: dict[str, Case] = {
    "bert": _classifier(hf.BertConfig, 12, 2, {"bert.pooler.dense": "head", "classifier": "head"}),
    "roberta": _classifier(hf.RobertaConfig, 12, 2, {"classifier.dense": "head", "classifier.out_proj": "head"}),
    "distilbert": Case(
        hf.AutoModelForSequenceClassification,
        lambda: hf.DistilBertConfig(
            vocab_size=VOCAB, dim=32, n_layers=2, n_heads=2, hidden_dim=48, max_position_embeddings=32,
            num_labels=LABELS,
        ),
        12, 2, {"pre_classifier": "head", "classifier": "head"},
    ),
    "albert": _classifier(
        hf.AlbertConfig, 6, 1,  # one block, called twice
        {"albert.encoder.embedding_hidden_mapping_in": "first layer", "albert.pooler": "head", "classifier": "head"},
        embedding_size=16,
    ),
    "deberta-v2": _classifier(
        hf.DebertaV2Config, 12, 2, {"pooler.dense": "head", "classifier": "head"},
        relative_attention=True, share_att_key=True, pos_att_type=["p2c", "c2p"], position_buckets=4,
        norm_rel_ebd="layer_norm", pooler_hidden_size=32, pad_token_id=0,
    ),
    "electra": _classifier(
        hf.ElectraConfig, 12, 2,
        {"electra.embeddings_project": "first", "classifier.dense": "head", "classifier.out_proj": "head"},
        embedding_size=16,
    ),
    "gpt2": _causal(hf.GPT2Config, 8, "tied", **_GPT2),
    "llama": _causal(hf.LlamaConfig, 14, "head", tie_word_embeddings=False, **_LLAMA),
    "llama-tied": _causal(hf.LlamaConfig, 14, "tied", tie_word_embeddings=True, **_LLAMA),
    "t5": _seq2seq(hf.T5Config, decoder_start_token_id=0, **_T5),
    "bart": _seq2seq(hf.BartConfig, **_BART),
}  # fmt: skip


def scores(outputs: Any) -> Tensor:
    """The logits among a model's outputs, or the similarities of images and texts."""
    return outputs.logits if "logits" in outputs else outputs.logits_per_image


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Scores in eval mode; the mode is put back."""
    training = model.training
    model.eval()
    with torch.no_grad():
        result = scores(model(**batch))
    model.train(training)
    return result


def plain_names(names: Iterable[str]) -> list[str]:
    """Names without those that conversion adds."""
    return [name for name in names if name.rpartition(".")[2] not in OWN_TENSORS]


def first_calls(model: nn.Module, batch: dict[str, Tensor]) -> list[str]:
    """Names of all modules in the order of their first call, seen by a hook on every module there is."""
    names = {id(module): name for name, module in model.named_modules()}
    seen: dict[str, None] = {}
    with register_module_forward_pre_hook(lambda module, args: seen.setdefault(names.get(id(module), "loss"))):
        logits(model, batch)
    return list(seen)


def assert_binary(layer: BinaryLayer) -> None:
    """What shares a scale s in the layer's weight is s and -s and nothing else, with the latents' signs."""
    weight, latents, scale = layer.binary_weight(), layer.weight.detach(), layer.weight_scale.detach()
    if isinstance(layer, BinaryConv1D):  # stored as (in, out)
        weight, latents = weight.t(), latents.t()
    weight, latents = weight.flatten(1), latents.flatten(1)
    if scale.dim() == 1:
        scale = scale.expand(len(weight))[:, None].expand_as(weight)
    else:
        scale = scale.repeat_interleave(layer.stompp_config.group_size, 1)[:, : weight.shape[1]]
    assert (scale != 0).all() and torch.equal(weight, torch.where(latents >= 0, scale, -scale))


def train(
    model: nn.Module, case: Any, first: int, last: int, total: int, lr: float = 1e-3, seed: int = 0
) -> list[float]:
    """Steps [first, last) of a run of `total`, each on its own batch and random state, and the state after them."""
    model.train()
    progression = Progression(model, total)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    progression.attach(optimizer)
    losses = []
    for step in range(first, last):
        hf.set_seed(1000 * seed + step)  # masked time steps are drawn by numpy
        progression.step(step)
        loss = model(**case.batch(step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    progression.step(last)
    progression.detach()
    return losses


def quick(**options: object) -> StoMPPConfig:
    """The default configuration, with what runs of a dozen steps need."""
    return StoMPPConfig(**{**QUICK, **options})


def same_tensors(left: dict[str, Tensor], right: dict[str, Tensor]) -> list[str]:
    """Names of the entries of two state dicts that are missing on one side or differ in a bit."""
    names = [*left, *(name for name in right if name not in left)]
    return [n for n in names if n not in left or n not in right or not torch.equal(left[n], right[n])]

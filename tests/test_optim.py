"""Parameter groups: what weight decay may touch; and the optimizer for Trainer that uses them."""

from collections import Counter
from typing import Any

import pytest
import torch
from models import CASES, Case, quick
from torch import nn
from transformers import Trainer, TrainingArguments

from stompp_hf import StoMPPTrainerCallback, binarize_model, create_optimizer, parameter_groups
from stompp_hf.errors import NotBinarizedError
from stompp_hf.surgery.members import binary_layers


def names_by_decay(model: nn.Module, groups: list[dict[str, Any]]) -> dict[float, set[str]]:
    """Names of the parameters by the weight decay of their group; each one is in one group, once."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    counts = Counter(id(parameter) for group in groups for parameter in group["params"])
    assert set(counts.values()) == {1}
    assert counts.keys() == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    return {group["weight_decay"]: {names[id(parameter)] for parameter in group["params"]} for group in groups}


def arguments(path: Any, **options: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(path), use_cpu=True, max_steps=4, weight_decay=0.3, learning_rate=1e-3, save_strategy="no",
        per_device_train_batch_size=4, disable_tqdm=True, **options,
    )  # fmt: skip


def test_only_real_weights_decay_in_bert() -> None:
    model = binarize_model(CASES["bert"].build())
    decay = names_by_decay(model, parameter_groups(model, 0.1))
    embeddings = [f"bert.embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")]
    assert decay[0.1] == {*embeddings, "bert.pooler.dense.weight", "classifier.weight"}
    for kind in ("weight", "bias", "weight_scale", "activation_scale", "activation_threshold"):
        assert all(f"{name}.{kind}" in decay[0.0] for name in binary_layers(model))
    assert "bert.embeddings.LayerNorm.weight" in decay[0.0] and "classifier.bias" in decay[0.0]
    assert len(decay[0.0]) == 12 * 5 + (1 + 2 * 2) * 2 + 2


def test_only_the_embedding_decays_in_llama_and_t5() -> None:
    for name, decayed in (
        ("llama-tied", {"model.embed_tokens.weight"}),
        ("llama", {"model.embed_tokens.weight", "lm_head.weight"}),
    ):
        model = binarize_model(CASES[name].build())
        assert names_by_decay(model, parameter_groups(model, 0.1))[0.1] == decayed
    model = binarize_model(CASES["t5"].build())
    decayed = names_by_decay(model, parameter_groups(model, 0.1))[0.1]
    assert "shared.weight" in decayed and not any("norm" in name or "DenseReluDense" in name for name in decayed)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_no_latent_decays_anywhere(case: Case) -> None:
    model = binarize_model(case.build())
    decay = names_by_decay(model, parameter_groups(model, 0.1))
    binary = set(binary_layers(model))
    assert not any(name.rpartition(".")[0] in binary for name in decay[0.1])
    assert len(decay[0.0]) > case.layers


def test_frozen_parameters_and_empty_groups_are_left_out() -> None:
    model = binarize_model(CASES["bert"].build())
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.endswith("weight_scale")
    groups = parameter_groups(model, 0.1, lr=0.5)
    assert names_by_decay(model, groups).keys() == {0.0} and groups[0]["lr"] == 0.5
    assert len(groups[0]["params"]) == 12
    with pytest.raises(NotBinarizedError, match="binarize_model"):
        parameter_groups(CASES["bert"].build(), 0.1)


def test_fixed_values_are_no_parameters() -> None:
    config = quick(learn_weight_scale=False, learn_activation_scale=False, learn_activation_threshold=False)
    model = binarize_model(CASES["bert"].build(), config)
    names = {name for name, _ in model.named_parameters()}
    assert names == {name for name, _ in CASES["bert"].build().named_parameters()}
    names_by_decay(model, parameter_groups(model, 0.1))


def test_decay_moves_no_latent() -> None:
    """With gradients of zero only decay moves parameters."""
    model = binarize_model(CASES["bert"].build())
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1, lr=0.1))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert "classifier.weight" in moved and not any(name.startswith("bert.encoder") for name in moved)


def test_create_optimizer_follows_training_arguments(tmp_path: Any) -> None:
    model = binarize_model(CASES["bert"].build(), quick())
    args = arguments(tmp_path, adam_beta1=0.8, adam_epsilon=1e-6)
    optimizer = create_optimizer(model, args)
    plain = Trainer(CASES["bert"].build(), args).create_optimizer()
    assert type(optimizer) is type(plain) is torch.optim.AdamW
    assert optimizer.defaults == plain.defaults
    assert {group["lr"] for group in optimizer.param_groups} == {1e-3}
    assert {group["betas"] for group in optimizer.param_groups} == {(0.8, 0.999)}
    assert names_by_decay(model, optimizer.param_groups).keys() == {0.3, 0.0}

    sgd = create_optimizer(model, arguments(tmp_path, optim="sgd"))
    assert type(sgd) is torch.optim.SGD and names_by_decay(model, sgd.param_groups).keys() == {0.3, 0.0}


def test_trainer_takes_the_optimizer(tmp_path: Any) -> None:
    case = CASES["bert"]
    model = binarize_model(case.build(), quick())
    rows = [{key: value[i] for key, value in case.batch().items()} for i in range(4)]
    args = arguments(tmp_path)
    optimizer = create_optimizer(model, args)
    trainer = Trainer(
        model, args, train_dataset=rows, callbacks=[StoMPPTrainerCallback()], optimizers=(optimizer, None)
    )
    trainer.train()
    assert getattr(trainer.optimizer, "optimizer", trainer.optimizer) is optimizer
    assert all(layer.stage_state == "frozen" for layer in binary_layers(model).values())
    assert all(state["step"] > 0 for state in optimizer.state.values()) and optimizer.state

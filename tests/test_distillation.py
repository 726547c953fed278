"""The teacher's losses against plain formulas, and the callback inside Trainer: snapshot, resume, refusals."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from datasets import Dataset
from models import CASES, quick, same_tensors
from torch import nn
from torch.nn.functional import kl_div
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainingArguments

from stompp_hf import (
    DistillationCallback,
    Distiller,
    Progression,
    StoMPPTrainerCallback,
    binarize_model,
    create_optimizer,
    get_plan,
)
from stompp_hf.errors import CheckpointError, ConfigError, DistillationError
from stompp_hf.method import class_divergence
from stompp_hf.surgery.attention_interface import watched
from stompp_hf.surgery.members import binary_layers
from stompp_hf.training.compared import relation_places
from stompp_hf.training.distillation import blocks_of, snapshot
from stompp_hf.training.teacher_losses import hidden_loss, logits_loss, relation_loss

BERT = CASES["bert"]


def student(name: str = "bert", **options: Any) -> Any:
    return binarize_model(CASES[name].build(), quick(**options)).train()


def fine_tuned(name: str = "bert", seed: int = 5, **config: Any) -> Any:
    """Another model of the same class, with weights of its own."""
    plain = CASES[name].build()
    for key, value in config.items():
        setattr(plain.config, key, value)
    hf.set_seed(seed)
    return type(plain)(plain.config)


# ---- the losses ----


def test_hidden_loss_is_the_error_in_units_of_the_variance() -> None:
    torch.manual_seed(0)
    mine, goal = torch.randn(2, 5, 3, dtype=torch.float64), torch.randn(2, 5, 3, dtype=torch.float64)
    real = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    rows = [(b, t) for b in range(2) for t in range(5) if real[b, t]]
    means = [sum(goal[b, t, f] for b, t in rows) / len(rows) for f in range(3)]
    spread = sum((goal[b, t, f] - means[f]) ** 2 for b, t in rows for f in range(3))
    error = sum((mine[b, t, f] - goal[b, t, f]) ** 2 for b, t in rows for f in range(3))
    assert hidden_loss(mine, goal, real).item() == pytest.approx((error / spread).item(), rel=1e-12)
    assert hidden_loss(goal, goal, real) == 0
    flat = goal[real.bool()].mean(0).expand_as(goal)
    assert hidden_loss(flat, goal, real).item() == pytest.approx(1.0)
    images = torch.randn(2, 3, 4, 4)
    assert hidden_loss(images.mean((0, 2, 3), keepdim=True).expand_as(images), images).item() == pytest.approx(1.0)


def test_relation_loss_is_the_divergence_of_attention_relations() -> None:
    """Each head and position by itself; padding is neither a position nor related to, and the teacher is wider."""
    torch.manual_seed(0)
    mine, goal = torch.randn(2, 5, 2 * 3, dtype=torch.float64), torch.randn(2, 5, 2 * 4, dtype=torch.float64)
    real = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 0, 1]])

    def divergence(b: int, h: int, t: int, seen: list[int]) -> torch.Tensor:
        q, p = (
            torch.stack([u[b, t, h * d : (h + 1) * d] @ u[b, s, h * d : (h + 1) * d] / d**0.5 for s in seen]).softmax(0)
            for u, d in ((mine, 3), (goal, 4))
        )
        return (p * (p / q).log()).sum()

    for mask in (real, None):
        known = torch.ones(2, 5) if mask is None else mask
        seen = [[t for t in range(5) if known[b, t]] for b in range(2)]
        each = [divergence(b, h, t, seen[b]) for b in range(2) for h in range(2) for t in seen[b]]
        assert relation_loss(mine, goal, 2, mask).item() == pytest.approx((sum(each) / len(each)).item(), rel=1e-12)
    assert relation_loss(goal, goal, 2, real) == 0
    leaf = mine.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda u: relation_loss(u, goal, 2, real), leaf)
    assert relation_loss(mine, goal, 2, torch.zeros(2, 5)) == 0  # nothing but padding


def test_logits_loss_of_each_kind() -> None:
    torch.manual_seed(0)
    mine, goal = torch.randn(4, 3), torch.randn(4, 3)
    for heat in (1.0, 2.0):
        p, q = (goal / heat).softmax(-1), (mine / heat).softmax(-1)
        wanted = heat**2 * (p * (p.log() - q.log())).sum(-1)
        assert torch.allclose(logits_loss(mine, goal, "classes", heat), wanted.mean())
        weight = torch.tensor([0.5, 0.0, 0.25, 0.25])
        assert torch.allclose(logits_loss(mine, goal, "classes", heat, weight), (wanted * weight).sum())
        p, q = (goal / heat).sigmoid(), (mine / heat).sigmoid()
        wanted = heat**2 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum(-1)
        assert torch.allclose(logits_loss(mine, goal, "labels", heat), wanted.mean(), atol=1e-6)
    assert torch.allclose(logits_loss(mine, goal, "regression"), (mine - goal).square().mean())


class Fresh(TorchDispatchMode):
    """Sizes of the tensors that are made; views, and what is written in place, are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in given:
            self.sizes.append(out.numel())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_divergence_in_chunks_is_the_whole_one(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients; of the logits' size, nothing is made but the gradient. The last chunk has one row."""
    torch.manual_seed(0)
    mine, goal = 3 * torch.randn(3, 5, 40, dtype=dtype), 3 * torch.randn(3, 5, 40, dtype=dtype)
    weight = torch.rand(3, 5)
    plain, chunked = (mine.clone().requires_grad_() for _ in range(2))
    z, target = plain.float() / 2.0, goal.float() / 2.0
    each = 4.0 * kl_div(z.log_softmax(-1), target.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    wanted = (each * weight).sum()
    wanted.backward()
    monkeypatch.setattr(class_divergence, "CHUNK", 2 * 40)
    with Fresh() as fresh:
        loss = logits_loss(chunked, goal, "classes", 2.0, weight)
        loss.backward()
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(chunked.grad, plain.grad)
    assert [size for size in fresh.sizes if size > 2 * 40] == [mine.numel()]


# ---- the model's forward ----


def padded_pair() -> Any:
    """A student, its teacher, a batch with padding, and what both give for it without a distiller."""
    model, teacher, batch = student(), fine_tuned().eval(), BERT.batch()
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][0, 5:] = 0
    hf.set_seed(1)
    own = model(**batch, output_hidden_states=True)
    with torch.no_grad():
        theirs = teacher(**batch, output_hidden_states=True)
    return model, teacher, batch, own, theirs


def test_loss_is_task_plus_logits_plus_hidden() -> None:
    model, teacher, batch, own, theirs = padded_pair()
    distiller = Distiller(model, teacher, logits=0.5, hidden=0.25, task=2.0, temperature=3.0)
    hf.set_seed(1)
    outputs = model(**batch)
    assert torch.equal(outputs.logits, own.logits)  # the teacher draws nothing, and takes no dropout from the student
    pairs = list(zip(own.hidden_states[1:], theirs.hidden_states[1:], strict=True))
    hidden = sum(hidden_loss(a, b, batch["attention_mask"]) for a, b in pairs) / len(pairs)
    logits = logits_loss(own.logits, theirs.logits, "classes", 3.0)
    assert torch.allclose(outputs.loss, 2.0 * own.loss + 0.5 * logits + 0.25 * hidden)
    assert sorted(distiller.last) == ["hidden", "logits", "task"] and not distiller.used
    outputs.loss.backward()
    assert distiller.used
    assert all(p.grad is None for p in teacher.parameters())
    del batch["labels"]  # unlabelled data
    hf.set_seed(1)
    assert torch.allclose(model(**batch).loss, 0.5 * logits + 0.25 * hidden)


def test_relations_and_the_embedding_output() -> None:
    model, teacher, batch, own, theirs = padded_pair()
    pairs = list(zip(own.hidden_states, theirs.hidden_states, strict=True))
    hidden = sum(hidden_loss(a, b, batch["attention_mask"]) for a, b in pairs) / len(pairs)
    losses = []
    for name in ("query", "key", "value"):
        for i, (a, b) in enumerate(pairs[:-1]):
            layers = [getattr(m.bert.encoder.layer[i].attention.self, name) for m in (model, teacher)]
            losses.append(relation_loss(layers[0](a), layers[1](b), 2, batch["attention_mask"]))
    distiller = Distiller(model, teacher, logits=0.0, task=0.0, hidden=0.25, relations=3.0, embeddings=True)
    hf.set_seed(1)
    outputs = model(**batch)
    assert sorted(distiller.last) == ["hidden", "relations"]
    torch.testing.assert_close(distiller.last["relations"], 3.0 * sum(losses).detach() / len(losses))
    torch.testing.assert_close(distiller.last["hidden"], 0.25 * hidden.detach())
    outputs.loss.backward()
    assert all(
        getattr(b.attention.self, n).weight.grad.any() for b in model.bert.encoder.layer for n in ("key", "value")
    )
    assert model.bert.embeddings.word_embeddings.weight.grad.any() and model.classifier.weight.grad is None


@pytest.mark.parametrize("name", ["gpt2", "llama", "bart", "t5"])
def test_relations_are_of_what_attention_is_given(name: str) -> None:
    """Also where one layer gives all three, keys have fewer heads, and a decoder looks at an encoder."""
    model = student(name)
    places = relation_places(model, list(blocks_of(model)))
    names = {id(module): key for key, module in model.named_modules()}
    given: dict[str, tuple[torch.Tensor, ...]] = {}
    states: dict[str, torch.Tensor] = {}
    for key, place in places.items():
        place.module.register_forward_hook(
            lambda m, a, k, o, key=key, place=place: states.update({key: place.read(a, k, o)}), with_kwargs=True
        )
    with watched(model.eval(), lambda module, q, k, v, call: given.update({names[id(module)]: (q, k, v)})):
        model(**CASES[name].batch())
    assert given and len(states) == len(places) == 3 * len(given)
    for attention, tensors in given.items():
        own = {key: place for key, place in places.items() if place.name.startswith(f"{attention}.")}
        assert [key.rpartition(" ")[2] for key in own] == ["query", "key", "value"]
        for (key, place), tensor in zip(own.items(), tensors, strict=True):
            found = states[key].unflatten(-1, (place.heads, -1)).transpose(1, 2)
            assert found.shape == tensor.shape
            if name != "llama" or key.endswith("value"):  # rotated by their positions
                torch.testing.assert_close(found, tensor)


def test_relations_that_cannot_be_found_are_refused() -> None:
    for model, word in (
        (Stack(lambda: AttentionBlock("query_key_value")), "blocks.0 has no query, key and value projections"),
        (Stack(lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))), "blocks.0, blocks.1 has no query"),
        (Stack(lambda: AttentionBlock("qkv", heads=None)), "how many heads"),
    ):
        with pytest.raises(DistillationError, match=f"relations: .*{word}.*relations=0"):
            relation_places(model, ["blocks.0", "blocks.1"])
    found = relation_places(Stack(lambda: AttentionBlock("qkv", heads=4)), ["blocks.0", "blocks.1"])
    assert len(found) == 6 and {place.heads for place in found.values()} == {4}


class AttentionBlock(nn.Module):
    def __init__(self, name: str, heads: int | None = 2) -> None:
        super().__init__()
        self.num_heads = heads
        self.add_module(name, nn.Linear(8, 24))


class Stack(nn.Module):
    def __init__(self, block: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([block(), block()])


def test_a_teacher_of_another_width_teaches_relations() -> None:
    model = student()
    teacher = fine_tuned(hidden_size=48, num_hidden_layers=4, num_attention_heads=3)
    distiller = Distiller(model, teacher, logits=0.0, hidden=0.0, relations=1.0)
    model(**BERT.batch()).loss.backward()
    assert distiller.last["relations"] > 0
    Distiller(student(), fine_tuned(num_attention_heads=1), relations=1.0)
    odd = student()
    Distiller(odd, fine_tuned(hidden_size=33, num_attention_heads=1), logits=0.0, hidden=0.0, relations=1.0)
    with pytest.raises(DistillationError, match=r"2 heads of one size.*relations=0"):
        odd(**BERT.batch())


def test_blocks_that_stay_real_keep_their_place() -> None:
    """The teacher's second block teaches the student's second, also where the first one is not binary."""
    model = binarize_model(BERT.build(), quick(exclude_modules=["bert.encoder.layer.0"])).train()
    distiller = Distiller(model, fine_tuned(), embeddings=True)
    assert list(blocks_of(model)) == ["bert.encoder.layer.1"]
    assert distiller._teacher_blocks(distiller.teacher) == (["bert.encoder.layer.1"], ["bert.encoder.layer.0"])
    assert {p.name for p in distiller._places["hidden"].values()} == {"bert.encoder.layer.1", "bert.encoder.layer.0"}


@pytest.mark.parametrize("name", CASES)
def test_every_architecture_has_blocks_and_learns_from_its_snapshot(name: str) -> None:
    model, batch = student(name), CASES[name].batch()
    plain = model(**batch).loss
    distiller = Distiller(model, snapshot(model), relations=1.0, embeddings=True)
    assert list(blocks_of(model)) and all("stompp" not in key for key in model.state_dict() if "teacher" in key)
    model(**batch).loss.backward()
    parts = {key: part.item() for key, part in distiller.last.items()}
    # Equal weights: what differs is the student's dropout.
    assert 0 <= parts["logits"] < 0.5 and 0 <= parts["hidden"] < 1.5 and parts["task"] > 0
    assert -1e-6 <= parts["relations"] < 0.2
    assert not plain.isnan()


def test_untouched_in_evaluation_without_teacher_and_after_detach() -> None:
    model, batch = student(), BERT.batch()
    names, before = list(model.state_dict()), model.eval()(**batch)
    distiller = Distiller(model, fine_tuned())
    after = model(**batch)
    assert torch.equal(after.loss, before.loss) and list(model.state_dict()) == names
    model.train()
    assert not torch.equal(model(**batch).loss, before.loss)
    distiller.teacher = None
    hf.set_seed(3)
    without = model(**batch).loss
    distiller.detach()
    hf.set_seed(3)
    assert torch.equal(model(**batch).loss, without)


def test_accumulated_batches_of_a_language_model_weigh_as_one() -> None:
    """Labels in other numbers in each half, and num_items_in_batch as Trainer gives it."""
    model = binarize_model(hf.LlamaForCausalLM(small_llama()), quick()).eval()
    hf.set_seed(4)
    teacher = type(model)(model.config)
    ids = torch.randint(3, 60, (4, 8))
    labels = ids.clone()
    labels[0, 1:], labels[1, 3:] = -100, -100
    total = (labels[:, 1:] != -100).sum()
    Distiller(model, teacher, hidden=0.0)
    model.training = True  # the root alone: no dropout
    whole = model(input_ids=ids, labels=labels, num_items_in_batch=total).loss
    halves = [model(input_ids=ids[i], labels=labels[i], num_items_in_batch=total).loss for i in ([0, 1], [2, 3])]
    torch.testing.assert_close(halves[0] + halves[1], whole)
    with torch.no_grad():
        model.training = False
        mine, theirs = (m(input_ids=ids).logits.log_softmax(-1) for m in (model, teacher))
        own = model(input_ids=ids, labels=labels, num_items_in_batch=total).loss
    each = (theirs.exp() * (theirs - mine)).sum(-1)
    wanted = sum(each[i, t] for i in range(4) for t in range(7) if labels[i, t + 1] != -100) / total
    torch.testing.assert_close(whole.detach(), own + wanted)


def small_llama() -> hf.LlamaConfig:
    return hf.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )


def test_activation_checkpointing_gives_the_same_loss_and_gradients() -> None:
    results = []
    for recompute in (False, True):
        model = student()
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        Distiller(model, fine_tuned(), relations=1.0, embeddings=True)
        hf.set_seed(2)
        loss = model(**BERT.batch()).loss
        loss.backward()
        results.append((loss, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    assert torch.equal(results[0][0], results[1][0]) and same_tensors(results[0][1], results[1][1]) == []


def test_reentrant_checkpointing_is_refused() -> None:
    """What is inside of a block runs without gradients there, so that a loss of it would teach nothing."""
    model = student()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    Distiller(model, fine_tuned())
    model(**BERT.batch()).loss.backward()
    Distiller(model, fine_tuned(), relations=1.0)
    with pytest.raises(DistillationError, match="'use_reentrant': False"):
        model(**BERT.batch())


def test_a_deeper_teacher_is_compared_at_evenly_spaced_blocks() -> None:
    model, teacher = student(), fine_tuned(num_hidden_layers=6)
    distiller = Distiller(model, teacher)
    count = model.config.num_hidden_layers
    wanted = [f"bert.encoder.layer.{(i + 1) * 6 // count - 1}" for i in range(count)]
    assert distiller._teacher_blocks(teacher) == (wanted, ["bert.encoder.layer.0"])
    model(**BERT.batch()).loss.backward()


def test_what_cannot_be_compared_is_refused_by_name() -> None:
    batch = BERT.batch()
    with pytest.raises(DistillationError, match="blocks where the student has"):
        Distiller(student(), fine_tuned(num_hidden_layers=1))
    model = student()
    Distiller(model, fine_tuned(num_labels=5), hidden=0.0)
    with pytest.raises(DistillationError, match="same labels"):
        model(**batch)
    model = student()
    width = model.config.hidden_size * 2
    Distiller(model, fine_tuned(hidden_size=width), logits=0.0)
    with pytest.raises(DistillationError, match="same width"):
        model(**batch)
    model = student()
    Distiller(model, fine_tuned())
    with pytest.raises(DistillationError, match="return_dict=True"):
        model(**batch, return_dict=False)
    net = binarize_model(
        nn.Sequential(*(nn.Linear(4, 4) for _ in range(4))), quick(stages="module"), {"input": torch.randn(2, 4)}
    )
    with pytest.raises(DistillationError, match="hidden=0"):
        Distiller(net, None)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"hidden": -1.0}, "hidden=-1"),
        ({"logits": 0.0, "hidden": 0.0}, "all 0"),
        ({"temperature": 0.0}, "temperature"),
        ({"relations": -1.0}, "relations=-1"),
        ({"hidden": 0.0, "embeddings": True}, "embeddings=True"),
    ],
)
def test_bad_weights(options: dict[str, float], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        DistillationCallback(**options)
    with pytest.raises(ConfigError, match=word):
        Distiller(student(), None, **options)


def test_snapshot_is_the_model_before_anything_froze() -> None:
    model = student(end=1.0)
    progression = Progression(model, 10)
    progression.step(0)
    model(**BERT.batch())  # calibrates
    progression.step(4)
    copy = snapshot(model)
    assert all(layer.stage_state == "pending" for layer in binary_layers(copy).values())
    plain = BERT.build()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if k in plain.state_dict()})
    assert torch.equal(copy(**BERT.batch()).logits, plain.eval()(**BERT.batch()).logits)
    assert any(layer.stage_state != "pending" for layer in binary_layers(model).values())


# ---- inside Trainer ----


def rows() -> Dataset:
    batches = [BERT.batch(seed) for seed in range(12)]
    return Dataset.from_list([{k: v[i].tolist() for k, v in b.items()} for b in batches for i in range(4)])


def make_trainer(folder: Path, callback: Any, model: Any = None, **options: Any) -> Trainer:
    settings = {
        "max_steps": 12, "per_device_train_batch_size": 4, "logging_steps": 2, "save_steps": 8, "learning_rate": 1e-3,
        "disable_tqdm": True, "use_cpu": True, "report_to": "none", "seed": 3,
    }  # fmt: skip
    arguments = TrainingArguments(str(folder), **{**settings, **options})
    model = binarize_model(BERT.build(), quick(start=0.34, end=0.9)) if model is None else model
    return Trainer(model, arguments, train_dataset=rows(), callbacks=[StoMPPTrainerCallback(), callback])


def test_own_snapshot_and_resume(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "whole", DistillationCallback())
    trainer.train()
    history = [record for record in trainer.state.log_history if "loss" in record]
    assert ["stompp_hidden" in record for record in history] == [record["step"] > 4 for record in history]
    assert all(record["stompp_hidden"] > 0 for record in history[2:])
    assert Progression(trainer.model, 12).is_complete()
    assert get_plan(trainer.model.from_pretrained(tmp_path / "whole" / "_teacher")) == get_plan(trainer.model)

    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoint-12")
    again = make_trainer(tmp_path / "again", DistillationCallback())
    again.train(resume_from_checkpoint=str(tmp_path / "again" / "checkpoint-8"))
    assert same_tensors(again.model.state_dict(), trainer.model.state_dict()) == []
    noise = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos")
    kept = [[{k: v for k, v in r.items() if k not in noise} for r in t.state.log_history] for t in (trainer, again)]
    assert kept[0] == kept[1]

    shutil.rmtree(tmp_path / "again" / "_teacher")
    lost = make_trainer(tmp_path / "again", DistillationCallback())
    with pytest.raises(CheckpointError, match="teacher=PATH"):
        lost.train(resume_from_checkpoint=str(tmp_path / "again" / "checkpoint-8"))


def test_a_teacher_by_path_is_the_teacher_as_a_model(tmp_path: Path) -> None:
    fine_tuned().save_pretrained(tmp_path / "tuned")
    runs = []
    for teacher in (str(tmp_path / "tuned"), tmp_path / "tuned", fine_tuned()):
        trainer = make_trainer(tmp_path / "run", DistillationCallback(teacher), max_steps=4, save_strategy="no")
        trainer.train()
        runs.append(trainer.model.state_dict())
    assert same_tensors(runs[0], runs[1]) == [] and same_tensors(runs[0], runs[2]) == []
    assert not (tmp_path / "run" / "_teacher").exists()


@pytest.mark.parametrize("kind", ["trainer", "ours"])
def test_hidden_states_alone_leave_the_teachers_head(tmp_path: Path, kind: str) -> None:
    """The head has no gradient: neither weight decay nor rates of binary layers move it. Labels are not needed."""
    tuned = fine_tuned()
    tuned.save_pretrained(tmp_path / "tuned")
    model = binarize_model(type(tuned).from_pretrained(tmp_path / "tuned"), quick(end=0.9, pending_lr=0.5))
    callback = DistillationCallback(str(tmp_path / "tuned"), task=0.0, logits=0.0, hidden=1.0)
    trainer = make_trainer(tmp_path / "run", callback, model, weight_decay=0.5, save_strategy="no")
    trainer.train_dataset = rows().remove_columns("labels")
    if kind == "ours":
        trainer.optimizer = create_optimizer(model, trainer.args)
    trainer.train()
    assert Progression(trainer.model, 12).is_complete()
    after, head = trainer.model.state_dict(), ("bert.pooler.dense.", "classifier.")
    kept = {name: tensor for name, tensor in tuned.state_dict().items() if name.startswith(head)}
    assert len(kept) == 4 and same_tensors(kept, {name: after[name] for name in kept}) == []
    moved = "bert.encoder.layer.1.output.LayerNorm.weight"
    assert not torch.equal(after[moved], tuned.state_dict()[moved])
    assert ["stompp_task" in record for record in trainer.state.log_history if "loss" in record] == [False] * 6


def test_a_loss_that_trainer_leaves_aside_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="label_smoothing_factor"):
        make_trainer(tmp_path, DistillationCallback(fine_tuned()), label_smoothing_factor=0.1).train()
    trainer = make_trainer(tmp_path, DistillationCallback(fine_tuned()))
    trainer.compute_loss_func = lambda outputs, labels, **kwargs: outputs.logits.square().mean()
    with pytest.raises(DistillationError, match="compute_loss_func"):
        trainer.train()


def test_a_snapshot_at_step_0_is_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = binarize_model(BERT.build(), quick())
    make_trainer(tmp_path, DistillationCallback(), model, max_steps=2, save_strategy="no").train()
    assert "fine-tuned on this task" in caplog.text

"""What is saved loads, whoever saves it: shared configs, parts, wholes, wrappers, given state dicts, changed models."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import CASES, logits, quick, same_tensors, train
from safetensors.torch import load_file, load_model, save_model
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, BertConfig, CLIPConfig, CLIPModel

from stompp_hf import BinaryLayer, Progression, binarize_model, calibrate, get_plan, pack_model, restore_model
from stompp_hf.cli import main
from stompp_hf.errors import AlreadyBinarizedError, CheckpointError, ConfigError, NotBinarizedError
from stompp_hf.surgery.members import planned_models

BERT = CASES["bert"]
STEPS = 4
LAYER = "bert.encoder.layer.0.output.dense"


def finished(**options: Any) -> Any:
    model = binarize_model(BERT.build(), quick(**options))
    train(model, BERT, 0, STEPS, STEPS)
    return model


@pytest.fixture(scope="module")
def trained() -> Any:
    return finished()


@pytest.fixture()
def model(trained: Any) -> Any:
    return copy.deepcopy(trained)


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(folder, **options)


def assert_reloads(model: Any, folder: Path, **options: Any) -> Any:
    model.save_pretrained(folder, **options)
    again = type(model).from_pretrained(folder)
    assert torch.equal(logits(again, BERT.batch()), logits(model, BERT.batch()))
    return again


def is_plain(model: nn.Module) -> bool:
    return not any(isinstance(module, BinaryLayer) for module in model.modules())


# ---- configs ----


def test_a_config_is_copied_before_it_is_written_to() -> None:
    config = BERT.config()
    config.attn_implementation = "sdpa"
    model = AutoModelForSequenceClassification.from_config(config).to(torch.bfloat16)
    before, attention = model.config.to_dict(), model.config._attn_implementation
    shared = model.config
    binarize_model(model, quick(attention="binarize"))
    assert shared.to_dict() == before and shared._attn_implementation == attention
    held = {id(module.config) for module in model.modules() if hasattr(module, "config")}
    assert held == {id(model.config)} and id(shared) not in held  # one for the whole model, as before
    assert model.config.quantization_config.quant_method == "stompp"


def test_plain_models_of_a_shared_config_stay_plain(model: Any, tmp_path: Path) -> None:
    config = BertConfig(**{**BERT.config().to_dict(), "architectures": None})
    siblings = [transformers.BertForSequenceClassification(config) for _ in range(2)]
    binarize_model(siblings[0], quick())
    of_binary = type(model)(model.config)
    model.save_pretrained(tmp_path / "binary")
    of_file = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(tmp_path / "binary"))
    for number, plain in enumerate((siblings[1], of_binary, of_file)):
        again = assert_reloads(plain.eval(), tmp_path / str(number))
        assert is_plain(again) and "quantization_config" not in (tmp_path / str(number) / "config.json").read_text()
    assert not is_plain(assert_reloads(siblings[0], tmp_path / "first"))
    binarize_model(of_binary, quick(end=0.5))
    assert get_plan(assert_reloads(of_binary, tmp_path / "anew")).config.end == 0.5
    assert get_plan(assert_reloads(model, tmp_path / "as before")).config.end == quick().end


def test_a_live_config_loads_as_the_one_on_disk(model: Any, tmp_path: Path) -> None:
    for kind in ("training", "packed"):
        if kind == "packed":
            pack_model(model)
        model.save_pretrained(tmp_path / kind)
        again = load(tmp_path / kind, config=model.config)
        assert torch.equal(logits(again, BERT.batch()), logits(model, BERT.batch()))
        assert torch.equal(
            logits(load(tmp_path / kind, config=again.config), BERT.batch()), logits(again, BERT.batch())
        )


def test_a_config_that_knows_of_no_binary_layers_is_refused(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"holds binary layers .*AutoConfig.from_pretrained"):
        load(tmp_path, config=BERT.config())
    with pytest.raises(CheckpointError, match="holds binary layers"):
        transformers.BertModel.from_pretrained(tmp_path, config=BERT.config())
    again, info = load(tmp_path, output_loading_info=True)
    assert not is_plain(again) and info["unexpected_keys"] == set()


# ---- a model inside another ----


def clip() -> Any:
    small: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    small["num_attention_heads"] = 2
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    text = {**small, **tokens, "vocab_size": 100, "max_position_embeddings": 16}
    return CLIPModel(CLIPConfig(text_config=text, vision_config={**small, "image_size": 32, "patch_size": 8})).eval()


def views(model: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    ids, pixels = torch.randint(3, 100, (3, 6), generator=generator), torch.randn(2, 3, 32, 32, generator=generator)
    with torch.no_grad():
        result: torch.Tensor = model.eval()(input_ids=ids, pixel_values=pixels).logits_per_image
    return result


def commit(model: Any) -> None:
    """Every plan inside at its end, with values from one batch."""
    roots = planned_models(model)
    for root in roots.values():
        Progression(root, 1).step(1)
    ids, pixels = {"input_ids": torch.arange(3, 9)[None]}, {"pixel_values": torch.randn(1, 3, 32, 32)}
    inputs = {"": {**ids, **pixels}, "text_model": ids, "vision_model": pixels}
    for name, root in roots.items():
        calibrate(root, [inputs[name]])


@pytest.mark.parametrize("towers", [["text_model"], ["text_model", "vision_model"]])
def test_towers_that_were_binarized_apart(towers: list[str], tmp_path: Path) -> None:
    model = clip()
    for tower in towers:
        binarize_model(getattr(model, tower), quick())
    model.save_pretrained(tmp_path / "begun")
    begun = CLIPModel.from_pretrained(tmp_path / "begun")
    assert torch.equal(views(begun), views(model)) and list(planned_models(begun)) == towers
    commit(model)
    for kind in ("training", "packed"):
        if kind == "packed":
            pack_model(model)
        model.save_pretrained(tmp_path / kind)
        again = CLIPModel.from_pretrained(tmp_path / kind)
        assert torch.equal(views(again), views(model)) and not torch.equal(views(again), views(begun))
        live = CLIPModel.from_pretrained(tmp_path / kind, config=again.config)
        assert torch.equal(views(live), views(model))
        for tower in towers:
            assert get_plan(getattr(again, tower)) == get_plan(getattr(model, tower))
    with pytest.raises(CheckpointError, match="holds binary layers"):  # its config is a part that tells of nothing
        transformers.CLIPTextModel.from_pretrained(tmp_path / "training")
    restore_model(again).save_pretrained(tmp_path / "plain")
    assert is_plain(CLIPModel.from_pretrained(tmp_path / "plain"))


def test_the_commands_know_of_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = clip()
    for tower in ("text_model", "vision_model"):
        binarize_model(getattr(model, tower), quick())
    commit(model)
    model.save_pretrained(tmp_path / "trained")
    assert main(["pack", str(tmp_path / "trained"), str(tmp_path / "packed")]) == 0
    assert "CLIPModel: 24 layers binary (weights_and_activations), 4 stages, packed" in capsys.readouterr().out
    assert torch.equal(views(CLIPModel.from_pretrained(tmp_path / "packed")), views(model))
    assert "`text_model.encoder.layers.0`" in (tmp_path / "packed" / "README.md").read_text()


def test_a_part_alone(tmp_path: Path) -> None:
    """A tower of a binary model is saved with its part of the plan, once nothing depends on the rest any more."""
    model = binarize_model(clip(), quick())
    names = [entry.name for entry in get_plan(model).entries]
    assert {name.partition(".")[0] for name in names} == {"text_model", "vision_model"}
    with pytest.raises(CheckpointError, match=r"is a part \(vision_model\) of a model whose training has not ended"):
        model.vision_model.save_pretrained(tmp_path / "early")
    assert not (tmp_path / "early").exists()
    commit(model)
    model.vision_model.save_pretrained(tmp_path / "vision")
    again = transformers.CLIPVisionModel.from_pretrained(tmp_path / "vision")
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(pixels).pooler_output, model.vision_model(pixels).pooler_output)
    expected = [name.removeprefix("vision_model.") for name in names if name.startswith("vision_model.")]
    assert [entry.name for entry in get_plan(again).entries] == expected
    model.save_pretrained(tmp_path / "whole")
    assert torch.equal(views(CLIPModel.from_pretrained(tmp_path / "whole")), views(model))


def test_the_base_model_of_a_head(tmp_path: Path) -> None:
    """All of the plan is in it: it can be saved at any time, and goes on as the whole would."""
    model = binarize_model(BERT.build(), quick())
    train(model, BERT, 0, 2, STEPS)
    model.bert.save_pretrained(tmp_path / "base")
    assert "quantization_config" in (tmp_path / "base" / "config.json").read_text()
    again = transformers.BertModel.from_pretrained(tmp_path / "base")
    inputs = {name: value for name, value in BERT.batch().items() if name != "labels"}
    with torch.no_grad():
        assert torch.equal(again.eval()(**inputs)[0], model.bert.eval()(**inputs)[0])
    assert get_plan(again).fingerprint("bert") == get_plan(model).fingerprint("bert")
    assert assert_reloads(model, tmp_path / "head").config.quantization_config.modules[0]["name"].startswith("bert.")


# ---- wrappers ----


class Wrapper(nn.Module):
    """As sentence-transformers', SetFit's and many own heads have it."""

    def __init__(self, inner: nn.Module, head: bool = False) -> None:
        super().__init__()
        self.auto_model = inner
        self.projection = nn.Linear(3, 3) if head else nn.Identity()

    def forward(self, **inputs: Any) -> Any:
        outputs = self.auto_model(**inputs)
        outputs["logits"] = self.projection(outputs["logits"])
        return outputs


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("with_inputs", [True, False])
def test_a_plan_belongs_to_the_model_inside_a_wrapper(depth: int, with_inputs: bool, tmp_path: Path) -> None:
    inner = BERT.build()
    wrapper: Any = inner
    for _ in range(depth):
        wrapper = Wrapper(wrapper, head=True)
    inputs = {name: value for name, value in BERT.batch().items() if name != "labels"} if with_inputs else None
    assert binarize_model(wrapper, quick(), example_inputs=inputs) is wrapper
    assert get_plan(wrapper) is get_plan(inner)
    assert get_plan(inner).entries == get_plan(binarize_model(BERT.build(), quick())).entries
    train(wrapper, BERT, 0, STEPS, STEPS)
    assert_reloads(inner, tmp_path)
    assert binarize_model(wrapper, quick(), example_inputs=inputs) is wrapper
    assert is_plain(restore_model(wrapper)) and not hasattr(inner.config, "quantization_config")


def test_what_is_no_module_names_the_modules_in_it() -> None:
    class Holder:
        def __init__(self) -> None:
            self.model_body, self.model_head = BERT.build(), "a head of scikit-learn"

    with pytest.raises(ConfigError, match=r"Holder is none; of it, model_body can .*binarize_model\(model.model_body"):
        binarize_model(Holder(), quick())
    with pytest.raises(ConfigError, match="a str is none; give it the model itself"):
        binarize_model("bert-base-uncased", quick())


# ---- models that were changed after binarize_model ----


def replace(model: Any) -> None:
    model.bert.encoder.layer[0].output.dense = nn.Linear(48, 32)


def remove(model: Any) -> None:
    model.bert.encoder.layer = model.bert.encoder.layer[:1]
    model.config.num_hidden_layers = 1


def borrow(model: Any) -> None:
    model.classifier = finished().bert.encoder.layer[0].attention.self.query


def widen(model: Any) -> None:
    layer = model.get_submodule(LAYER)
    layer.weight.data = torch.randn(33, 48)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replace, f"{LAYER} should be a binary layer and is a Linear: it was replaced"),
        (remove, r"bert.encoder.layer.1.*should be a binary layer and is gone: it was removed"),
        (borrow, r"classifier is binary, and no plan of this BertForSequenceClassification names it"),
        (widen, rf"not saved.*{LAYER} has a weight of shape \[33, 48\], and a scale of size 32: it was resized"),
    ],
)
def test_a_changed_model_is_refused_before_anything_is_written(
    change: Any, message: str, model: Any, tmp_path: Path
) -> None:
    change(model)
    with pytest.raises((CheckpointError, NotBinarizedError), match=message):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    if change in (replace, remove):
        assert is_plain(restore_model(model))


def test_resized_embeddings(tmp_path: Path) -> None:
    model = finished(embeddings="binarize")
    model.resize_token_embeddings(120)
    with pytest.raises((CheckpointError, NotBinarizedError), match="word_embeddings"):
        model.save_pretrained(tmp_path / "out")
    real = finished()
    real.resize_token_embeddings(120)
    assert_reloads(real, tmp_path / "real")


# ---- other ways to save ----


def test_a_given_state_dict_is_what_is_saved_and_checked(model: Any, tmp_path: Path) -> None:
    average = {name: value.clone() for name, value in model.state_dict().items()}
    average[f"{LAYER}.weight"].neg_()
    model.save_pretrained(tmp_path / "average", state_dict=dict(average))
    again = load(tmp_path / "average")
    assert same_tensors(again.state_dict(), average) == []
    assert not torch.equal(logits(again, BERT.batch()), logits(model, BERT.batch()))
    state = f"{LAYER}.stompp_state"
    broken: dict[str, dict[str, torch.Tensor]] = {
        f"{LAYER}.activation_low is missing": {n: t for n, t in average.items() if n != f"{LAYER}.activation_low"},
        "classifier.bias is missing": {n: t for n, t in average.items() if n != "classifier.bias"},
        "stompp_state is F in .* must be of whole numbers": {n: t.half() for n, t in average.items()},
        f"{LAYER}.weight has the shape": {**average, f"{LAYER}.weight": torch.zeros(3, 3)},
        f"holds {LAYER}.weight_bits": {**average, f"{LAYER}.weight_bits": torch.zeros(3, dtype=torch.uint8)},
        f"and {LAYER} at step 3 of 4": {**average, state: average[state] - torch.tensor([0, 0, 0, 0, 1, 0])},
    }
    for message, tensors in broken.items():
        with pytest.raises(CheckpointError, match=f"BertForSequenceClassification is not saved.*{message}"):
            model.save_pretrained(tmp_path / "broken", state_dict=tensors)
    assert not (tmp_path / "broken").exists()


def test_shards_devices_and_other_savers(model: Any, tmp_path: Path) -> None:
    expected = logits(model, BERT.batch())
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    for options in ({}, {"device_map": "cpu"}, {"device_map": {"": "cpu"}}):
        assert torch.equal(logits(load(tmp_path / "shards", **options), BERT.batch()), expected)
    save_model(model, str(tmp_path / "model.safetensors"))
    other = binarize_model(BERT.build(seed=3), quick())
    load_model(other, tmp_path / "model.safetensors")
    assert same_tensors(other.state_dict(), model.state_dict()) == []
    assert json.loads((tmp_path / "shards" / "config.json").read_text())["quantization_config"]["save"]
    assert not hasattr(model, "hf_quantizer") or model.hf_quantizer is None
    assert not hasattr(model.config.quantization_config, "save")


# ---- models whose checkpoints transformers converts ----


@pytest.mark.parametrize("kind", ["molmo2_text", "mixtral", "gpt_oss"])
def test_models_whose_checkpoints_are_converted(kind: str, tmp_path: Path) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 32}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **sizes, num_local_experts=4, num_experts_per_tok=2)
    plain = transformers.AutoModel.from_config(config).float().eval()
    ids = torch.randint(0, 64, (2, 6))

    def hidden(model: Any) -> torch.Tensor:
        with torch.no_grad():
            result: torch.Tensor = model(ids).last_hidden_state
        return result

    plain.save_pretrained(tmp_path / "plain")  # in the original format, which is converted
    loaded = transformers.AutoModel.from_pretrained(tmp_path / "plain")
    assert torch.equal(hidden(loaded), hidden(plain))
    model = binarize_model(loaded, quick())
    model.save_pretrained(tmp_path / "begun")
    assert torch.equal(hidden(transformers.AutoModel.from_pretrained(tmp_path / "begun")), hidden(plain))
    Progression(model, 1).step(1)
    calibrate(model, [{"input_ids": ids}])
    for name in ("training", "packed"):
        if name == "packed":
            pack_model(model)
        model.save_pretrained(tmp_path / name)
        assert load_file(tmp_path / name / "model.safetensors").keys() == model.state_dict().keys()
        assert torch.equal(hidden(transformers.AutoModel.from_pretrained(tmp_path / name)), hidden(model))
    restore_model(model).save_pretrained(tmp_path / "restored")
    assert torch.equal(hidden(transformers.AutoModel.from_pretrained(tmp_path / "restored")), hidden(model))


# ---- a script that takes its own output ----


def test_a_model_that_is_binary_by_the_same_options_is_returned(
    model: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model.save_pretrained(tmp_path)
    again, before = load(tmp_path), logits(model, BERT.batch())
    caplog.set_level("INFO", "stompp_hf")
    assert binarize_model(again, quick()) is again and "binary already, by the same options" in caplog.text
    assert torch.equal(logits(again, BERT.batch()), before)
    packed = pack_model(again)
    assert binarize_model(packed, quick()) is packed
    with pytest.raises(AlreadyBinarizedError, match="schedule is 'cubic', not 'linear'; refresh_rate is 2, not 3"):
        binarize_model(model, quick(schedule="linear", refresh_rate=3))
    with pytest.raises(AlreadyBinarizedError, match="a part of this model has binary layers already"):
        binarize_model(model.bert, quick())
    whole = clip()
    binarize_model(whole.text_model, quick())
    with pytest.raises(AlreadyBinarizedError, match=r"a part of this model \(text_model\) has binary layers already"):
        binarize_model(whole, quick())


def test_loading_gives_no_advice(model: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model.save_pretrained(tmp_path / "training")
    pack_model(model).save_pretrained(tmp_path / "packed")
    caplog.clear()
    for kind in ("training", "packed"):
        load(tmp_path / kind)
    assert not [record for record in caplog.records if record.name.startswith("stompp_hf")]

"""The image classification example: its models, its config files, and runs of it as a user starts them."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
import torchvision_ops  # noqa: F401
import yaml
from image_files import cifar_file, imagenet_stand_in, odd_images
from launching import run_to_its_end
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    MobileNetV2Config,
    ResNetConfig,
    ViTConfig,
    ViTForImageClassification,
)

from stompp_hf import StoMPPConfig, get_plan

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "examples" / "configs"
sys.path.insert(0, str(ROOT / "examples"))
import image_data  # noqa: E402
import run_image_classification as example  # noqa: E402
from image_data import DataArguments, load_task  # noqa: E402
from image_model import ModelArguments, load_config  # noqa: E402
from small_images import small_image_config  # noqa: E402

RECIPES = sorted(path for path in CONFIGS.glob("*.yaml") if path.stem.endswith(("_paper", "_modern")))
METHODS = sorted({*CONFIGS.glob("*.yaml")} - {*RECIPES, *CONFIGS.glob("glue_*.yaml"), *CONFIGS.glob("clm_*.yaml")})
RESNET = ("--config_name", "resnet", "--config_overrides")
RESNET = (*RESNET, "depths=[1,1],hidden_sizes=[8,16],embedding_size=8,layer_type=basic")
VIT = ("--config_name", "vit", "--config_overrides")
VIT = (*VIT, "hidden_size=16,num_hidden_layers=2,num_attention_heads=2,intermediate_size=32,patch_size=16")
QUICK = ("--dataloader_num_workers", "0", "--refresh_rate", "1", "--disable_tqdm", "True", "--use_cpu", "True")


def launch(*words: str, processes: int = 1, path: Sequence[Path] = ()) -> str:
    """Run the example through accelerate, and return what it printed."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--multi_gpu"] if processes > 1 else ["--cpu"]
    environment = {
        **os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(map(str, (ROOT, *path))),
        "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    words = ("examples/run_image_classification.py", *words)
    result = run_to_its_end([*command, *words], cwd=ROOT, env=environment)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout


def here(monkeypatch: pytest.MonkeyPatch, *words: str) -> dict[str, Any]:
    """Run the example in this process, and return its metrics."""
    monkeypatch.setattr(sys, "argv", ["run_image_classification.py", *words])
    return example.main()


# ---- models ----


@pytest.mark.parametrize(
    "config",
    [ResNetConfig(depths=[1, 1], hidden_sizes=[8, 16], embedding_size=8), MobileNetV2Config(depth_multiplier=0.1)],
)
def test_small_image_models_keep_the_resolution(tmp_path: Path, config: Any) -> None:
    config = small_image_config(config)
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(AutoModelForImageClassification.from_config(config).eval())
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
    images = torch.randn(2, 3, 32, 32)
    output = models[0](images, output_hidden_states=True)
    assert output.hidden_states[0].shape[-1] == 32
    models[0].save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert type(again) is type(models[0]) and torch.equal(again(images).logits, output.logits)


def test_small_image_stem_is_for_two_models() -> None:
    with pytest.raises(ValueError, match="resnet and mobilenet_v2, not vit"):
        small_image_config(ViTConfig())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_files(path: Path) -> None:
    """Each file alone is a whole run, and its model can be built."""
    model_args, data_args, args, stompp = example.parse([str(path)])
    dataset, rest = path.stem.split("_", 1)
    model, recipe = rest.rsplit("_", 1)
    assert args.output_dir == f"runs/{path.stem}" and args.do_train and args.do_eval
    assert (args.per_device_train_batch_size, data_args.source, model_args.method) == (256, "hub", "stompp")
    if recipe == "paper":
        sgd = (args.optim, args.optim_args, args.learning_rate, args.lr_scheduler_type, args.weight_decay)
        assert sgd == ("sgd", "momentum=0.9", 0.1, "constant", 0.0)
        assert stompp == StoMPPConfig.paper()
    else:
        assert (args.optim, args.lr_scheduler_type, args.label_smoothing_factor) == ("adamw_torch", "cosine", 0.1)
        assert stompp.weight_scale == "channel"
    small = dataset == "cifar10"
    config = load_config(model_args, [str(i) for i in range(10 if small else 1000)])
    assert config.model_type.startswith("small_image_") == small
    assert (config.num_labels, data_args.image_size) == ((10, 32) if small else (1000, 224))
    with torch.device("meta"):
        network = AutoModelForImageClassification.from_config(config)
    millions = {"resnet18": 11.2, "resnet34": 21.3, "resnet50": 23.5, "mobilenet_v2": 2.2}[model]
    backbone = sum(p.numel() for name, p in network.named_parameters() if "classifier" not in name)
    assert backbone == pytest.approx(millions * 1e6, rel=0.02)


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.stem)
def test_method_files_come_after_a_recipe(path: Path) -> None:
    model_args, _, _, stompp = example.parse([str(RECIPES[0]), str(path)])
    options = yaml.safe_load(path.read_text())
    assert model_args.method == options["method"]
    for name in ("binarize", "frozen_gradient"):
        assert getattr(stompp, name) == options.get(name, getattr(stompp, name))
    if path.stem != "full_precision":
        assert stompp.binary_activations == path.stem.startswith("bnn")


def test_what_comes_later_wins(tmp_path: Path) -> None:
    (tmp_path / "more.json").write_text(
        '{"seed": 7, "learning_rate": 0.5, "target_modules": ["a", "b"], "run_name": null}'
    )
    recipe = str(CONFIGS / "cifar10_resnet18_paper.yaml")
    _, _, args, stompp = example.parse([recipe, str(tmp_path / "more.json"), "--learning_rate=0.2", "--end", "0.5"])
    assert (args.seed, args.learning_rate, args.optim, stompp.end) == (7, 0.2, "sgd", 0.5)
    assert stompp.target_modules == ["a", "b"] and stompp.weight_scale == "none"
    assert example.parse([recipe, "--preset", "default"])[3] == StoMPPConfig()


def test_options_that_make_no_sense(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no depht"):
        load_config(ModelArguments(config_name="resnet", config_overrides="depht=[1]"), ["a", "b"])
    with pytest.raises(ValueError, match="training from scratch"):
        ModelArguments(model_name_or_path="some", small_image_stem=True)
    with pytest.raises(ValueError, match="folders"):
        DataArguments(train_file="a", train_dir="b")
    with pytest.raises(ValueError, match="--streaming needs"):
        DataArguments(streaming=True)
    file = cifar_file(tmp_path / "data.parquet", 4, metadata=False)
    with pytest.raises(ValueError, match="add --num_labels"):
        load_task(DataArguments(train_file=file, streaming=True), str(tmp_path))


def test_accuracy_through_evaluate(monkeypatch: pytest.MonkeyPatch) -> None:
    import evaluate

    class Metric:
        def compute(self, predictions: Any, references: Any) -> dict[str, float]:
            return {"accuracy": 0.25}

    hub = DataArguments(dataset_name="some/data")
    monkeypatch.setattr(evaluate, "load", lambda name: Metric())
    assert example.accuracy_function(hub)([0], [0]) == 0.25

    def unreachable(name: str) -> None:
        raise ConnectionError

    monkeypatch.setattr(evaluate, "load", unreachable)
    assert example.accuracy_function(hub)([0, 1], [0, 0]) == 0.5


# ---- runs ----


def test_embedded_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here(monkeypatch, *("--output_dir", str(tmp_path), "--max_steps", "12", "--config_overrides", RESNET[-1], *QUICK))
    printed = capsys.readouterr().out
    for method, layers in zip(example.METHODS, ("0 of 4", *["4 of 4"] * 3), strict=True):
        assert any(line.startswith(f"{method} ") and f" {layers} " in line for line in printed.splitlines()), printed
    assert "logits equal" in printed
    assert json.loads((tmp_path / "comparison.json").read_text()).keys() == example.METHODS.keys()
    card = (tmp_path / "stompp_ste" / "README.md").read_text()
    assert "- 1-bit" in card and "import stompp_hf" in card and "4 layers, in " in card
    AutoImageProcessor.from_pretrained(tmp_path / "stompp_ste")


def test_cifar_recipe_with_another_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [cifar_file(tmp_path / f"{count}.parquet", count, metadata=False) for count in (40, 20)]
    metrics = here(
        monkeypatch, *(str(CONFIGS / name) for name in ("cifar10_resnet18_paper.yaml", "bwn_vanilla_ste.yaml")),
        *("--train_file", files[0], "--validation_file", files[1], "--output_dir", str(tmp_path / "run")),
        *("--per_device_train_batch_size", "8", "--num_train_epochs", "1", "--cache_dir", str(tmp_path)),
        *(*RESNET, *QUICK),
    )  # fmt: skip
    assert 0 <= metrics["eval_accuracy"] <= 1 and metrics["train_samples"] == 40
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "run")
    options = get_plan(model).config
    assert (options.binarize, options.weight_scale, options.end) == ("weights", "none", 0.0)
    assert model.config.model_type == "small_image_resnet" and model.config.id2label[9] == "9"


@pytest.mark.parametrize("streaming", [True, False])
def test_imagenet_recipe_on_a_stand_in(tmp_path: Path, streaming: bool) -> None:
    """The shipped file for 20 steps: streamed in one process, and in two."""
    train, validation = imagenet_stand_in(tmp_path)
    printed = launch(
        str(CONFIGS / "imagenet_resnet50_paper.yaml"),
        *("--train_file", train, "--validation_file", validation, "--cache_dir", str(tmp_path / "cache")),
        *("--max_steps", "20", "--per_device_train_batch_size", "1" if streaming else "4", "--image_size", "64"),
        *("--output_dir", str(tmp_path / "run"), "--eval_strategy", "no", "--save_strategy", "no"),
        *("--streaming", str(streaming), *(RESNET if streaming else VIT), *QUICK),
        processes=1 if streaming else 2,
    )
    assert "fully binary (weights and activations)" in printed
    config = AutoConfig.from_pretrained(tmp_path / "run")
    assert len(config.id2label) == 1000 and config.id2label[999] == "class 999"
    results = json.loads((tmp_path / "run" / "all_results.json").read_text())
    assert 0 <= results["eval_accuracy"] <= 1


def test_fine_tuning_a_checkpoint_and_resuming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a tiny ViT with its image processor; resumed in mid-epoch, augmentation included, it ends the same."""
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    start, out = tmp_path / "start", tmp_path / "run"
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=4, num_labels=10)).save_pretrained(start)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(start)
    file = cifar_file(tmp_path / "data.parquet", 24, metadata=True)
    words = [
        *(
            "--model_name_or_path",
            str(start),
            "--train_file",
            file,
            "--validation_file",
            file,
            "--do_train",
            "--do_eval",
        ),
        *(
            "--output_dir",
            str(out),
            "--per_device_train_batch_size",
            "4",
            "--num_train_epochs",
            "2",
            "--save_steps",
            "9",
        ),
        *("--cache_dir", str(tmp_path), "--frozen_gradient", "zero", "--label_smoothing_factor", "0.1", *QUICK),
    ]
    whole = here(monkeypatch, *words)
    weights = AutoModelForImageClassification.from_pretrained(out).state_dict()
    (out / "checkpoint-12").rename(tmp_path / "later")
    again = here(monkeypatch, *words, "--resume_from_checkpoint", "True")
    assert whole["eval_loss"] == again["eval_loss"]
    resumed = AutoModelForImageClassification.from_pretrained(out)
    assert all(torch.equal(weights[name], tensor) for name, tensor in resumed.state_dict().items())
    assert resumed.config.id2label[3] == "class 3" and resumed.config.image_size == 16


def test_a_run_in_full_precision_is_a_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = str(tmp_path / "real"), str(tmp_path / "binary")
    words = ("--max_steps", "6", "--do_train", *QUICK)
    here(monkeypatch, *RESNET, "--method", "full_precision", "--output_dir", first, *words)
    here(monkeypatch, "--model_name_or_path", first, "--output_dir", second, *words)
    for folder, kind in ((first, "nothing"), (second, "weights_and_activations")):
        assert get_plan(AutoModelForImageClassification.from_pretrained(folder)).config.binarize == kind


def test_accumulated_batches_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal batches give the gradient of one of them: Trainer must not think that the model divides the loss."""
    rows = {"image": [odd_images()["rgb"]] * 64, "label": [0] * 64}
    file = str(tmp_path / "data.parquet")
    pyarrow.parquet.write_table(pyarrow.table(rows), file)
    norms = []
    for size, times in ((16, 1), (16, 4)):
        here(
            monkeypatch, *RESNET, "--train_file", file, "--validation_file", file, "--do_train", "--image_size", "32",
            *("--method", "full_precision", "--max_steps", "1", "--logging_steps", "1", "--cache_dir", str(tmp_path)),
            *("--per_device_train_batch_size", str(size), "--gradient_accumulation_steps", str(times)),
            *("--num_labels", "2", "--augmentation", "none"),
            *("--output_dir", str(tmp_path / "run"), *QUICK),
        )  # fmt: skip
        history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
        norms.append(history[0]["grad_norm"])
    assert norms[1] == pytest.approx(norms[0], rel=0.01)  # 4 times as large, if it did


def test_stages_are_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here(
        monkeypatch, "--output_dir", str(tmp_path), "--method", "stompp", "--max_steps", "12",
        *("--evaluate_stages", "True", "--config_overrides", RESNET[-1], *QUICK),
    )  # fmt: skip
    printed = capsys.readouterr().out
    for frozen in range(1, 5):
        assert f"{frozen} of 4 stages frozen, accuracy" in printed


def test_freezing_stops_where_accuracy_falls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here(
        monkeypatch, "--output_dir", str(tmp_path), "--method", "stompp", "--max_steps", "12", "--stop_drop", "0",
        *("--stop_reference", "2", "--evaluate_stages", "True", "--config_overrides", RESNET[-1], *QUICK),
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert "with stage 1 accuracy" in printed and "1 of 4 stages frozen" not in printed


@pytest.mark.timm
def test_timm_checkpoint(tmp_path: Path) -> None:
    """A local checkpoint in timm's layout, through transformers' wrapper, with torchvision's augmentation."""
    timm = pytest.importorskip("timm")
    from safetensors.torch import save_file

    assert image_data.torchvision_transforms() is not None
    model = timm.create_model("resnet18", num_classes=1000)
    start = tmp_path / "timm_resnet18"  # the name is how transformers knows timm's layout
    start.mkdir()
    cfg = {"input_size": [3, 64, 64], "crop_pct": 0.9, "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
    config = {"architecture": "resnet18", "num_classes": 1000, "num_features": 512, "pretrained_cfg": cfg}
    (start / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), start / "model.safetensors", {"format": "pt"})
    (tmp_path / "sitecustomize.py").write_text("import torchvision_ops")  # in accelerate's processes too
    train, validation = imagenet_stand_in(tmp_path)
    printed = launch(
        *("--model_name_or_path", str(start), "--train_file", train, "--validation_file", validation),
        *("--do_train", "--do_eval", "--max_steps", "20", "--per_device_train_batch_size", "4"),
        *("--cache_dir", str(tmp_path / "cache"), "--output_dir", str(tmp_path / "run"), *QUICK),
        path=[tmp_path, ROOT / "tests"],
    )
    assert "fully binary (weights and activations)" in printed
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "run")
    assert type(again).__name__ == "TimmWrapperForImageClassification" and len(again.config.id2label) == 1000

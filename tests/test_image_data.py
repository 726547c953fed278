"""The data of the image classification example: files of all kinds, augmentation, columns, folders, streams."""

import importlib
import io
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from image_files import cifar_file, odd_images
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))
import image_data  # noqa: E402
from image_data import DataArguments, Pixels, collate, load_task, prepare, to_image  # noqa: E402


def test_odd_images_become_upright_rgb() -> None:
    for kind, file in odd_images().items():
        for form in (file, {"bytes": file, "path": None}, Image.open(io.BytesIO(file))):
            image = to_image(form)
            assert (image.mode, image.size) == ("RGB", (40, 20)), kind
            pixels = np.array(image)
            assert pixels[10, 3].max() < 30, kind
            grey = kind in ("grey", "16 bits")
            assert np.abs(pixels[10, 30] - np.array([76, 76, 76] if grey else [254, 0, 0])).max() < 30, (
                kind,
                pixels[10, 30],
            )


def test_arrays_become_images(tmp_path: Path) -> None:
    colours = np.arange(3 * 4 * 4, dtype=np.uint8).reshape(3, 4, 4)
    for form in (colours.reshape(-1), colours, colours.transpose(1, 2, 0), colours.tolist()):
        assert np.array_equal(np.array(to_image(form)).transpose(2, 0, 1), colours)
    assert np.array_equal(np.array(to_image(colours[0].reshape(-1)))[..., 1], colours[0])
    with pytest.raises(ValueError, match="neither one nor three channels"):
        to_image(np.zeros(7, dtype=np.uint8))
    (tmp_path / "image.png").write_bytes(odd_images()["rgb"])
    assert to_image({"bytes": None, "path": str(tmp_path / "image.png")}).size == (40, 20)


# ---- augmentation ----


@pytest.mark.parametrize("augmentation", ["crop", "shift", "none"])
def test_augmentation_is_a_function_of_seed_epoch_and_index(tmp_path: Path, augmentation: str) -> None:
    file = cifar_file(tmp_path / "data.parquet", 20, metadata=True)
    args = DataArguments(train_file=file, validation_file=file, augmentation=augmentation)
    task = load_task(args, str(tmp_path))

    def images(workers: int, epoch: int, seed: int = 0, split: str = "train") -> torch.Tensor:
        data = prepare(task, args, Pixels(32, 32), seed)[split]
        loader = torch.utils.data.DataLoader(data, batch_size=8, collate_fn=collate, num_workers=workers)
        data.set_epoch(epoch)
        return torch.cat([batch["pixel_values"] for batch in loader])

    first = images(0, 0)
    assert first.shape == (20, 3, 32, 32) and first.dtype == torch.float32
    assert torch.equal(first, images(2, 0))
    random = augmentation != "none"
    assert torch.equal(first, images(0, 1)) != random
    assert torch.equal(images(0, 1), images(0, 0, seed=1)) != random
    plain = images(0, 0, split="validation")
    assert torch.equal(plain, images(2, 5, seed=3, split="validation")) and torch.equal(first, plain) != random


def test_augmented_images_stay_in_bounds() -> None:
    image = to_image(odd_images()["rgb"])
    torch.manual_seed(0)
    for _ in range(50):
        assert image_data.random_resized_crop(image, 8).size == (8, 8)
    square = image_data.center_crop(image, 20, 16)
    assert square.size == (16, 16) and np.array(square).min() >= 0
    moved = {np.array(image_data.random_shift(square, 2)).tobytes() for _ in range(200)}
    assert len(moved) <= 25


@pytest.mark.parametrize(
    ("kind", "options", "size", "resize"),
    [
        ("vit.image_processing_pil_vit.ViTImageProcessorPil", {}, 224, 224),
        ("convnext.image_processing_pil_convnext.ConvNextImageProcessorPil", {}, 384, 384),
        ("convnext.image_processing_pil_convnext.ConvNextImageProcessorPil",
         {"size": {"shortest_edge": 224}, "crop_pct": 0.875}, 224, 256),
        ("mobilenet_v2.image_processing_pil_mobilenet_v2.MobileNetV2ImageProcessorPil", {}, 224, 256),
    ],
)  # fmt: skip
def test_pixels_agree_with_the_image_processor(kind: str, options: dict[str, Any], size: int, resize: int) -> None:
    module, _, name = kind.rpartition(".")
    processor = getattr(importlib.import_module(f"transformers.models.{module}"), name)(**options)
    pixels = Pixels.of_processor(processor)
    assert (pixels.size, pixels.resize) == (size, resize)
    gradient = np.linspace(0, 255, 300 * 300 * 3).reshape(300, 300, 3).astype(np.uint8)
    image = Image.fromarray(gradient)
    wanted = torch.as_tensor(processor(image, return_tensors="pt")["pixel_values"][0])
    assert (image_data.Transform(pixels)(image) - wanted).abs().max() < 0.05


# ---- data sets ----


def test_columns_and_labels_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With features and without, whole and streamed, CIFAR-100's two columns, labels that are words, pixel columns."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)  # 5 seconds for each shuffled stream
    cache = str(tmp_path / "cache")
    for metadata in (True, False):
        file = cifar_file(tmp_path / f"{metadata}.parquet", 20, metadata, "fine_label")
        task = load_task(DataArguments(train_file=file, max_train_samples=12, train_val_split=0.25), cache)
        assert (task.image, task.label, len(task.labels)) == ("img", "fine_label", 10)
        assert {name: len(rows) for name, rows in task.data.items()} == {"train": 12, "validation": 5}
        args = DataArguments(train_file=file, validation_file=file, streaming=True, num_labels=10, max_eval_samples=3)
        task = load_task(args, cache)
        data = prepare(task, args, Pixels(32, 32), 0)
        assert [len(list(data[split])) for split in ("train", "validation")] == [20, 3]
        assert sorted(example["labels"] for example in data["train"]) == sorted([*range(10)] * 2)
    pixels = {"pixels": np.zeros((4, 48), dtype=np.uint8).tolist(), "label": ["b", "a", "b", "c"]}
    pyarrow.parquet.write_table(pyarrow.table(pixels), tmp_path / "flat.parquet")
    args = DataArguments(train_file=str(tmp_path / "flat.parquet"), validation_file=str(tmp_path / "flat.parquet"))
    task = load_task(args, cache)
    batch = collate([*prepare(task, args, Pixels(4, 4), 0)["validation"]])
    assert task.labels == ["a", "b", "c"] and batch["labels"].tolist() == [1, 0, 1, 2]
    assert batch["pixel_values"].shape == (4, 3, 4, 4)


def test_image_folder(tmp_path: Path) -> None:
    for label in ("cat", "dog"):
        (tmp_path / "train" / label).mkdir(parents=True)
        for index, file in enumerate(odd_images().values()):
            (tmp_path / "train" / label / f"{index}.png").write_bytes(file)
    args = DataArguments(train_dir=str(tmp_path / "train"), train_val_split=0.5)
    task = load_task(args, str(tmp_path / "cache"))
    assert task.labels == ["cat", "dog"]
    assert collate([*prepare(task, args, Pixels(8, 8), 0)["train"]])["pixel_values"].shape == (7, 3, 8, 8)


def test_digits() -> None:
    task = load_task(DataArguments())
    assert (len(task.data["train"]), len(task.data["validation"]), task.labels) == (1347, 450, [*"0123456789"])
    flat = [{bytes(np.array(row, dtype=np.uint8)) for row in task.data[split]["image"]} for split in task.data]
    assert len(flat[0] & flat[1]) == 0

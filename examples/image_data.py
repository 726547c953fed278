"""Images for the classification example: a hub data set, a folder, parquet files, or scikit-learn's digits."""

import functools
import io
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Image as ImageFeature, load_dataset
from PIL import Image, ImageOps
from torch import Tensor

logger = logging.getLogger(__name__)

VALIDATION_NAMES = ("validation", "valid", "val", "test")
LABEL_NAMES = ("label", "labels", "fine_label")  # CIFAR-100 has coarse labels beside its fine ones
IMAGE_NAMES = ("image", "img", "pixels")


@dataclass
class DataArguments:
    """Where the images come from. Without a data set, folders or files: scikit-learn's digits, offline."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "Data set on the hub; local images take its place."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration, if it has several."})
    train_dir: str | None = field(default=None, metadata={"help": "Folder with a sub-folder of images for each label."})
    validation_dir: str | None = field(default=None, metadata={"help": "The same, to evaluate on."})
    train_file: str | None = field(default=None, metadata={"help": "Local parquet file or pattern to train on."})
    validation_file: str | None = field(default=None, metadata={"help": "Local parquet file to evaluate on."})
    image_column_name: str | None = field(default=None, metadata={"help": "Column of the images; unset: found."})
    label_column_name: str | None = field(default=None, metadata={"help": "Column of the labels; unset: found."})
    num_labels: int | None = field(default=None, metadata={"help": "Number of labels, where the data has no names."})
    train_val_split: float = field(default=0.1, metadata={"help": "Share held out where there is nothing to validate."})
    streaming: bool = field(default=False, metadata={"help": "Read images as they come; needs --max_steps."})
    shuffle_buffer_size: int = field(default=2000, metadata={"help": "Images among which a stream is shuffled."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only N training images."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only N evaluation images."})
    image_size: int | None = field(default=None, metadata={"help": "Height and width; unset: what the model expects."})
    augmentation: Literal["auto", "crop", "shift", "none"] = field(
        default="auto",
        metadata={"help": "Random resized crop, random shift by an eighth, or none; auto: shift below 64 pixels."},
    )
    horizontal_flip: bool = field(default=True, metadata={"help": "Mirror half of the training images."})

    def __post_init__(self) -> None:
        folders, files = (self.train_dir, self.validation_dir), (self.train_file, self.validation_file)
        if any(folders) and any(files):
            raise ValueError("give folders (--train_dir, --validation_dir) or files (--train_file, --validation_file).")
        if self.source == "digits" and self.streaming:
            raise ValueError("--streaming needs --dataset_name, --train_dir or --train_file.")

    @property
    def source(self) -> str:
        """What is read: files, folders, hub or digits."""
        if self.train_file or self.validation_file:
            return "files"
        if self.train_dir or self.validation_dir:
            return "folders"
        return "hub" if self.dataset_name else "digits"


# ---- one image ----


def to_image(value: Any) -> Image.Image:
    """An upright RGB image from whatever a data set holds: an image, a file's bytes or path, or an array of pixels."""
    if isinstance(value, dict):
        value = value["path"] if value.get("bytes") is None else value["bytes"]
    if isinstance(value, bytes):
        value = Image.open(io.BytesIO(value))
    elif isinstance(value, str):
        value = Image.open(value)
    elif not isinstance(value, Image.Image):
        value = Image.fromarray(_square(np.asarray(value, dtype=np.uint8)))
    value = ImageOps.exif_transpose(value)
    if value.mode.startswith("I"):  # 16 bits a pixel, which convert() would cut off at 255
        value = Image.fromarray((np.asarray(value) >> 8).clip(0, 255).astype(np.uint8))
    return value.convert("RGB")


def _square(pixels: np.ndarray) -> np.ndarray:
    """Pixels in rows: a flat array is a square in one channel, or in three channels one after the other."""
    if pixels.ndim == 1:
        channels = 1 if math.isqrt(len(pixels)) ** 2 == len(pixels) else 3
        side = math.isqrt(len(pixels) // channels)
        if channels * side * side != len(pixels):
            raise ValueError(f"{len(pixels)} numbers are neither one nor three channels of a square image.")
        pixels = pixels.reshape(channels, side, side)
    if pixels.ndim == 3 and pixels.shape[0] in (1, 3) and pixels.shape[-1] not in (1, 3):
        pixels = pixels.transpose(1, 2, 0)
    return pixels.squeeze(-1) if pixels.ndim == 3 and pixels.shape[-1] == 1 else pixels


@dataclass(frozen=True)
class Pixels:
    """What a model wants to see: `size` pixels cut from the center of an image of `resize` pixels, normalized."""

    size: int = 224
    resize: int = 256
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    resample: int = Image.Resampling.BILINEAR

    @classmethod
    def of_processor(cls, processor: Any) -> "Pixels":
        """From an image processor of transformers, or of timm's wrapper."""
        known = getattr(processor, "data_config", None)
        if known is not None:
            size, method = known["input_size"][-1], Image.Resampling[known["interpolation"].upper()]
            return cls(size, int(size / known["crop_pct"]), tuple(known["mean"]), tuple(known["std"]), method)
        side, crop = (_side(getattr(processor, name, None)) for name in ("size", "crop_size"))
        size = crop if crop and getattr(processor, "do_center_crop", True) else side
        share = getattr(processor, "crop_pct", None) or 1.0  # ConvNeXt's, and so ResNet's: of images under 384 pixels
        resize = int(size / share) if size == side and size < 384 else side
        method = getattr(processor, "resample", None)
        method = cls.resample if method is None else Image.Resampling(int(method))
        if not getattr(processor, "do_normalize", True):
            return cls(size, resize, (0.0,) * 3, (1.0,) * 3, method)
        return cls(size, resize, tuple(processor.image_mean), tuple(processor.image_std), method)


def _side(size: Any) -> int:
    size = dict(size or {})
    return int(size.get("shortest_edge") or size.get("height") or 0)


# ---- augmentation: torchvision's where it can be imported, else the same in PIL; random numbers are torch's ----


@functools.cache
def torchvision_transforms() -> Any:
    """torchvision.transforms.v2, or None."""
    try:
        from torchvision.transforms import v2
    except (ImportError, RuntimeError):  # RuntimeError: it was built for another torch than the installed one
        return None
    return v2


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(()))


def random_resized_crop(image: Image.Image, size: int) -> Image.Image:
    """A crop of 8% to 100% of the area, aspect ratio 3/4 to 4/3, scaled to `size` (Inception's)."""
    width, height = image.size
    for _ in range(10):
        area = width * height * _uniform(0.08, 1.0)
        ratio = math.exp(_uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(_uniform(0, width - w + 1)), int(_uniform(0, height - h + 1))
            return image.resize((size, size), Image.Resampling.BILINEAR, (left, top, left + w, top + h))
    return center_crop(image, size, size)


def random_shift(image: Image.Image, by: int) -> Image.Image:
    """The image moved by up to `by` pixels in each direction, black where it left."""
    x, y = (int(_uniform(-by, by + 1)) if by else 0 for _ in range(2))
    return image.transform(image.size, Image.Transform.AFFINE, (1, 0, x, 0, 1, y))


def center_crop(image: Image.Image, resize: int, size: int, resample: int = Pixels.resample) -> Image.Image:
    """The middle of the image, its shorter side scaled to `resize` first."""
    if image.size == (size, size) == (resize, resize):
        return image
    scale = resize / min(image.size)
    image = image.resize(tuple(max(size, round(side * scale)) for side in image.size), resample)
    left, top = ((side - size) // 2 for side in image.size)
    return image.crop((left, top, left + size, top + size))


@dataclass(frozen=True)
class Transform:
    """An image as the model's input, augmented by torch's current random numbers."""

    pixels: Pixels
    augmentation: str = "none"
    flip: bool = False

    def __call__(self, image: Image.Image) -> Tensor:
        """Channels first, normalized."""
        v2, size = torchvision_transforms(), self.pixels.size
        if self.augmentation == "crop":
            image = v2.RandomResizedCrop(size)(image) if v2 else random_resized_crop(image, size)
        else:
            resize = self.pixels.resize if self.augmentation == "none" else size
            image = center_crop(image, resize, size, self.pixels.resample)
        if self.augmentation == "shift":
            image = v2.RandomCrop(size, padding=size // 8)(image) if v2 else random_shift(image, size // 8)
        if self.flip and torch.rand(()) < 0.5:
            image = ImageOps.mirror(image)
        mean, std = (np.array(v, dtype=np.float32) for v in (self.pixels.mean, self.pixels.std))
        values = (np.asarray(image, dtype=np.float32) / 255 - mean) / std
        return torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))


def transforms(args: DataArguments, pixels: Pixels) -> tuple[Transform, Transform]:
    """For training and for evaluation."""
    augmentation = args.augmentation
    if augmentation == "auto":
        augmentation = "shift" if pixels.size < 64 else "crop"
    flip = args.horizontal_flip and augmentation != "none"
    return Transform(pixels, augmentation, flip), Transform(pixels)


# ---- data sets ----


@dataclass
class Task:
    """Rows of images and labels: where to find them in a row, and what the labels mean."""

    data: dict[str, Any]
    image: str
    label: str
    labels: list[str]
    numbers: dict[Any, int] | None = None

    def read(self, rows: dict[str, list[Any]], seeds: list[int], transform: Transform) -> list[dict[str, Any]]:
        """Inputs for the model. An image's augmentation depends on its seed alone, in whichever process it is read."""
        examples = []
        with torch.random.fork_rng(devices=[]):
            for value, label, seed in zip(rows[self.image], rows[self.label], seeds, strict=True):
                torch.default_generator.manual_seed(seed)
                label = label if self.numbers is None else self.numbers[label]
                examples.append({"pixel_values": transform(to_image(value)), "labels": label})
        return examples


class Epochs:
    """What training and evaluation data have in common: the epoch, which workers see too, is part of every seed."""

    def __init__(self, rows: Any, task: Task, transform: Transform, seed: int) -> None:
        self.rows, self.task, self.transform, self.seed = rows, task, transform, seed
        self.epoch = torch.zeros((), dtype=torch.long).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Called when an epoch begins."""
        self.epoch.fill_(epoch)
        if hasattr(self.rows, "set_epoch"):
            self.rows.set_epoch(epoch)

    def seed_of(self, index: int) -> int:
        """A seed for one image in this epoch."""
        return hash((self.seed, int(self.epoch), index)) & (2**63 - 1)  # of numbers: the same in every process


class ImageRows(Epochs, torch.utils.data.Dataset):
    """Images by number."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        return self.task.read(self.rows[indices], [self.seed_of(index) for index in indices], self.transform)


class ImageStream(Epochs, torch.utils.data.IterableDataset):
    """Images as they come."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for index, row in enumerate(self.rows):
            rows = {key: [value] for key, value in row.items()}
            yield from self.task.read(rows, [self.seed_of(index)], self.transform)


def digits() -> DatasetDict:
    """scikit-learn's 1,797 scanned digits of 8x8 pixels: three quarters to train on, the others held out."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images = (images * (255 / 16)).round().astype(np.uint8)
    parts = train_test_split(images, labels, test_size=0.25, stratify=labels, random_state=0)
    names = ClassLabel(names=[str(i) for i in range(10)])

    def split(images: np.ndarray, labels: np.ndarray) -> Dataset:
        return Dataset.from_dict({"image": list(images), "label": labels}).cast_column("label", names)

    return DatasetDict(train=split(parts[0], parts[2]), validation=split(parts[1], parts[3]))


def load_task(args: DataArguments, cache_dir: str | None = None, token: str | None = None) -> Task:
    """Read the data that the arguments name, with splits train and validation."""
    options: dict[str, Any] = {"cache_dir": cache_dir, "streaming": args.streaming}
    if args.source == "digits":
        data = digits()
    elif args.source == "hub":
        data = load_dataset(args.dataset_name, args.dataset_config_name, token=token, **options)
    elif args.source == "files":
        files = {"train": args.train_file, "validation": args.validation_file}
        data = load_dataset("parquet", data_files={k: v for k, v in files.items() if v}, **options)
    else:
        folders = {"train": args.train_dir, "validation": args.validation_dir}
        data = load_dataset("imagefolder", data_files={k: f"{v}/**" for k, v in folders.items() if v}, **options)
    held_out = next((name for name in VALIDATION_NAMES if name in data), None)
    splits = {"train": data["train"]} if "train" in data else {}
    if held_out is not None:
        splits["validation"] = data[held_out]
    elif not args.streaming:
        parts = data["train"].train_test_split(args.train_val_split, seed=0)
        splits = {"train": parts["train"], "validation": parts["test"]}
    some = next(iter(splits.values()))
    columns, row = _features(some)
    image = args.image_column_name or _find(columns, row, "image", IMAGE_NAMES)
    label = args.label_column_name or _find(columns, row, "label", LABEL_NAMES)
    labels, numbers = _labels(args, some, columns.get(label), label)
    splits = {name: _limit(rows.select_columns([image, label]), name, args) for name, rows in splits.items()}
    return Task(splits, image, label, labels, numbers)


def _features(rows: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is known of each column, and one row."""
    row = next(iter(rows.take(1) if not isinstance(rows, Dataset) else rows.select([0])))
    return dict(rows.features or dict.fromkeys(row)), row


def _find(columns: dict[str, Any], row: dict[str, Any], kind: str, names: tuple[str, ...]) -> str:
    """The column of images or labels: by a usual name, by its feature's type, or by what is in it."""
    cls = ImageFeature if kind == "image" else ClassLabel
    typed = [name for name, feature in columns.items() if isinstance(feature, cls)]
    pictures = [
        n for n, v in row.items() if isinstance(v, (bytes, Image.Image)) or (isinstance(v, dict) and "bytes" in v)
    ]
    found = [name for name in names if name in (typed or row)] or typed or (pictures if kind == "image" else [])
    if not found:
        raise ValueError(f"no column of {kind}s among {', '.join(row)}; name it by --{kind}_column_name.")
    return found[0]


def _labels(args: DataArguments, rows: Any, feature: Any, column: str) -> tuple[list[str], dict[Any, int] | None]:
    """Names of the labels, and the number of each value where values are not numbers already."""
    if isinstance(feature, ClassLabel):
        return list(feature.names), None
    if args.num_labels is not None:
        return [str(i) for i in range(args.num_labels)], None
    if args.streaming:
        raise ValueError(f"a stream does not tell how many labels column {column!r} has: add --num_labels.")
    values = sorted(rows.unique(column))
    return [str(value) for value in values], {value: number for number, value in enumerate(values)}


def _limit(rows: Any, split: str, args: DataArguments) -> Any:
    """The first N images; of a folder, whose images are sorted by label, N random ones."""
    limit = args.max_train_samples if split == "train" else args.max_eval_samples
    if args.streaming:
        rows = rows if limit is None else rows.take(limit)
        return rows.shuffle(seed=0, buffer_size=args.shuffle_buffer_size) if split == "train" else rows
    if limit is None or limit >= len(rows):
        return rows
    return rows.shuffle(seed=0).select(range(limit))


def prepare(task: Task, args: DataArguments, pixels: Pixels, seed: int) -> dict[str, ImageRows | ImageStream]:
    """The splits as a Trainer takes them."""
    train, evaluation = transforms(args, pixels)
    kind = ImageStream if args.streaming else ImageRows
    return {name: kind(rows, task, train if name == "train" else evaluation, seed) for name, rows in task.data.items()}


def collate(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
    """One batch."""
    return {
        "pixel_values": torch.stack([example["pixel_values"] for example in examples]),
        "labels": torch.tensor([example["labels"] for example in examples]),
    }

"""Images as uint8 tensors: read from parquet once, shrunk, cached; batches are a pure function of (seed, step)."""

import hashlib
import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

CROP = 8
"""Training images are padded by 1/CROP of their size on each side, and cropped at random."""


def key_of(*parts: Any) -> str:
    """A short digest of some values."""
    return hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).hexdigest()


def generator(*parts: Any) -> torch.Generator:
    """A random generator on the CPU that depends on nothing but these values."""
    return torch.Generator().manual_seed(int(key_of(*parts), 16) >> 1)


def digest(tensor: Tensor) -> str:
    """A short digest of a tensor's values."""
    return hashlib.blake2b(tensor.detach().cpu().contiguous().numpy().tobytes(), digest_size=8).hexdigest()


def read_parquet(path: str | os.PathLike[str], size: int) -> tuple[Tensor, Tensor]:
    """All images of a parquet file, (n, 3, size, size) uint8, shrunk by area average; and the labels, (n,) int64."""
    import numpy as np
    import pyarrow.parquet
    from PIL import Image

    table = pyarrow.parquet.read_table(path)
    images = next(name for name in ("img", "image") if name in table.column_names)
    label = next(name for name in ("label", "fine_label") if name in table.column_names)
    shrunk = []
    for batch in table.column(images).to_pylist():
        with Image.open(io.BytesIO(batch["bytes"])) as image:
            pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None]
        if pixels.shape[-2:] != (size, size):
            pixels = interpolate(pixels.float(), (size, size), mode="area").round().to(torch.uint8)
        shrunk.append(pixels)
    return torch.cat(shrunk), torch.tensor(table.column(label).to_pylist())


@dataclass
class Split:
    """Images (n, 3, h, w) uint8 and labels (n,)."""

    images: Tensor
    labels: Tensor


@dataclass
class Data:
    """Training and test images on one device, and what normalises them."""

    train: Split
    test: Split
    mean: Tensor
    deviation: Tensor
    classes: int

    def normalised(self, images: Tensor) -> Tensor:
        """Float images, with mean 0 and deviation 1 per channel over the training images."""
        return (images.float() - self.mean) / self.deviation

    def batches(self, seed: int, count: int, batch: int) -> "Batches":
        """Training batches of one seed, from its own subset of `count` images (0: all)."""
        return Batches(self, seed, count or len(self.train.labels), batch)


class Batches:
    """Batches by step: one permutation an epoch, random flips and crops, drawn on the CPU from (seed, step)."""

    def __init__(self, data: Data, seed: int, count: int, batch: int) -> None:
        if count > len(data.train.labels) or batch > count:
            raise ValueError(f"{count} images in batches of {batch} cannot be drawn from {len(data.train.labels)}.")
        self.data, self.seed, self.batch = data, seed, batch
        self.subset = torch.randperm(len(data.train.labels), generator=generator(seed, "subset"))[:count]
        self.steps_per_epoch = count // batch

    def indices(self, step: int) -> Tensor:
        """Which training images step `step` sees, (batch,)."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = torch.randperm(len(self.subset), generator=generator(self.seed, "epoch", epoch))
        return self.subset[order[place * self.batch : (place + 1) * self.batch]]

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        """Augmented, normalised images and their labels."""
        data, random = self.data, generator(self.seed, "step", step)
        size = data.train.images.shape[-1]
        margin = size // CROP
        flip = torch.rand(self.batch, 1, generator=random) < 0.5
        top, left = torch.randint(0, 2 * margin + 1, (2, self.batch, 1), generator=random)
        rows = top + torch.arange(size)
        columns = left + torch.where(flip, torch.arange(size).flip(0), torch.arange(size))
        device = data.train.images.device
        chosen, rows, columns = (t.to(device) for t in (self.indices(step), rows, columns))
        padded = pad(data.train.images[chosen], (margin, margin, margin, margin))
        inside = torch.arange(self.batch, device=device)[:, None, None]
        cropped = padded.permute(0, 2, 3, 1)[inside, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
        return data.normalised(cropped).contiguous(), data.train.labels[chosen]


def stamp(*paths: str | os.PathLike[str]) -> str:
    """A digest of the files' contents."""
    return key_of(*(hashlib.blake2b(Path(path).read_bytes(), digest_size=8).hexdigest() for path in paths))


def cached(train_file: str, test_file: str, size: int, folder: Path) -> tuple[Path, str]:
    """The file that holds both splits as tensors, made on the first call, and the digest of what it was made from."""
    made_from = stamp(train_file, test_file)
    path = folder / f"images-{size}-{made_from}.pt"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        splits = [read_parquet(file, size) for file in (train_file, test_file)]
        part = path.with_suffix(f".{os.getpid()}")
        torch.save(splits, part)
        part.replace(path)
    return path, made_from


def load(path: str | os.PathLike[str], device: str = "cpu") -> Data:
    """The cached images on a device."""
    splits = [Split(*(tensor.to(device) for tensor in split)) for split in torch.load(path, weights_only=True)]
    pixels = splits[0].images.double() if device == "cpu" else splits[0].images.float()
    mean, deviation = (value.float()[:, None, None] for value in (pixels.mean((0, 2, 3)), pixels.std((0, 2, 3))))
    return Data(*splits, mean, deviation.clamp(min=1.0), int(splits[0].labels.max()) + 1)

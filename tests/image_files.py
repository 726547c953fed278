"""Images as they come in real collections, and parquet files of them with the schemas of CIFAR and ImageNet-1k."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from datasets import ClassLabel, Dataset, Features, Image as ImageFeature
from PIL import Image


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """The image as a file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def odd_images() -> dict[str, bytes]:
    """A red image, 40 wide and 20 high where it matters, as it comes in real collections."""
    red = Image.new("RGB", (40, 20), (255, 0, 0))
    red.paste((0, 0, 0), (0, 0, 10, 20))  # black on the left
    turned = red.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    deep = Image.fromarray(np.array(red.convert("L"), dtype=np.uint16) * 257)
    return {
        "rgb": encoded(red, "PNG"),
        "grey": encoded(red.convert("L"), "JPEG", quality=95),
        "cmyk": encoded(red.convert("CMYK"), "JPEG", quality=95),
        "palette": encoded(red.convert("P"), "PNG"),
        "alpha": encoded(red.convert("RGBA"), "PNG"),
        "16 bits": encoded(deep, "PNG"),
        "turned": encoded(turned, "JPEG", quality=95, exif=exif),
    }


def imagenet_stand_in(folder: Path) -> tuple[str, str]:
    """Shards with ImageNet-1k's schema, odd sizes and odd files; patterns of the training and the validation files."""
    names = [f"class {i}" for i in range(1000)]
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=names)})
    rng, odd = np.random.default_rng(0), list(odd_images().values())
    for shard in ("train-0", "train-1", "validation-0"):
        files = list(odd)
        for _ in range(9):
            sides = rng.integers(20, 90, 2)
            files.append(encoded(Image.fromarray(rng.integers(0, 256, (*sides, 3), dtype=np.uint8)), "JPEG"))
        rows = {"image": [{"bytes": file, "path": None} for file in files], "label": list(rng.integers(0, 1000, 16))}
        Dataset.from_dict(rows, features=features).to_parquet(folder / f"{shard}.parquet")
    return str(folder / "train-*.parquet"), str(folder / "validation-*.parquet")


def cifar_file(path: Path, count: int, metadata: bool, label: str = "label") -> str:
    """A parquet file with CIFAR's schema, with or without what `datasets` writes about its features."""
    rng = np.random.default_rng(count)
    labels = np.arange(count) % 10
    images = [encoded(Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)), "PNG") for _ in labels]
    rows = {"img": [{"bytes": image, "path": None} for image in images], label: labels.tolist()}
    if metadata:
        features = Features({"img": ImageFeature(), label: ClassLabel(names=[f"class {i}" for i in range(10)])})
        Dataset.from_dict(rows, features=features).to_parquet(path)
    else:
        pyarrow.parquet.write_table(pyarrow.table(rows), path)
    return str(path)

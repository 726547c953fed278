"""Files that are not what was saved, in ways that still look like a checkpoint: found when loaded, and named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import CASES, logits, quick, train
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from stompp_hf import binarize_model, pack_model
from stompp_hf.checkpoints import checks
from stompp_hf.checkpoints.files import read_header
from stompp_hf.errors import CheckpointError, NonFiniteError

BERT = CASES["bert"]
STEPS = 4
QUERY, KEY = (f"bert.encoder.layer.0.attention.self.{name}" for name in ("query", "key"))
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished BERT in the training format, packed, in shards, and another run's, with its logits."""
    folder = tmp_path_factory.mktemp("trust")
    for name, seed in (("", 0), ("other ", 1)):
        model = binarize_model(BERT.build(seed=seed), quick())
        train(model, BERT, 0, STEPS, STEPS)
        model.save_pretrained(folder / f"{name}training")
        model.save_pretrained(folder / f"{name}shards", max_shard_size="30KB")
        pack_model(model).save_pretrained(folder / f"{name}packed")
    torch.save(logits(model, BERT.batch()), folder / "logits of other.pt")
    return folder


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(folder, **options)


def change_bytes(folder: Path, name: str, change: Callable[[bytearray], None]) -> None:
    """Change a tensor's bytes in place, and nothing else of its file."""
    for path in folder.glob("*.safetensors"):
        header, begin = read_header(path)
        if name in header:
            raw, (first, last) = bytearray(path.read_bytes()), header[name]["data_offsets"]
            part = raw[begin + first : begin + last]
            change(part)
            raw[begin + first : begin + last] = part
            path.write_bytes(raw)
            return
    raise KeyError(name)


def rewrite(folder: Path, **changed: torch.Tensor) -> None:
    """Write tensors as another tool would: without checksums."""
    tensors = load_file(folder / WEIGHTS)
    save_file({**tensors, **changed}, folder / WEIGHTS, metadata={"format": "pt"})


def flip(part: bytearray) -> None:
    part[len(part) // 2] ^= 4


# ---- with checksums ----


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(("packed", f"{QUERY}.{own}") for own in ("weight_bits", "weight_scale", "activation_threshold", "bias")),
        *(("training", f"{QUERY}.{own}") for own in ("weight", "activation_scale", "stompp_state")),
        ("shards", "bert.encoder.layer.1.output.dense.weight"),
    ],
)
def test_one_flipped_bit_is_named(kind: str, name: str, saved: Path, tmp_path: Path, monkeypatch: Any) -> None:
    folder = shutil.copytree(saved / kind, tmp_path / kind)
    change_bytes(folder, name, flip)
    with pytest.raises(CheckpointError, match=rf"{name} is not what was saved .*STOMPP_CHECKSUMS=skip"):
        load(folder)
    if name.endswith(("weight", "weight_bits")):  # a plausible value: only the sum tells
        monkeypatch.setenv("STOMPP_CHECKSUMS", "skip")
        load(folder)
    monkeypatch.setenv("STOMPP_CHECKSUMS", "sometimes")
    with pytest.raises(CheckpointError, match="STOMPP_CHECKSUMS='sometimes' is neither 'check' nor 'skip'"):
        load(folder)


@pytest.mark.parametrize("own", ["weight_bits", "weight_scale"])
def test_two_tensors_that_changed_places(own: str, saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved / "packed", tmp_path / "packed")
    raw = (folder / WEIGHTS).read_bytes()
    header, begin = read_header(folder / WEIGHTS)
    one, two = header[f"{QUERY}.{own}"], header[f"{KEY}.{own}"]
    one["data_offsets"], two["data_offsets"] = two["data_offsets"], one["data_offsets"]
    text = json.dumps(header, separators=(",", ":")).encode()
    (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + raw[begin:])
    with pytest.raises(CheckpointError, match=rf"{own} is not what was saved"):
        load(folder)


def test_files_of_another_run(saved: Path, tmp_path: Path) -> None:
    shards = sorted(path.name for path in (saved / "shards").glob("*.safetensors"))
    assert len(shards) > 3
    for shard in (shards[0], shards[-1]):
        folder = shutil.copytree(saved / "shards", tmp_path / shard)
        shutil.copy(saved / "other shards" / shard, folder / shard)
        with pytest.raises(CheckpointError, match="were not written by the same save"):
            load(folder)
    for kind in ("training", "packed"):
        folder = shutil.copytree(saved / kind, tmp_path / kind)
        shutil.copy(saved / f"other {kind}" / WEIGHTS, folder / WEIGHTS)
        with pytest.raises(
            CheckpointError, match=r"model.safetensors and config.json beside it were not written by the"
        ):
            load(folder)
        shutil.copy(saved / f"other {kind}" / "config.json", folder / "config.json")
        assert torch.equal(logits(load(folder), BERT.batch()), torch.load(saved / "logits of other.pt"))


@pytest.mark.parametrize("note", ["", "[]", "{}", '{"save": 1, "crc32": {}}', '{"save": "x", "crc32": []}', "[" * 9999])
def test_checksums_that_cannot_be_read(note: str, saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved / "packed", tmp_path / "packed")
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, metadata={"format": "pt", "stompp": note})
    with pytest.raises(CheckpointError, match="the checksums in its metadata cannot be read"):
        load(folder)


def test_what_a_plan_does_not_cover_may_be_edited(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved / "packed", tmp_path / "packed")
    for name in ("classifier.weight", "bert.embeddings.word_embeddings.weight"):
        change_bytes(folder, name, lambda part: part.__setitem__(slice(0, 4), b"\0\0\0\0"))
    assert load(folder).classifier.weight[0, 0] == 0


@pytest.mark.parametrize("kind", ["training", "packed"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_load_in_another_dtype_is_checked_all_the_same(
    kind: str, dtype: torch.dtype, saved: Path, tmp_path: Path
) -> None:
    model = load(saved / kind, dtype=dtype)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again", dtype=dtype), BERT.batch()), logits(model, BERT.batch()))


def test_older_checkpoints_load_with_one_warning(saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = shutil.copytree(saved / "other packed", tmp_path / "packed")
    rewrite(folder)
    values = json.loads((folder / "config.json").read_text())
    for key in ("save", "names", "digest"):
        del values["quantization_config"][key]
    (folder / "config.json").write_text(json.dumps(values))
    assert torch.equal(logits(load(folder), BERT.batch()), torch.load(saved / "logits of other.pt"))
    ours = [record.getMessage() for record in caplog.records if record.name == "stompp_hf.checkpoints.checksums"]
    assert len(ours) == 1 and "has no checksums" in ours[0]


def test_the_same_model_gives_the_same_files(saved: Path, tmp_path: Path) -> None:
    load(saved / "packed").save_pretrained(tmp_path)
    assert (tmp_path / "config.json").read_bytes() == (saved / "packed" / "config.json").read_bytes()
    headers = [read_header(folder / WEIGHTS) for folder in (tmp_path, saved / "packed")]  # its order is not ours
    assert headers[0] == headers[1]


# ---- without: by what the values say ----


def nth(tensor: torch.Tensor, value: float) -> torch.Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[1 % tensor.numel()] = value
    return tensor


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("own", ["weight", "weight_scale", "activation_threshold", "activation_scale"])
@pytest.mark.parametrize("small", [checks.SMALL, 0], ids=["together", "one by one"])
def test_what_is_not_finite_is_named(
    small: int, own: str, value: float, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "SMALL", small)
    for kind in ("training", "packed"):
        if kind == "packed" and own == "weight":
            continue
        folder, name = shutil.copytree(saved / kind, tmp_path / kind), f"{QUERY}.{own}"
        rewrite(folder, **{name: nth(load_file(folder / WEIGHTS)[name], value)})
        with pytest.raises(CheckpointError, match=QUERY):
            load(folder)
        model = load(saved / kind)
        model.get_parameter(name).data = nth(model.get_parameter(name).data, value)
        with pytest.raises(NonFiniteError, match=rf"{name} holds NaN or an infinite value, which a sign would hide"):
            model.save_pretrained(tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_a_model_that_is_not_to_be_binary_may_diverge(tmp_path: Path) -> None:
    """A baseline in full precision: no sign hides anything, and it is not ours to stop."""
    model = binarize_model(BERT.build(), quick(binarize="nothing", pending_lr=1.0))
    model.get_parameter(f"{QUERY}.weight").data[0, 0] = float("nan")
    model.save_pretrained(tmp_path)
    load(tmp_path)


@pytest.mark.parametrize(("index", "change"), [(3, 5), (4, -1), (5, 1), (0, -1)])
def test_members_stand_at_one_step(index: int, change: int, saved: Path, tmp_path: Path) -> None:
    """One member's total, step, fingerprint or flag is not the others'."""
    folder, name = shutil.copytree(saved / "training", tmp_path / "training"), f"{KEY}.stompp_state"
    state = load_file(folder / WEIGHTS)[name]
    state[index] += change
    rewrite(folder, **{name: state})
    with pytest.raises(CheckpointError, match=KEY):
        load(folder)


def test_a_file_that_was_cut_off(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved / "packed", tmp_path / "packed")
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])
    with pytest.raises(Exception, match=r"damaged or cut off|incomplete|deserializing"):
        load(folder)

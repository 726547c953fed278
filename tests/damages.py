"""Kinds of damage to a checkpoint folder, each made from a seed."""

import json
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

QUERY = "bert.encoder.layer.0.attention.self.query"
WEIGHTS, CONFIG, INDEX = "model.safetensors", "config.json", "model.safetensors.index.json"

Damage = Callable[[Path, random.Random], None]
FAMILIES: dict[str, tuple[int, Damage]] = {}
"""Kinds of damage: how many are made of each, and how."""


def family(count: int) -> Callable[[Damage], Damage]:
    """Register a kind of damage under the name of its function."""

    def add(damage: Damage) -> Damage:
        FAMILIES[damage.__name__] = (count, damage)
        return damage

    return add


# ---- the file of weights ----


def parts(folder: Path) -> tuple[bytearray, bytes]:
    """Header and data of the weight file."""
    data = (folder / WEIGHTS).read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    return bytearray(data[8:end]), data[end:]


def put(folder: Path, header: bytes, data: bytes, length: int | None = None) -> None:
    size = len(header) if length is None else length
    (folder / WEIGHTS).write_bytes(size.to_bytes(8, "little") + header + data)


def change_header(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    header, data = parts(folder)
    values = json.loads(header)
    change(values)
    put(folder, json.dumps(values).encode(), data)


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def some_tensor(tensors: dict[str, Any], dice: random.Random, ending: str = "") -> str:
    return dice.choice(sorted(name for name in tensors if name.endswith(ending)))


@family(24)
def truncated(folder: Path, dice: random.Random) -> None:
    data = (folder / WEIGHTS).read_bytes()
    near = dice.choice([0, 7, 8, 9, 200, len(data) // 2, len(data) - 1, dice.randrange(len(data))])
    (folder / WEIGHTS).write_bytes(data[:near])


@family(10)
def garbage_header(folder: Path, dice: random.Random) -> None:
    header, data = parts(folder)
    put(folder, dice.randbytes(len(header)), data)


@family(12)
def wrong_header_length(folder: Path, dice: random.Random) -> None:
    header, data = parts(folder)
    lengths = [0, 1, 2**63, 2**64 - 1, 2**40, len(header) - 1, len(header) + 1, len(header) // 2]
    put(folder, bytes(header), data, dice.choice(lengths))


@family(24)
def flipped_header_bytes(folder: Path, dice: random.Random) -> None:
    header, data = parts(folder)
    for _ in range(dice.choice([1, 1, 4])):
        header[dice.randrange(len(header))] ^= 1 << dice.randrange(8)
    put(folder, bytes(header), data)


@family(10)
def nonsense_in_the_header(folder: Path, dice: random.Random) -> None:
    def change(values: dict[str, Any]) -> None:
        entry = values[some_tensor({name: 0 for name in values if name != "__metadata__"}, dice)]
        key = dice.choice(["dtype", "shape", "data_offsets"])
        entry[key] = dice.choice([None, "F31", [], [-1, 5], [2**70], {}, [0, 2**62], "os.system('id')", [1.5]])

    change_header(folder, change)


@family(16)
def missing_tensor(folder: Path, dice: random.Random) -> None:
    change_tensors(folder, lambda tensors: tensors.pop(some_tensor(tensors, dice)))


@family(16)
def extra_tensor(folder: Path, dice: random.Random) -> None:
    places = [QUERY, "bert.pooler.dense", "nowhere", "", "bert", "bert.encoder.layer.0.attention.self"]
    owns = ["weight", "weight_bits", "stompp_state", "activation_scale", "padding_lives", "query_scale", "what"]
    name = f"{dice.choice(places)}.{dice.choice(owns)}"
    change_tensors(folder, lambda tensors: tensors.setdefault(name, torch.rand(3)))


@family(16)
def wrong_shape(folder: Path, dice: random.Random) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = some_tensor(tensors, dice)
        value = tensors[name]
        shapes = [value[:-1].clone(), value[None].clone(), value.flatten()[:0].clone(), torch.cat([value, value])]
        tensors[name] = dice.choice(shapes)

    change_tensors(folder, change)


@family(20)
def wrong_dtype(folder: Path, dice: random.Random) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = some_tensor(tensors, dice)
        value = tensors[name]
        floats = [torch.int64, torch.bool, torch.uint8, torch.int32]
        others = [torch.int8, torch.float32, torch.bool, torch.int32, torch.float16]
        tensors[name] = value.to(dice.choice(floats if value.is_floating_point() else others))

    change_tensors(folder, change)


@family(8)
def stray_bits(folder: Path, dice: random.Random) -> None:
    """Bits behind the end of a row; this model has rows of 44 weights, 4 bits in the last byte unused."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        names = [name for name in tensors if name.endswith("output.dense.weight_bits") and tensors[name].shape[1] == 6]
        if names:
            bits = tensors[dice.choice(names)]
            bits[dice.randrange(len(bits)), -1] |= 1 << dice.randrange(4, 8)

    change_tensors(folder, change)


@family(8)
def impossible_state(folder: Path, dice: random.Random) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        state = tensors[some_tensor(tensors, dice, ".stompp_state")]
        state[dice.randrange(5)] = dice.choice([-1, -7, -(2**62)])

    change_tensors(folder, change)


@family(8)
def not_a_number(folder: Path, dice: random.Random) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        endings = (".weight_scale", ".activation_scale", ".activation_threshold", ".activation_low", ".weight_clip")
        tensors[some_tensor(tensors, dice, dice.choice(endings))].view(-1)[0] = float("nan")

    change_tensors(folder, change)


@family(6)
def other_files_in_place_of_weights(folder: Path, dice: random.Random) -> None:
    weights = folder / WEIGHTS
    kind = dice.choice(["gone", "folder", "dangling link", "link to itself", "text"])
    weights.unlink()
    if kind == "folder":
        weights.mkdir()
    elif kind == "dangling link":
        weights.symlink_to(folder / "nowhere")
    elif kind == "link to itself":
        weights.symlink_to(weights)
    elif kind == "text":
        weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


class Exploit:
    """Leaves a trace if a pickle of it is ever opened carelessly."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


@family(4)
def hostile_pickle(folder: Path, dice: random.Random) -> None:
    data = pickle.dumps({QUERY: Exploit(folder / "executed")})
    (folder / "pytorch_model.bin").write_bytes(data)
    if dice.random() < 0.5:
        torch.save({QUERY: Exploit(folder / "executed")}, folder / "pytorch_model.bin")
    if dice.random() < 0.7:
        (folder / WEIGHTS).unlink()


# ---- shards ----


def shard(folder: Path) -> dict[str, Any]:
    """Split the weights in two files, and return the index."""
    tensors = load_file(folder / WEIGHTS)
    names, places = sorted(tensors), {}
    for number in (1, 2):
        file = f"model-0000{number}-of-00002.safetensors"
        some = names[: len(names) // 2] if number == 1 else names[len(names) // 2 :]
        save_file({name: tensors[name] for name in some}, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(some, file)
    (folder / WEIGHTS).unlink()
    return {"metadata": {"total_size": 1}, "weight_map": places}


@family(16)
def broken_shards(folder: Path, dice: random.Random) -> None:
    index = shard(folder)
    places = index["weight_map"]
    kind = dice.choice(["missing", "cut", "swapped", "empty", "list", "numbers", "one", "outside", "text", "none"])
    if kind == "missing":
        (folder / "model-00002-of-00002.safetensors").unlink()
    elif kind == "cut":
        path = folder / "model-00001-of-00002.safetensors"
        path.write_bytes(path.read_bytes()[: dice.randrange(path.stat().st_size)])
    elif kind == "swapped":
        for name, file in places.items():
            places[name] = file.replace("00001-", "0000x-").replace("00002-", "00001-").replace("0000x", "00002")
    elif kind == "one":
        index["weight_map"] = {name: file for name, file in places.items() if "00001-" in file}
    elif kind == "outside":
        index["weight_map"] = dict.fromkeys(places, "../../../etc/passwd")
    elif kind in ("empty", "list", "numbers"):
        index["weight_map"] = {"empty": {}, "list": [1, 2], "numbers": dict.fromkeys(places, 3)}[kind]
    text = {"text": "{ no json", "none": "null"}.get(kind, json.dumps(index))
    (folder / INDEX).write_text(text)


# ---- config.json ----


def change_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads((folder / CONFIG).read_text())
    change(values)
    (folder / CONFIG).write_text(json.dumps(values))


ODD_VALUES: list[Any] = [None, "", "x", 0, -1, 1.5, 10**30, True, [], {}, [1], {"a": 1}, float("nan"), float("inf")]
ODD_VALUES += ["__import__('os').system('touch executed')", "../../../etc/passwd", "\ud800", "\0", [[[]]], "bert"]


@family(24)
def flipped_plan_fields(folder: Path, dice: random.Random) -> None:
    def change(values: dict[str, Any]) -> None:
        plan = values["quantization_config"]
        keys = sorted(key for key in plan if key not in ("quant_method", "digest"))
        plan[dice.choice(keys)] = dice.choice(ODD_VALUES)

    change_config(folder, change)


@family(24)
def flipped_options(folder: Path, dice: random.Random) -> None:
    """Odd and valid values: without a digest, some of these would load and compute something else."""

    def change(values: dict[str, Any]) -> None:
        options = values["quantization_config"]["config"]
        valid = {"binarize": "weights", "conv_padding": "one", "weight_scale": "tensor", "weight_clip": 0.5}
        valid |= {"activation_threshold": "mean", "activation_levels": "symmetric", "embeddings": "binarize"}
        name = dice.choice(sorted(options))
        options[name] = valid[name] if name in valid and dice.random() < 0.7 else dice.choice(ODD_VALUES)

    change_config(folder, change)


@family(24)
def flipped_modules(folder: Path, dice: random.Random) -> None:
    """The digest left out, as by hand: the rest must notice by itself."""

    def change(values: dict[str, Any]) -> None:
        plan = values["quantization_config"]
        del plan["digest"]
        entries = plan["modules"]
        kind = dice.choice(["drop", "double", "field", "rename", "reorder", "neighbours"])
        entry = dice.choice(entries)
        if kind == "drop":
            entries.remove(entry)
        elif kind == "double":
            entries.append(dict(entry))
        elif kind == "field":
            key = dice.choice(["name", "stage", "stage_name", "kind", "shape", "position", "producer", "absorbed"])
            entry[key] = dice.choice(ODD_VALUES)
        elif kind == "rename":
            entry["name"] = dice.choice(["bert.pooler.dense", "bert.embeddings.word_embeddings", "bert", "x.y", "."])
        elif kind == "reorder":
            dice.shuffle(entries)
        else:
            key = dice.choice(["bypassed", "paused", "shifted", "left"])
            plan[key] = dice.choice([{"bert": "absorbed"}, {"bert.pooler": ["x"]}, {"x": 1}, [1], "x", {QUERY: []}])

    change_config(folder, change)


@family(14)
def flipped_versions(folder: Path, dice: random.Random) -> None:
    key = dice.choice(["format", "format_version"])
    values = [None, 2, 0, -1, "1", 1.0, 10**40, "packed-2", "training", "packed", [], {}, True, float("nan")]
    value = dice.choice(values)
    change_config(folder, lambda config: config["quantization_config"].update({key: value}))


@family(12)
def another_quantization(folder: Path, dice: random.Random) -> None:
    odd = [[], "stompp", 5, {}, {"quant_method": "stompp"}, {"quant_method": "bitnet"}, {"quant_method": 7}, True]
    extra = [{"self": 1}, {"plan": "x"}, {"to_dict": 1}, {"load_in_4bit": True}, {"from_dict": {}}, {"__class__": "x"}]

    def change(values: dict[str, Any]) -> None:
        if dice.random() < 0.5:
            values["quantization_config"] = dice.choice(odd)
        else:
            values["quantization_config"].update(dice.choice(extra))

    change_config(folder, change)


@family(16)
def hostile_json(folder: Path, dice: random.Random) -> None:
    text = (folder / CONFIG).read_text()
    kinds: list[str | bytes] = [
        "", "null", "[]", "5", '"text"', "{}", text[: dice.randrange(1, len(text))], "[" * 100_000,
        '{"a":' * 100_000, text.replace('"packed"', '"packed", "format": "training"', 1),
        text.replace("1", "1" * 5000, 1), text.replace("1", "1e999", 1), b"\xff\xfe" + text.encode(), b"\0" * 100,
        text.replace('"hidden_size": 32', '"hidden_size": -32'), text.replace("32", "NaN"),
        text.replace('"architectures": [', '"architectures": ["os", '),
    ]  # fmt: skip
    kind = dice.choice(kinds)
    (folder / CONFIG).write_bytes(kind if isinstance(kind, bytes) else kind.encode())


@family(12)
def another_shape_of_model(folder: Path, dice: random.Random) -> None:
    keys = ["hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "max_position_embeddings"]
    key, value = dice.choice(keys), dice.choice([1, 3, 8, 64, 0, -4, "x", None, 2.5])
    change_config(folder, lambda config: config.update({key: value}))


@family(6)
def code_in_the_config(folder: Path, dice: random.Random) -> None:
    (folder / "evil.py").write_text(f"from pathlib import Path\nPath({str(folder / 'executed')!r}).touch()\n")
    places = {"AutoConfig": "evil.C", "AutoModelForSequenceClassification": "evil.C"}
    key = dice.choice(["model_type", "architectures"])
    value: Any = {"model_type": "evil", "architectures": ["evil.C"]}[key]
    change_config(folder, lambda config: config.update({"auto_map": places, key: value}))

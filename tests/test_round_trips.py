"""Saved here and loaded in another process, every model computes the same, bit for bit.

Seven architectures, W1A1 and W1A32; the training format in mid-progression and at the end, and the packed format, plain
and in shards; with the task's class and with AutoModel; in float32 and, where plain, in bfloat16.
"""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import vision
from load_and_run import run
from models import quick, same_tensors, train

from stompp_hf import binarize_model, get_plan, pack_model
from stompp_hf.surgery.members import binary_layers

STEPS, MIDDLE = 6, 3
CASES = {**models.CASES, **vision.CASES}
NAMES = ("bert", "gpt2", "t5", "llama-tied", "vit", "resnet", "mobilenet_v2")
KINDS = {"W1A1": "weights_and_activations", "W1A32": "weights"}
FORMATS = ("middle", "training", "training sharded", "packed", "packed sharded")
OTHER_LOADS = {"mapped": {"device_map": "cpu"}, "lean": {"low_cpu_mem_usage": True}}
SHARDS = "4KB"


def inputs_of(name: str, model: Any) -> dict[str, torch.Tensor]:
    """A batch without labels."""
    batch = CASES[name].batch(77)
    labels = batch.pop("labels")
    return {**batch, "decoder_input_ids": model._shift_right(labels)} if name == "t5" else batch


def halved(model: Any) -> Any:
    """A copy in bfloat16, but for what is no part of a checkpoint: from_pretrained computes that anew, in float32."""
    half = copy.deepcopy(model).to(torch.bfloat16)
    for (name, buffer), exact in zip(half.named_buffers(), model.buffers(), strict=True):
        owner, _, own = name.rpartition(".")
        if own in half.get_submodule(owner)._non_persistent_buffers_set:
            buffer.data = exact
    return half


@pytest.fixture(scope="module")
def trips(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """A folder of checkpoints, what was computed before they were saved, and by another process after it."""
    folder, expected, jobs = tmp_path_factory.mktemp("trips"), {}, []

    def save(name: str, model: Any, auto: str, batch: dict[str, torch.Tensor], shards: bool) -> None:
        here, half = run(model, batch), run(halved(model), batch)
        for suffix, options in (("", {}), *((" sharded", {"max_shard_size": SHARDS}),) * shards):
            model.save_pretrained(folder / f"{name}{suffix}", **options)
            for dtype, wanted in (("float32", here), *((("bfloat16", half),) if not suffix else ())):
                for cls in (auto, "AutoModel"):
                    job, load = f"{name}{suffix} {dtype} {cls}", {"dtype": getattr(torch, dtype)}
                    jobs.append((job, f"{name}{suffix}", cls, load, batch))
                    expected[job] = wanted if cls == auto else {"hidden": wanted["hidden"]}

    for name in NAMES:
        for kind, binarize in KINDS.items():
            case, auto = CASES[name], CASES[name].auto.__name__
            model = binarize_model(case.build(), quick(binarize=binarize))
            batch = inputs_of(name, model)
            train(model, case, 0, MIDDLE, STEPS)
            save(f"{name} {kind} middle", model, auto, batch, shards=False)
            train(model, case, MIDDLE, STEPS, STEPS)
            save(f"{name} {kind} training", model, auto, batch, shards=True)
            before = run(model, batch)
            save(f"{name} {kind} packed", pack_model(model), auto, batch, shards=True)
            for other, options in OTHER_LOADS.items():
                jobs.append((job := f"{name} {kind} packed {other}", f"{name} {kind} packed", auto, options, batch))
                expected[job] = before
    torch.save(jobs, folder / "jobs.pt")
    script = Path(__file__).with_name("load_and_run.py")
    done = subprocess.run([sys.executable, script, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder, expected, torch.load(folder / "results.pt")


@pytest.mark.parametrize("saved", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_another_process_computes_the_same(trips: Any, name: str, kind: str, saved: str) -> None:
    _, expected, found = trips
    for dtype in ("float32",) if saved.endswith("sharded") else ("float32", "bfloat16"):
        for cls in (CASES[name].auto.__name__, "AutoModel"):
            job = f"{name} {kind} {saved} {dtype} {cls}"
            assert same_tensors(found[job], expected[job]) == [], job
            assert ("logits" in found[job]) == (cls != "AutoModel")
            assert all(str(tensor.dtype) == f"torch.{dtype}" for tensor in found[job].values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_packed_is_what_was_trained(trips: Any, name: str, kind: str) -> None:
    _, expected, found = trips
    job, cls = f"{name} {kind}", CASES[name].auto.__name__
    trained = expected[f"{job} training float32 {cls}"]
    for other in (f"packed float32 {cls}", "packed mapped", "packed lean"):
        assert same_tensors(found[f"{job} {other}"], trained) == []
    assert same_tensors(expected[f"{job} middle float32 {cls}"], trained) == ["hidden", "logits"]
    assert same_tensors(expected[f"{job} training bfloat16 {cls}"], trained) == ["hidden", "logits"]


@pytest.mark.parametrize("name", NAMES)
def test_the_files_are_what_they_are_called(trips: Any, name: str) -> None:
    for kind in KINDS:
        for saved in FORMATS:
            folder = trips[0] / f"{name} {kind} {saved}"
            model = CASES[name].auto.from_pretrained(folder)
            states = {layer.stage_state for layer in binary_layers(model).values()}
            assert (states == {"frozen"}) == (saved != "middle")
            assert get_plan(model).packed == saved.startswith("packed")
            assert get_plan(model).config.binarize == KINDS[kind]
            shards = list(folder.glob("*.safetensors"))
            assert (len(shards) > 1) == saved.endswith("sharded")

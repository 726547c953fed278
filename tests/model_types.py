"""Every model type of transformers that builds small: binarize, four steps, freeze, save, reload, equal outputs.

    python tests/model_types.py --out runs/model_types          # all, about half an hour of one core; resumes
    python tests/model_types.py --only bert falcon              # some, each with its whole error
    python -m pytest -m sweep                                    # the same, a test a type

The folder gets `results.json`, a record a type, written as they come (a second call judges what is missing), and
`results.md`. A verdict is one of:

- ok: the outputs of the binarized model were the plain one's, bit for bit; after four steps every binary layer was
  frozen; what was saved and reloaded, packed, and packed and reloaded, gave the frozen model's outputs, bit for bit.
- not judged: no small config builds and runs, or the *plain* model is random in evaluation, does not train, or does
  not reload.
- nothing: the library says that nothing in it can become binary (NothingToBinarizeError).
- wrong: anything else, with the step that failed, and the exception or difference.

Each type is judged in a process of its own (a fork, so that nothing is imported twice) with a time limit.
"""

import argparse
import contextlib
import copy
import json
import logging
import multiprocessing
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torchvision_ops  # noqa: F401  # before transformers, where torchvision is installed
import transformers
from small_models import LARGEST, evaluate, floats, input_ways, model_classes, parameters_of, small_configs
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedModel

from stompp_hf import Progression, binarize_model, pack_model
from stompp_hf.errors import NothingToBinarizeError
from stompp_hf.surgery.members import binary_layers, get_plan

STEPS = 4
SECONDS = 120
"""A type that takes longer is not judged."""

Inputs = Callable[[int], dict[str, Any]]


class Unjudged(Exception):
    """The plain model already fails."""


class Wrong(Exception):
    """The library does."""


# ---- one type ----


def same(left: list[Tensor], right: list[Tensor]) -> str:
    """What differs between two lists of tensors; empty where nothing does."""
    if len(left) != len(right):
        return f"{len(left)} and {len(right)} tensors"
    for index, (a, b) in enumerate(zip(left, right, strict=True)):
        if a.shape != b.shape or not torch.equal(a, b):
            gap = (a - b).abs().max().item() if a.shape == b.shape else f"shapes {tuple(a.shape)} and {tuple(b.shape)}"
            return f"output {index} of {len(left)} differs: {gap}"
    return ""


def loss_of(model: nn.Module, inputs: dict[str, Any], seed: int) -> Tensor:
    """A random direction of every output that has a gradient: no architecture makes that constant."""
    generator = torch.Generator().manual_seed(seed)
    parts = [t for t in floats(model(**inputs)) if t.requires_grad]
    if not parts:
        raise Unjudged("no output has a gradient")
    return torch.stack([(t * torch.randn(t.shape, generator=generator)).mean() for t in parts]).sum()


def train(model: nn.Module, inputs: Inputs) -> None:
    progression, optimizer = Progression(model, STEPS), torch.optim.AdamW(model.parameters(), 1e-3)
    progression.attach(optimizer)
    for step in range(STEPS):
        progression.step(step)
        torch.manual_seed(step)
        loss_of(model, inputs(step), step).backward()
        optimizer.step()
        optimizer.zero_grad()
    progression.step(STEPS)
    progression.detach()
    if not progression.is_complete():
        raise Wrong("not every stage is frozen at the end")


def reload(model: PreTrainedModel) -> PreTrainedModel:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return type(model).from_pretrained(folder)


def plain_model(model_type: str) -> tuple[PreTrainedModel, Inputs]:
    """A small model that evaluates, repeats itself, reloads and trains, and its inputs."""
    reasons: dict[str, None] = {}
    try:
        classes = model_classes(model_type)[:6]
    except ImportError as error:
        raise Unjudged(brief(error)) from error
    for cls in classes:
        for config in small_configs(model_type):
            try:
                if parameters_of(cls, copy.deepcopy(config)) > LARGEST:
                    reasons.setdefault(f"{cls.__name__} has more than {LARGEST:,} parameters")
                    continue
                torch.manual_seed(0)
                model = cls._from_config(copy.deepcopy(config)).float()
            except Exception as error:
                reasons.setdefault(f"{cls.__name__} does not build: {brief(error)}")
                continue
            for inputs in input_ways(model):
                try:
                    _fit(model, inputs)
                    return model, inputs
                except Exception as error:
                    reasons.setdefault(f"{cls.__name__}: {brief(error)}")
    raise Unjudged("; ".join(list(reasons)[-3:]) or "no class takes this config")


def _fit(model: PreTrainedModel, inputs: Inputs) -> None:
    """Raise where the plain model cannot be judged on these inputs."""
    batch = inputs(0)
    if not batch:
        raise Unjudged("no inputs can be made")
    torch.manual_seed(1)
    first = evaluate(model, batch)
    torch.manual_seed(2)
    if not first or not all(torch.isfinite(t).all() for t in first):
        raise Unjudged("the plain model gives no finite numbers")
    if same(first, evaluate(model, batch)):
        raise Unjudged("the plain model is random in evaluation")
    again = reload(model)
    if difference := same(first, evaluate(again, batch)):
        raise Unjudged(f"the plain model reloads as another one: {difference}")
    try:
        loss_of(again.train(), inputs(1), 0).backward()
    except Exception as error:
        raise Unjudged(f"the plain model does not train: {brief(error)}") from error


def judge(model_type: str) -> dict[str, Any]:
    """One type's record."""
    began, where = time.monotonic(), ["plain model"]
    record: dict[str, Any] = {"type": model_type}

    @contextlib.contextmanager
    def step(name: str) -> Iterator[None]:
        where[0] = name
        yield

    def expect(found: list[Tensor], wanted: list[Tensor]) -> None:
        if difference := same(found, wanted):
            raise Wrong(difference)

    try:
        model, inputs = plain_model(model_type)
        plain = evaluate(model, inputs(9))
        record |= {"class": type(model).__name__, "parameters": sum(p.numel() for p in model.parameters())}
        with step("binarize_model"):
            binarize_model(model.train(), example_inputs=inputs(0))
            plan = get_plan(model)
            record |= {"layers": len(plan.entries), "stages": plan.stage_count, "left": Counter(plan.left.values())}
            expect(evaluate(model, inputs(9)), plain)
        with step("training"):
            train(model, inputs)
        with step("frozen"):
            states = Counter(layer.stage_state for layer in binary_layers(model).values())
            if set(states) != {"frozen"}:
                raise Wrong(f"layers in the states {dict(states)}")
            frozen = evaluate(model, inputs(9))
            if not all(torch.isfinite(t).all() for t in frozen):
                raise Wrong("outputs are not finite")
        with step("reload"):
            expect(evaluate(reload(model), inputs(9)), frozen)
        with step("pack_model"):
            expect(evaluate(pack_model(model), inputs(9)), frozen)
        with step("reload of the packed model"):
            expect(evaluate(reload(model), inputs(9)), frozen)
        record |= {"verdict": "ok", "why": ""}
    except Unjudged as error:
        record |= {"verdict": "not judged", "why": f"{error}"}
    except NothingToBinarizeError as error:
        record |= {"verdict": "nothing", "why": f"{error}"}
    except Exception as error:
        record |= {"verdict": "wrong", "why": f"{where[0]}: {brief(error)}", "trace": traceback.format_exc()}
    return {**record, "seconds": round(time.monotonic() - began, 1)}


def brief(error: BaseException) -> str:
    kind = "" if isinstance(error, (Unjudged, Wrong)) else f"{type(error).__name__}: "
    return f"{kind}{error}".replace("\n", " ")[:300]


# ---- all of them ----


def _child(model_type: str, pipe: Any) -> None:
    quiet()
    sys.stderr = open("/dev/null", "w")  # noqa: SIM115  # progress bars of hundreds of small files
    pipe.send(judge(model_type))


def judge_apart(model_type: str, seconds: float = SECONDS) -> dict[str, Any]:
    """judge() in a fork: a crash or an endless loop is a record too."""
    here, there = multiprocessing.get_context("fork").Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_child, args=(model_type, there))
    process.start()
    there.close()
    try:
        if here.poll(seconds):
            return here.recv()
        return {"type": model_type, "verdict": "not judged", "why": f"takes more than {seconds:.0f} s"}
    except EOFError:
        process.join()
        return {"type": model_type, "verdict": "wrong", "why": f"the process died, exit code {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def quiet() -> None:
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name in ("stompp_hf", "torch", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)


def table(records: dict[str, dict[str, Any]]) -> str:
    counts = Counter(record["verdict"] for record in records.values())
    lines = [", ".join(f"{count} {verdict}" for verdict, count in counts.most_common()), ""]
    for verdict in ("wrong", "nothing", "not judged", "ok"):
        found = [record for record in records.values() if record["verdict"] == verdict]
        if found:
            lines += [
                f"## {verdict}: {len(found)}",
                "",
                "| type | class | binary layers | stages | why |",
                "|---|---|---|---|---|",
            ]
            keys = ("type", "class", "layers", "stages", "why")
            lines += ["| " + " | ".join(str(r.get(key, "")).replace("|", "\\|") for key in keys) + " |" for r in found]
            lines += [""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/model_types"), help="folder of the results")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these types, judged anew, nothing written")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time limit of a type")
    args = parser.parse_args()
    if args.only:
        for name in args.only:
            record = judge_apart(name, args.seconds)
            print(json.dumps({key: value for key, value in record.items() if key != "trace"}, indent=1))
            print(record.get("trace", ""))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "results.json"
    records = json.loads(file.read_text()) if file.exists() else {}
    for name in CONFIG_MAPPING:
        if name in records:
            continue
        records[name] = judge_apart(name, args.seconds)
        print(f"{records[name]['verdict']:10} {name:40} {records[name]['why'][:140]}", flush=True)
        file.write_text(json.dumps(records, indent=1))
        (args.out / "results.md").write_text(table(records))
    print(table(records).splitlines()[0])


if __name__ == "__main__":
    main()

"""FSDP2 against one process, on two CPU processes; writes what it found as JSON. Run by test_fsdp.py:

python -m torch.distributed.run --nproc_per_node 2 tests/sharded_ranks.py OUT
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers as hf
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from stompp_hf import Progression, StoMPPConfig, binarize_model, calibrate, pack_model, restore_model
from stompp_hf.errors import StoMPPError
from stompp_hf.integrations.sharding import local, whole
from stompp_hf.training import metrics
from stompp_hf.training.distillation import Distiller, snapshot

TOTAL, RANKS, ROWS = 16, 2, 8
Batch = dict[str, Tensor]


def bert(dtype: torch.dtype = torch.float64) -> hf.PreTrainedModel:
    """The same small BERT each time, without dropout."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 3}
    sizes |= {"intermediate_size": 25}  # odd: parts of different sizes
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return hf.BertForSequenceClassification(hf.BertConfig(**sizes, **none)).to(dtype).train()


def build(blocks: bool | None, options: dict[str, Any], policy: MixedPrecisionPolicy | None = None) -> nn.Module:
    """Binarized; sharded by blocks (True), as a whole only (False), or not at all (None)."""
    dtype = torch.float64 if policy is None else torch.float32
    model = binarize_model(bert(dtype), StoMPPConfig(**{"refresh_rate": 3, "end": 0.8, "check_every": 4, **options}))
    more: dict[str, Any] = {} if policy is None else {"mp_policy": policy}
    if blocks:
        for block in model.bert.encoder.layer:
            fully_shard(block, **more)
    if blocks is not None:
        fully_shard(model, **more)
    return model


def batch(seed: int) -> Batch:
    """All rows of a step; each process takes its share of them."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 50, (ROWS, 6), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.sum(1) % 3}


def parts(rows: Batch, sharded: bool, micro: int) -> list[Batch]:
    """The micro-batches of one process: the same rows altogether, on one process or on two."""
    result = []
    for chunk in range(micro):
        mine = {key: value.chunk(micro)[chunk] for key, value in rows.items()}
        result.append({k: v.chunk(RANKS)[dist.get_rank()] for k, v in mine.items()} if sharded else mine)
    return result


class Run:
    """One training run, with what is compared: masks at each step, losses, metrics."""

    def __init__(self, blocks: bool | None, kind: str = "adamw", total: int = TOTAL, micro: int = 1,
                 evaluates: bool = False, checkpointing: bool = False, policy: MixedPrecisionPolicy | None = None,
                 teaches: bool = False, same_rows: bool = False, **options: Any) -> None:  # fmt: skip
        self.model = build(blocks, options, policy)
        self.sharded, self.total, self.micro, self.evaluates = blocks is not None, total, micro, evaluates
        self.shares_rows = self.sharded and not same_rows
        if checkpointing:
            self.model.activation_checkpointing_enable()
        self.distiller = Distiller(self.model, bert()) if teaches else None
        optimizers: dict[str, Callable[..., torch.optim.Optimizer]] = {
            "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1),
            "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
        }
        self.optimizer = optimizers[kind](self.model.parameters())
        self.begin()
        self.masks: list[Tensor | None] = []
        self.numbers: list[float] = []
        self.shares: list[float] = []

    def begin(self) -> None:
        """Start, or go on where a loaded model stands."""
        self.progression = Progression(self.model, self.total)
        self.progression.attach(self.optimizer)
        self.flips = metrics.FlipRatio(self.model)

    def go(self, first: int = 0, last: int | None = None) -> "Run":
        """Steps [first, last), and the state after them."""
        last = self.total if last is None else last
        for step in range(first, last):
            self.progression.step(step)
            members = self.progression.layers.values()
            self.masks += [getattr(member, name) for member in members for name in member.mask_names]
            self.masks = [None if mask is None else mask.clone() for mask in self.masks]
            for rows in parts(batch(step), self.shares_rows, self.micro):
                loss = self.model(**rows).loss / self.micro
                loss.backward()
                self.numbers.append(self.mean(loss))
            flow = metrics.gradient_flow(self.model).values()
            self.numbers += [sum(f.norm for f in flow), self.flips.update()]
            self.shares += [metrics.blocked_unfrozen(self.model), metrics.blocked_upstream(self.model)]
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.evaluates:
                self.numbers.append(self.evaluate(step))
        self.progression.step(last)
        self.numbers.append(self.evaluate(last))
        return self

    def evaluate(self, step: int) -> float:
        """The loss in eval mode, as it is and as if the model were fully binary."""
        self.model.eval()
        rows = parts(batch(1000 + step), self.shares_rows, 1)
        with torch.no_grad():
            now = self.mean(self.model(**rows[0]).loss)
            with self.progression.committed(rows):
                binary = self.mean(self.model(**rows[0]).loss)
        self.model.train()
        return now + 10 * binary

    def mean(self, value: Tensor) -> float:
        """Over the processes, where each of them has a share of the rows."""
        value = value.detach().clone()
        if self.sharded:
            dist.all_reduce(value)
            value /= RANKS
        return value.item()

    def tensors(self) -> dict[str, Tensor]:
        """All parameters and buffers, whole."""
        self.progression.step(self.progression.current_step)
        return {name: whole(tensor).clone() for name, tensor in self.model.state_dict().items()}


def difference(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """The largest one of an entry, in units of the tensor's largest entry (or of 1, where that is less)."""
    assert left.keys() == right.keys()
    found = []
    for name, tensor in left.items():
        a, b = tensor.double(), right[name].double()
        assert torch.equal(a.isfinite(), b.isfinite()), name
        apart = torch.where(a.isfinite(), (a - b).abs(), 0.0).max()
        found.append(float(apart / a[a.isfinite()].abs().max().clamp_min(1.0)) if a.isfinite().any() else 0.0)
    return max(found)


def same_masks(left: Run, right: Run) -> bool:
    """Whether all masks at all steps are equal; at least one must be there."""
    pairs = list(zip(left.masks, right.masks, strict=True))
    assert any(mask is not None for mask, _ in pairs) or left.progression.config.end == 0.0
    return all((a is None and b is None) or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)


def apart(left: list[float], right: list[float]) -> float:
    """The largest difference of two numbers in the same place."""
    return max(abs(a - b) for a, b in zip(left, right, strict=True))


def compared(blocks: bool = True, **options: Any) -> dict[str, Any]:
    """One run in one process, and the same sharded."""
    plain, sharded = Run(None, **options).go(), Run(blocks, **options).go()
    return {
        "masks": same_masks(plain, sharded),
        "weights": difference(plain.tensors(), sharded.tensors()),
        "numbers": apart(plain.numbers, sharded.numbers),
        "shares": apart(plain.shares, sharded.shares),
        "complete": sharded.progression.is_complete(),
    }


def checkpoints(folder: Path) -> dict[str, Any]:
    """Killed at step 9 of 16: from parts, from whole values into parts, and from whole values into one process."""
    options: dict[str, Any] = {"frozen_gradient": "zero"}
    straight = Run(True, **options).go()
    cut = Run(True, **options).go(0, 9)
    model_state, optimizer_state = get_state_dict(cut.model, cut.optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    full = get_model_state_dict(cut.model, options=StateDictOptions(full_state_dict=True))

    resumed = Run(True, **options)
    model_state, optimizer_state = get_state_dict(resumed.model, resumed.optimizer)
    dcp.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    set_state_dict(resumed.model, resumed.optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
    resumed.begin()
    placed = resumed.progression.current_step
    resumed.go(9)

    whole_model, parted = Run(None, **options), Run(True, **options)
    whole_model.model.load_state_dict(full)
    set_model_state_dict(parted.model, full, options=StateDictOptions(full_state_dict=True))
    for run in (whole_model, parted):  # a new optimizer: its state is not in a model's checkpoint
        run.begin()
        run.go(9)
    return {
        "step": placed,
        "sharded": difference(straight.tensors(), resumed.tensors()),
        "full": difference(whole_model.tensors(), parted.tensors()),
        "masks": same_masks(whole_model, parted),
    }


def calibrated() -> dict[str, Any]:
    """`calibrate` over several batches: values of the first call during it, of all calls after it."""
    models = [build(None, {"attention": "binarize"}), build(True, {"attention": "binarize"})]
    for sharded, model in enumerate(models):
        Progression(model, 4).step(4)
        calibrate(model, [parts(batch(seed), bool(sharded), 1)[0] for seed in range(3)])
    values = [{name: whole(t) for name, t in model.state_dict().items()} for model in models]
    return {"values": difference(*values)}


def message_of(function: Callable[[], Any]) -> str:
    """What an error of this library says."""
    try:
        function()
    except StoMPPError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def refused() -> dict[str, str]:
    """Calls that need whole parameters."""
    model, plain = build(True, {}), bert()
    fully_shard(plain)
    progression = Progression(model, TOTAL)
    if dist.get_rank() == 1:  # on one process only: all of them must say so, or the others wait forever
        with torch.no_grad():
            local(model.bert.encoder.layer[0].output.dense.weight)[0, 0] = torch.nan
    return {
        "nan": message_of(progression.check_latents),
        "binarize": message_of(lambda: binarize_model(plain, example_inputs=batch(0))),
        "restore": message_of(lambda: restore_model(model)),
        "pack": message_of(lambda: pack_model(model, commit=True)),
        "snapshot": message_of(lambda: snapshot(model)),
    }


def half() -> dict[str, Any]:
    """Parameters gathered as bfloat16: the same masks, and binary at the end."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    runs = [Run(True, policy=policy, frozen_gradient=regime).go() for regime in ("zero", "windowed_ste")]
    exact = [Run(None, policy=policy, frozen_gradient=regime).go() for regime in ("zero", "windowed_ste")]
    losses = [apart(run.numbers[::3], other.numbers[::3]) for run, other in zip(runs, exact, strict=True)]
    return {"masks": all(map(same_masks, runs, exact)), "losses": max(losses)}


BEYOND = {"attention": "binarize", "embeddings": "binarize"}
"""STE-free: with a surrogate, splitting the batch alone moves this almost uniform attention by 1e-7 in one process."""
SCENARIOS: dict[str, Callable[..., dict[str, Any]]] = {
    "ste-free, 50 steps": lambda _: compared(frozen_gradient="zero", total=50),
    "with ste, evaluated": lambda _: compared(evaluates=True),
    "whole model only, evaluated": lambda _: compared(blocks=False, evaluates=True, frozen_gradient="zero"),
    "attention and embeddings": lambda _: compared(**BEYOND, frozen_gradient="zero", kind="sgd"),
    "at once, two micro-batches": lambda _: compared(start=0.0, end=0.0, attention="binarize", kind="sgd", micro=2),
    "slow pending, checkpointing": lambda _: compared(pending_lr=0.5, checkpointing=True, frozen_gradient="zero"),
    "taught": lambda _: compared(teaches=True, same_rows=True),
    "checkpoints": checkpoints,
    "calibrated": lambda _: calibrated(),
    "refused": lambda _: refused(),
    "half": lambda _: half(),
}


def main(out: Path) -> None:
    """Run every scenario; the first process writes the results."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {}
    for name in sys.argv[2:] or SCENARIOS:
        found[name] = SCENARIOS[name](out / name)
        dist.barrier()
    every: list[Any] = [None] * RANKS
    dist.all_gather_object(every, found)
    if dist.get_rank() == 0:
        (out / "found.json").write_text(json.dumps(every), encoding="utf-8")
    dist.destroy_process_group()
    sys.stderr.flush()
    os._exit(0)  # gloo's threads may outlive the interpreter, which then aborts


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main(Path(sys.argv[1]))

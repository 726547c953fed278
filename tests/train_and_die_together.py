"""Train a tiny BERT with Trainer on two processes, one of which may be ended by SIGKILL.

    python -m torch.distributed.run --standalone --nproc_per_node 2 tests/train_and_die_together.py '{"out": ...}'

A job names `out`, and may have `kill`: {"rank", "step", "seconds"}: that process dies so many seconds after the save
that follows the step began (with "saves": true), or after the step.
"""

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import torch
from models import CASES, quick
from train_and_die import TOTAL, WINDOWS, Recorder, arguments, rows
from transformers import Trainer, TrainerCallback

from stompp_hf import StoMPPTrainerCallback, binarize_model, last_whole_checkpoint


class DiesLater(TrainerCallback):
    """Ends this process some time after a step."""

    def __init__(self, kill: dict[str, Any]) -> None:
        self.kill = kill

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.kill["step"]:
            timer = threading.Timer(self.kill["seconds"], os.kill, (os.getpid(), signal.SIGKILL))
            timer.daemon = True
            timer.start()


def main(job: dict[str, Any]) -> None:
    """One run, from the last whole checkpoint if there is one."""
    torch.set_num_threads(1)
    out, rank, world = Path(job["out"]), int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(rank)  # what is equal on all ranks is so by the library's doing
    model = CASES["bert"].build()
    if not job.get("dropout", True):
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    model = binarize_model(model, quick(frozen_gradient=job.get("regime", "zero"), **WINDOWS, **job.get("options", {})))
    args = arguments(out, per_device_train_batch_size=8 // world, save_total_limit=2, ddp_backend="gloo")
    trainer = Trainer(model, args, train_dataset=rows(48))
    StoMPPTrainerCallback().attach(trainer)
    if rank == 0:
        trainer.add_callback(Recorder(str(out)))
    kill = job.get("kill")
    if kill and kill["rank"] == rank:
        trainer.add_callback(DiesLater(kill))
    before = last_whole_checkpoint(out, processes=job.get("saved_by"))
    trainer.train(resume_from_checkpoint=before)
    if rank == 0:
        torch.save(model.state_dict(), out / "final.pt")
        (out / "history.json").write_text(json.dumps(trainer.state.log_history))
        (out / "began.json").write_text(json.dumps(before and Path(before).name))
    assert trainer.state.global_step == TOTAL
    if world > 1:
        torch.distributed.barrier()
        sys.stderr.flush()
        os._exit(0)  # gloo's threads may outlive the interpreter, which then aborts


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))

"""Fine-tune a text classifier into a fully binary one with accelerate and a loop of your own, without Trainer.

    python examples/run_glue_no_trainer.py --output_dir runs/loop                      # offline, a few minutes on a CPU
    accelerate launch examples/run_glue_no_trainer.py --model_name_or_path bert-base-uncased --task_name sst2 ...

What StoMPP adds to an ordinary loop is marked (1) to (5). Data and model code are those of run_glue.py.
"""

import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from glue_data import DataArguments, load_task, prepare
from run_glue import ModelArguments, load_model
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, HfArgumentParser, get_scheduler, set_seed

from stompp_hf import Progression, StoMPPConfig, binarize_model, parameter_groups


@dataclass
class LoopArguments:
    """How the model is trained; without a checkpoint a small BERT from scratch, which warms up in full precision."""

    output_dir: str = field(metadata={"help": "Where the model is saved."})
    model_name_or_path: str | None = field(default=None, metadata={"help": "Checkpoint to fine-tune."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate (from scratch: 1e-3)."})
    num_train_epochs: int = field(default=3, metadata={"help": "Epochs (from scratch: 8)."})
    batch_size: int = field(default=32, metadata={"help": "Examples a process and step."})
    seed: int = field(default=42, metadata={"help": "Seed of new weights, the order of the data, and dropout."})


def evaluate(accelerator: Accelerator, model: Any, loader: Any, task: Any) -> dict[str, float]:
    """The task's metrics on a data loader."""
    model.eval()
    pairs = []
    for batch in loader:
        with torch.no_grad():
            logits = model(**batch).logits
        answers = logits.squeeze(-1) if task.is_regression else logits.argmax(-1)
        pairs.append(accelerator.gather_for_metrics((answers, batch["labels"])))
    model.train()
    return task.metrics(*(torch.cat(parts).cpu().numpy() for parts in zip(*pairs, strict=True)))


def main() -> None:
    """Train, print the metrics half-way and at the end, save."""
    parser = HfArgumentParser((LoopArguments, DataArguments, StoMPPConfig))
    if not any(word.startswith("--model_name_or_path") for word in sys.argv[1:]):
        parser.set_defaults(learning_rate=1e-3, num_train_epochs=8, start=0.3, end=0.8)
    args, data_args, stompp = parser.parse_args_into_dataclasses()
    # Scales of layers that are still real take no part in a step, which DDP has to be told.
    accelerator = Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])
    set_seed(args.seed)
    task = load_task(data_args)
    model, tokenizer = load_model(ModelArguments(model_name_or_path=args.model_name_or_path), task)
    model = binarize_model(model, stompp)  # (1) before the optimizer: layers gain learnable scales and thresholds
    with accelerator.main_process_first():
        data = prepare(task, tokenizer, data_args)
    collate = DataCollatorWithPadding(tokenizer)
    train = DataLoader(data["train"], args.batch_size, shuffle=True, collate_fn=collate)
    validation = DataLoader(data["validation"], args.batch_size, collate_fn=collate)
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=0.01), lr=args.learning_rate)
    model, optimizer, train, validation = accelerator.prepare(model, optimizer, train, validation)

    total = len(train) * args.num_train_epochs
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=total // 20, num_training_steps=total)
    progression = Progression(model, total)  # (2)
    progression.attach(optimizer)  # (3) holds frozen entries, STE-free
    model.train()
    for step, batch in enumerate(batch for _ in range(args.num_train_epochs) for batch in train):
        progression.step(step)  # (4) the state of every stage after `step` updates
        if step == total // 2:
            number, name, share = progression.stage_in_transition()
            metrics = evaluate(accelerator, model, validation, task)
            accelerator.print(f"step {step} of {total}, stage {number} ({name}) {share:.0%} frozen: {metrics}")
        accelerator.backward(model(**batch).loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    progression.step(total)  # (5) now every stage is frozen
    kind = "fully binary" if progression.is_complete() else "not fully binary"
    accelerator.print(f"step {total} of {total}, {kind}: {evaluate(accelerator, model, validation, task)}")
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(args.output_dir)
        tokenizer.save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()

"""Binarize my model: load, binarize, look, train, pack, report.

    python examples/walk_through.py                              # offline, about a minute on a CPU
    python examples/walk_through.py --model_name_or_path PATH    # your own text classifier

The cells (`# %%`) run one by one in an editor that knows them (VS Code, Spyder, PyCharm), and become a notebook with
`jupytext --to notebook examples/walk_through.py`.
"""

# %% What is run
import argparse
from pathlib import Path

import numpy as np
import torch
from glue_data import DataArguments, load_task, prepare
from run_glue import ModelArguments, load_model
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

from stompp_hf import (
    GradientNormCallback,
    StoMPPConfig,
    StoMPPTrainerCallback,
    binarize_model,
    create_optimizer,
    pack_model,
    read_run,
    record_run,
    report,
)
from stompp_hf.checkpoints.inspection import inspect
from stompp_hf.reports.html_report import write_report

parser = argparse.ArgumentParser(description="Binarize my model, from load to report.")
parser.add_argument("--model_name_or_path", help="checkpoint of a text classifier; without it, a small BERT")
parser.add_argument("--output_dir", type=Path, default=Path("runs/walk_through"))
parser.add_argument("--max_steps", type=int, default=800)
parser.add_argument("--train_samples", type=int, default=8000)
args, _ = parser.parse_known_args()  # a notebook has words of its own on its command line
set_seed(0)

# %% [markdown]
# ## 1. Load
# A model and its data. Here: sentences from a small grammar, and, without a checkpoint, a BERT with random weights.

# %%
task = load_task(DataArguments(grammar_train_samples=args.train_samples))
model, tokenizer = load_model(ModelArguments(model_name_or_path=args.model_name_or_path), task)
data = prepare(task, tokenizer, DataArguments())
batch = tokenizer(list(task.data["validation"]["sentence"][:8]), padding=True, return_tensors="pt")
with torch.no_grad():
    original = model.eval()(**batch).logits

# %% [markdown]
# ## 2. Binarize
# One call, before the Trainer is made. It changes no value: nothing is frozen yet, and the logits are what they were.
# The first 30% of the run stay in full precision, since this model has learnt nothing yet; a fine-tuned one needs less.

# %%
model = binarize_model(model, StoMPPConfig(start=0.3, end=0.8))
with torch.no_grad():
    assert torch.equal(model.eval()(**batch).logits, original)

# %% [markdown]
# ## 3. Look
# What becomes binary, in which stages, and what stays real and why.

# %%
print(report(model))

# %% [markdown]
# ## 4. Train
# The usual Trainer. One callback freezes stage by stage; the other one, if you like, logs the gradient of each stage.

# %%
training = TrainingArguments(
    output_dir=str(args.output_dir), max_steps=args.max_steps, per_device_train_batch_size=32,
    per_device_eval_batch_size=128, learning_rate=1e-3, warmup_steps=0.05, max_grad_norm=1.0,
    logging_steps=max(1, args.max_steps // 100), eval_strategy="steps", eval_steps=max(1, args.max_steps // 10),
    save_strategy="steps", save_steps=0.25, report_to="none", dataloader_pin_memory=torch.accelerator.is_available(),
)  # fmt: skip
trainer = Trainer(
    model, training, train_dataset=data["train"], eval_dataset=data["validation"], processing_class=tokenizer,
    data_collator=DataCollatorWithPadding(tokenizer), optimizers=(create_optimizer(model, training), None),
    compute_metrics=lambda p: task.metrics(np.argmax(p.predictions, axis=1), p.label_ids),
    callbacks=[GradientNormCallback()],
)  # fmt: skip
StoMPPTrainerCallback().attach(trainer)
record_run(args.output_dir, {"learning_rate": training.learning_rate, "max_steps": training.max_steps})
trainer.save_metrics("train", trainer.train().metrics)
trainer.save_model()
trainer.save_metrics("eval", trainer.evaluate())
trainer.save_state()

# %% [markdown]
# ## 5. Pack
# Training needs latent weights, 32 bits each. What ships are their signs, 8 a byte: the same logits, bit for bit.

# %%
with torch.no_grad():
    trained = trainer.model.cpu().eval()(**batch).logits
packed = args.output_dir / "packed"
pack_model(trainer.model).save_pretrained(packed)
reloaded = AutoModelForSequenceClassification.from_pretrained(packed)
with torch.no_grad():
    assert torch.equal(reloaded.eval()(**batch).logits, trained)
print(inspect(packed))

# %% [markdown]
# ## 6. Report
# One HTML file: pictures of how it went, the configuration, sizes, versions. Several folders are put side by side.

# %%
run = read_run(args.output_dir)
print("accuracy over the run:", dict(zip(*run.series("eval_accuracy"), strict=True)))
print(write_report([args.output_dir]))

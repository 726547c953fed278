"""Train an image classifier into a fully binary one with Trainer: a hub data set, a folder, parquet files, or digits.

    python examples/run_image_classification.py --output_dir runs/digits    # offline, a few minutes: compares methods
    accelerate launch examples/run_image_classification.py examples/configs/imagenet_resnet50_paper.yaml
    python examples/run_image_classification.py examples/configs/cifar10_resnet18_paper.yaml \
        examples/configs/bwn_ste_free.yaml --num_train_epochs 50            # what comes later wins

In the shape of transformers' run_image_classification.py, with a fourth group of options: StoMPPConfig.
"""

import copy
import json
import logging
import os
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from image_data import DataArguments, Task, collate, load_task, prepare
from image_model import ModelArguments, load_config, load_model, load_processor
from options import config_of, publish, read_words, resumed_from, set_up_logging
from stage_edges import print_stages
from transformers import (
    AutoModelForImageClassification,
    HfArgumentParser,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from stompp_hf import (
    StoMPPConfig,
    StoMPPTrainerCallback,
    create_optimizer,
    get_plan,
    report,
)
from stompp_hf.surgery.members import binary_layers

logger = logging.getLogger(__name__)


DEMO = {
    "config_name": "small_image_resnet", "image_size": 8, "augmentation": "shift", "horizontal_flip": False,
    "config_overrides": "depths=[2,2,2],hidden_sizes=[16,32,64],embedding_size=16,layer_type=basic",
    "preset": "paper", "end": 0.9, "refresh_rate": 20, "optim": "sgd", "optim_args": "momentum=0.9",
    "learning_rate": 0.1, "lr_scheduler_type": "constant", "num_train_epochs": 20, "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 450, "logging_strategy": "no", "save_strategy": "no", "disable_tqdm": True,
    "do_train": True, "do_eval": True,
}  # fmt: skip
"""Defaults of the embedded run: a small residual network from scratch by the paper's rule and recipe.

Except that gradients are clipped at norm 1 (Trainer's default): without it vanilla STE's loss becomes infinite.
"""

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "full precision": ("full_precision", {}),
    "vanilla STE": ("vanilla_ste", {}),
    "StoMPP STE-free": ("stompp", {"frozen_gradient": "zero"}),
    "StoMPP+STE": ("stompp", {"frozen_gradient": "ste"}),
}
"""What `--compare` compares."""

SOURCES = {"dataset_name", "train_dir", "validation_dir", "train_file", "validation_file"}
MODELS = {"model_name_or_path", "config_name"}


def parse(words: list[str]) -> tuple[ModelArguments, DataArguments, TrainingArguments, StoMPPConfig]:
    """Options from any number of .json and .yaml files, then from the command line; what comes later wins."""
    read = read_words(words)
    demo = {} if read.given & (SOURCES | MODELS) else {**DEMO, "compare": "method" not in read.given}
    paper = StoMPPConfig.paper().to_dict() if (read.preset or demo.get("preset")) == "paper" else {}
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments, StoMPPConfig))
    pin = torch.accelerator.is_available()
    parser.set_defaults(remove_unused_columns=False, dataloader_pin_memory=pin, **{**paper, **demo})
    return parser.parse_args_into_dataclasses(read.words)  # type: ignore[return-value]


def accuracy_function(data_args: DataArguments) -> Any:
    """(predictions, references) -> accuracy; `evaluate`'s for a hub data set, if it can load it: the same number."""
    if data_args.source == "hub":
        import evaluate

        try:
            metric = evaluate.load("accuracy")
            return lambda p, r: float(metric.compute(predictions=p, references=r)["accuracy"])
        except Exception as error:  # evaluate raises many kinds of errors when the hub is out of reach
            logger.info("evaluate.load('accuracy') failed (%s); it is computed here.", type(error).__name__)
    return lambda p, r: float((np.asarray(p) == np.asarray(r)).mean())


def answer(logits: Any) -> torch.Tensor:
    """The likeliest label; kept in place of all logits, which would be 50 million numbers for ImageNet."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


class NewEpoch(TrainerCallback):
    """Tells the training data which epoch it is: accelerate does so in one process only."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.data.set_epoch(int(state.epoch or 0))


def train(
    model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments, stompp: StoMPPConfig, task: Task
) -> tuple[Trainer, dict[str, float]]:
    """Train, evaluate and save one model; the trainer and the metrics of its evaluation."""
    set_seed(args.seed)
    stompp = config_of(model_args.method, stompp)
    config = load_config(model_args, task.labels)
    processor, pixels = load_processor(model_args, data_args, config)
    checkpoint = resumed_from(args)
    model = load_model(model_args, config, pixels.size, stompp, checkpoint)
    data = prepare(task, data_args, pixels, args.seed)
    wanted = {"train": args.do_train, "validation": args.do_eval}
    missing = [split for split, used in wanted.items() if used and split not in data]
    if missing:
        raise ValueError(f"no {' and no '.join(missing)} images: add --train_file and --validation_file, or folders.")

    accuracy = accuracy_function(data_args)
    callback = StoMPPTrainerCallback(evaluate_binary=model_args.evaluate_binary)
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=data["train"] if args.do_train else None,
        eval_dataset=data["validation"] if args.do_eval else None,
        compute_metrics=lambda prediction: {"accuracy": accuracy(prediction.predictions, prediction.label_ids)},
        preprocess_logits_for_metrics=lambda logits, labels: answer(logits),
        processing_class=processor,
        data_collator=collate,
        optimizers=(create_optimizer(model, args), None) if args.do_train else (None, None),
    )
    callback.attach(trainer)
    model_args.add_to(trainer, model_args.method)
    if args.do_train:
        model_args.record(trainer, model_args, data_args, args)
    if args.do_train:
        trainer.add_callback(NewEpoch(data["train"]))
    if model_args.evaluate_stages and args.do_train and args.do_eval:
        model_args.add_stop(trainer, callback, "accuracy")

    summary: dict[str, float] = {}
    if args.do_train:
        metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
        if not data_args.streaming:
            metrics["train_samples"] = len(data["train"])
        trainer.save_model()
        if not model_args.compare:
            trainer.log_metrics("train", metrics)
        trainer.save_metrics("train", metrics)
        trainer.save_state()
        summary.update(metrics)
    if args.do_eval:
        metrics = trainer.evaluate()
        if not model_args.compare:
            trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
        summary.update(metrics)
    card: dict[str, Any] = {
        "tasks": "image-classification", "finetuned_from": model_args.model_name_or_path,
        "dataset": data_args.dataset_name, "tags": ["stompp", "1-bit"],
    }  # fmt: skip
    publish(trainer, card)
    return trainer, summary


def compare(
    model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments, stompp: StoMPPConfig, task: Task
) -> dict[str, dict[str, float]]:
    """Train by every method from the same seed, so from equal weights and on equal batches, and print a table."""
    lines = [
        f"\nHeld-out accuracy in %; preset {model_args.preset}, {args.optim.value}, lr {args.learning_rate:g}",
        f"{'method':16} {'binary layers':>13} {'accuracy':>9} {'minutes':>8}",
    ]
    results = {}
    logging.getLogger("stompp_hf").setLevel(logging.WARNING)  # one report, at the end, is enough
    for name, (method, options) in METHODS.items():
        one = copy.copy(args)
        one.output_dir = os.path.join(args.output_dir, name.lower().replace(" ", "_").replace("+", "_"))
        trainer, results[name] = train(
            replace(model_args, method=method), data_args, one, replace(stompp, **options), task
        )
        layers = binary_layers(trainer.model).values()
        frozen = sum(layer.stage_state == "frozen" for layer in layers)
        accuracy, minutes = 100 * results[name]["eval_accuracy"], results[name]["train_runtime"] / 60
        lines.append(f"{name:16} {f'{frozen} of {len(layers)}':>13} {accuracy:9.2f} {minutes:8.2f}")
    if trainer.is_world_process_zero():
        print("\n".join(lines))
        print(report(trainer.model).splitlines()[0])
        print(reload_note(trainer))
        with open(os.path.join(args.output_dir, "comparison.json"), "w", encoding="utf-8") as file:
            json.dump(results, file, indent=2)
    return results


def reload_note(trainer: Trainer) -> str:
    """Whether the saved model, read again, gives the logits of the trained one on held-out images."""
    folder, model = trainer.args.output_dir, trainer.model.eval()
    again = AutoModelForImageClassification.from_pretrained(folder).to(model.device).eval()
    images = collate([trainer.eval_dataset[i] for i in range(16)])["pixel_values"].to(model.device)
    with torch.no_grad():
        equal = torch.equal(model(pixel_values=images).logits, again(pixel_values=images).logits)
    return f"AutoModelForImageClassification.from_pretrained({folder!r}): logits {'equal' if equal else 'DIFFER'}"


def print_course(trainer: Trainer, summary: dict[str, float]) -> None:
    """What became binary, and how accuracy went as stages froze."""
    plan = get_plan(trainer.model)
    print(report(trainer.model).splitlines()[0])
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, StoMPPTrainerCallback))
    progression = callback.progression
    if progression is None or plan.config.binarize == "nothing":
        print(f"full precision: {summary.get('eval_accuracy', float('nan')):.4f}")
        return
    print_stages(trainer, callback, "eval_accuracy")
    if progression.is_complete() and "eval_accuracy" in summary:
        print(f"{progression.outcome} ({plan.config.binarize.replace('_', ' ')}): {summary['eval_accuracy']:.4f}")


def main() -> dict[str, Any]:
    """Train, evaluate, compare; returns the metrics that were printed."""
    model_args, data_args, args, stompp = parse(sys.argv[1:])
    set_up_logging(args)
    with args.main_process_first(desc="reading the data"):
        task = load_task(data_args, model_args.cache_dir, model_args.token)
    if model_args.compare:
        return compare(model_args, data_args, args, stompp, task)
    trainer, summary = train(model_args, data_args, args, stompp, task)
    if args.do_train and trainer.is_world_process_zero():
        print_course(trainer, summary)
    return summary


if __name__ == "__main__":
    main()

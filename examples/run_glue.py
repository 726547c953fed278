"""Fine-tune a text classifier into a fully binary one with Trainer: GLUE, local files, or an embedded data set.

    python examples/run_glue.py --output_dir runs/demo          # offline, a few minutes on a CPU
    accelerate launch examples/run_glue.py --model_name_or_path bert-base-uncased --task_name sst2 \
        --do_train --do_eval --output_dir runs/sst2
    python examples/run_glue.py options.yaml                    # options from a file

In the shape of transformers' run_glue.py, with a fourth group of options: StoMPPConfig.
"""

import os
import sys
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from augmentation import AugmentArguments
from glue_data import DataArguments, load_task, majority_share, prepare, train_tokenizer
from options import (
    HubArguments,
    LoraArguments,
    MethodArguments,
    RecordArguments,
    TeacherArguments,
    config_of,
    is_binarized,
    plain_again,
    publish,
    read_words,
    resumed_from,
    set_up_logging,
)
from stage_edges import StopArguments, print_stages
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    DataCollatorWithPadding,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

from stompp_hf import (
    StoMPPConfig,
    StoMPPTrainerCallback,
    binarize_model,
    create_optimizer,
    get_plan,
    report,
)
from stompp_hf.training.metrics import frozen_fraction


@dataclass
class ModelArguments(
    HubArguments, MethodArguments, RecordArguments, TeacherArguments, LoraArguments, StopArguments, AugmentArguments
):
    """Which model, and how it is trained."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Checkpoint to fine-tune; without it a small BERT is trained from scratch."}
    )
    config_name: str | None = field(default=None, metadata={"help": "Config, if not the checkpoint's."})
    tokenizer_name: str | None = field(default=None, metadata={"help": "Tokenizer, if not the checkpoint's."})
    ignore_mismatched_sizes: bool = field(default=False, metadata={"help": "Re-create a head of another size."})
    freeze_embeddings: bool = field(default=False, metadata={"help": "Do not train the input embeddings."})
    preset: str = field(
        default="default",
        metadata={
            "help": "StoMPP options not given: the library's default, or the paper's rule.",
            "choices": ["default", "paper"],
        },
    )
    evaluate_stages: bool = field(default=True, metadata={"help": "Evaluate whenever a stage has just been frozen."})
    evaluate_binary: bool = field(
        default=False, metadata={"help": "At each evaluation, also evaluate the model as if fully binary now."}
    )


DEMO = {
    "learning_rate": 1e-3, "num_train_epochs": 8, "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 128, "warmup_steps": 100, "logging_steps": 100, "save_strategy": "no",
    "do_train": True, "do_eval": True, "start": 0.3, "end": 0.8, "gradient_norms_every": 10,
}  # fmt: skip
"""Defaults of the embedded run: a small BERT from scratch, which warms up in full precision."""


def parse(words: list[str]) -> tuple[ModelArguments, DataArguments, TrainingArguments, StoMPPConfig]:
    """Options from any number of .json and .yaml files, then from the command line; what comes later wins."""
    read = read_words(words)
    demo = {} if read.given & {"task_name", "train_file", "validation_file", "model_name_or_path"} else DEMO
    paper = StoMPPConfig.paper().to_dict() if read.preset == "paper" else {}
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments, StoMPPConfig))
    parser.set_defaults(**{**demo, **paper})
    return parser.parse_args_into_dataclasses(read.words)  # type: ignore[return-value]


def load_model(args: ModelArguments, task: Any) -> tuple[Any, Any]:
    """Model and tokenizer: a checkpoint's, or a small BERT from config and a tokenizer trained on the data."""
    labels = dict(enumerate(task.labels))
    numbers = {label: i for i, label in labels.items()}
    if args.model_name_or_path is None:
        texts = list(task.data["train"][task.columns[0]])
        tokenizer = train_tokenizer(texts)
        config = BertConfig(
            vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=4, num_attention_heads=4,
            intermediate_size=256, max_position_embeddings=128, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0, id2label=labels, label2id=numbers, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        return AutoModelForSequenceClassification.from_config(config), tokenizer
    config = AutoConfig.from_pretrained(
        args.config_name or args.model_name_or_path,
        id2label=labels, label2id=numbers, finetuning_task=task.name, **args.hub,
    )  # fmt: skip
    if task.is_regression:
        config.problem_type = "regression"
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer_name or args.model_name_or_path, **args.hub)
    model = AutoModelForSequenceClassification.from_pretrained(
        args.model_name_or_path, config=config, ignore_mismatched_sizes=args.ignore_mismatched_sizes, **args.hub
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return plain_again(model), tokenizer


def main() -> dict[str, float]:
    """Train, evaluate, predict; returns the metrics that were printed."""
    model_args, data_args, training_args, stompp = parse(sys.argv[1:])
    set_up_logging(training_args)
    set_seed(training_args.seed)
    stompp = config_of(model_args.method, stompp)
    model_args.check_augmentation(model_args.teacher, model_args.task_weight)

    task = load_task(data_args, model_args.cache_dir)
    model, tokenizer = load_model(model_args, task)
    if model_args.freeze_embeddings:
        for module in model.modules():
            if isinstance(module, type(model.get_input_embeddings())):
                module.requires_grad_(False)
    # Classifiers take num_items_in_batch and ignore it. Without this, Trainer would believe that they divide by it, and
    # multiply gradients by the number of processes and of accumulated batches.
    model.accepts_loss_kwargs = False
    adapter = model_args.lora_rank is not None
    if adapter:
        if model_args.teacher is not None:
            raise ValueError("--teacher is for a base that becomes binary; leave it out beside --lora_rank.")
        model = model_args.adapted(model, finished=is_binarized(model) and frozen_fraction(model) == 1.0)
    elif not is_binarized(model):
        model = binarize_model(model, stompp)
    with training_args.main_process_first(desc="tokenizing"):
        columns, embedding = [name for name in task.columns if name is not None], model.get_input_embeddings()
        grown = partial(
            model_args.grown, columns=columns, tokenizer=tokenizer, embedding=embedding, seed=training_args.seed
        )
        data = prepare(task, tokenizer, data_args, grown)

    def compute_metrics(prediction: Any) -> dict[str, float]:
        logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        answer = np.squeeze(logits) if task.is_regression else np.argmax(logits, axis=1)
        result = task.metrics(answer, prediction.label_ids)
        return {**result, "combined_score": float(np.mean(list(result.values())))} if len(result) > 1 else result

    callback = StoMPPTrainerCallback(evaluate_binary=model_args.evaluate_binary)
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=data["train"] if training_args.do_train else None,
        eval_dataset=data["validation"] if training_args.do_eval else None,
        compute_metrics=compute_metrics,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8 if training_args.fp16 else None),
        optimizers=(create_optimizer(model, training_args), None) if training_args.do_train else (None, None),
    )
    if not adapter:  # the base is finished: nothing is left to freeze
        callback.attach(trainer)
        model_args.add_to(trainer, model_args.method)
    if training_args.do_train:
        model_args.record(trainer, model_args, data_args, training_args)
    if not adapter and model_args.evaluate_stages and training_args.do_train and training_args.do_eval:
        model_args.add_stop(trainer, callback, task.main_metric)

    summary: dict[str, float] = {}
    if training_args.do_train:
        result = trainer.train(resume_from_checkpoint=resumed_from(training_args))
        metrics = {**result.metrics, "train_samples": len(data["train"])}
        trainer.save_model()
        trainer.log_metrics("train", metrics)
        trainer.save_metrics("train", metrics)
        trainer.save_state()
    if training_args.do_eval:
        metrics = trainer.evaluate()
        metrics["eval_samples"] = len(data["validation"])
        if task.name == "mnli" and "validation_mismatched" in data:
            other = trainer.evaluate(data["validation_mismatched"], metric_key_prefix="eval_mm")
            metrics.update({key: value for key, value in other.items() if "accuracy" in key})
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
        summary.update(metrics)
        if adapter and trainer.is_world_process_zero():
            print_adapter(model, training_args.output_dir, model_args.ignore_mismatched_sizes)
        elif training_args.do_train and trainer.is_world_process_zero():
            print_course(trainer, task, data["validation"])
    if training_args.do_predict and "test" in data:
        write_predictions(trainer, task, data["test"].remove_columns("labels"), training_args.output_dir)
    origin, name = model_args.model_name_or_path, data_args.task_name
    card: dict[str, Any] = {"tasks": "text-classification", "finetuned_from": origin, "tags": ["stompp", "1-bit"]}
    if name is not None:
        card.update(dataset_tags="glue", dataset_args=name, dataset=f"GLUE {name.upper()}")
    publish(trainer, card)
    return summary


def print_course(trainer: Trainer, task: Any, validation: Any) -> None:
    """What happened to the model's main metric as its stages froze, and what each of them would weigh if packed."""
    plan, key = get_plan(trainer.model), f"eval_{task.main_metric}"
    rows = [record for record in trainer.state.log_history if key in record]
    print(report(trainer.model).splitlines()[0])
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, StoMPPTrainerCallback))
    progression = callback.progression
    print_stages(trainer, callback, key)
    first = [r[key] for r in rows if progression and plan.freezing == len(progression.unfinished_stages(r["step"]))]
    if not task.is_regression:
        print(f"majority class: {majority_share(validation['labels']):.4f}")
    if first:
        print(f"full precision (before the first stage froze): {first[-1]:.4f}")
    if progression is not None and progression.is_complete() and plan.freezing and rows:
        print(f"{progression.outcome} ({plan.config.binarize.replace('_', ' ')}): {rows[-1][key]:.4f}")


def print_adapter(model: Any, folder: str, another_head: bool) -> None:
    """What was trained beside what, and how to load it."""
    trained, total = model.get_nb_trainable_parameters()
    base = f'"{model.get_base_model().name_or_path}"'
    if another_head:
        base += f", num_labels={model.config.num_labels}, ignore_mismatched_sizes=True"
    print(report(model).splitlines()[0])
    print(f"adapter and head: {trained:,} of {total:,} parameters, in {folder}; the base did not change. To load both:")
    print(f"    base = AutoModelForSequenceClassification.from_pretrained({base})  # after `import stompp_hf`")
    print(f'    model = peft.PeftModel.from_pretrained(base, "{folder}")')


def write_predictions(trainer: Trainer, task: Any, data: Any, folder: str) -> None:
    """One line an example, as GLUE's server wants it."""
    logits = trainer.predict(data, metric_key_prefix="predict").predictions
    logits = logits[0] if isinstance(logits, tuple) else logits
    answers = np.squeeze(logits) if task.is_regression else np.argmax(logits, axis=1)
    if trainer.is_world_process_zero():
        with open(os.path.join(folder, f"predict_results_{task.name}.txt"), "w", encoding="utf-8") as file:
            file.write("index\tprediction\n")
            for index, answer in enumerate(answers):
                file.write(f"{index}\t{answer:.3f}\n" if task.is_regression else f"{index}\t{task.labels[answer]}\n")


if __name__ == "__main__":
    main()

"""Train an image classifier on a folder, in the shape of transformers' run_image_classification.py, three lines added.

Upstream takes torchvision's transforms; these are the same in PIL and numpy, since torchvision is not installed here.
"""

import logging
import sys
from dataclasses import dataclass, field

import numpy as np
import torch
from datasets import load_dataset
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

from stompp_hf import StoMPPTrainerCallback, binarize_model  # 1 of 3


@dataclass
class DataTrainingArguments:
    train_dir: str | None = field(default=None)
    validation_dir: str | None = field(default=None)
    train_val_split: float = field(default=0.15)
    image_column_name: str = field(default="image")
    label_column_name: str = field(default="label")


@dataclass
class ModelArguments:
    model_name_or_path: str = field()
    image_processor_name: str | None = field(default=None)
    ignore_mismatched_sizes: bool = field(default=False)


def main():
    parser = HfArgumentParser((ModelArguments, DataTrainingArguments, TrainingArguments))
    model_args, data_args, training_args = parser.parse_args_into_dataclasses()
    logging.basicConfig(handlers=[logging.StreamHandler(sys.stdout)], level=training_args.get_process_log_level())
    set_seed(training_args.seed)

    data_files = {"train": f"{data_args.train_dir}/**"}
    if data_args.validation_dir is not None:
        data_files["validation"] = f"{data_args.validation_dir}/**"
    dataset = load_dataset("imagefolder", data_files=data_files)
    if data_args.train_val_split > 0.0 and "validation" not in dataset:
        split = dataset["train"].train_test_split(data_args.train_val_split)
        dataset["train"], dataset["validation"] = split["train"], split["test"]
    labels = dataset["train"].features[data_args.label_column_name].names
    label2id = {label: str(i) for i, label in enumerate(labels)}
    id2label = {str(i): label for i, label in enumerate(labels)}

    config = AutoConfig.from_pretrained(
        model_args.model_name_or_path,
        num_labels=len(labels),
        label2id=label2id,
        id2label=id2label,
        finetuning_task="image-classification",
    )
    model = AutoModelForImageClassification.from_pretrained(
        model_args.model_name_or_path, config=config, ignore_mismatched_sizes=model_args.ignore_mismatched_sizes
    )
    image_processor = AutoImageProcessor.from_pretrained(
        model_args.image_processor_name or model_args.model_name_or_path
    )
    model = binarize_model(model)  # 2 of 3
    size = image_processor.size
    size = size["shortest_edge"] if "shortest_edge" in size else (size["height"], size["width"])
    size = (size, size) if isinstance(size, int) else size

    def to_tensor(image):
        pixels = np.asarray(image.convert("RGB").resize(size[::-1]), dtype=np.float32) / 255
        pixels = (pixels - np.float32(image_processor.image_mean)) / np.float32(image_processor.image_std)
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()

    def train_transforms(example_batch):
        images = [to_tensor(image) for image in example_batch[data_args.image_column_name]]
        example_batch["pixel_values"] = [image.flip(-1) if torch.rand(()) < 0.5 else image for image in images]
        return example_batch

    def val_transforms(example_batch):
        example_batch["pixel_values"] = [to_tensor(image) for image in example_batch[data_args.image_column_name]]
        return example_batch

    def collate_fn(examples):
        return {
            "pixel_values": torch.stack([example["pixel_values"] for example in examples]),
            "labels": torch.tensor([example[data_args.label_column_name] for example in examples]),
        }

    def compute_metrics(p):
        return {"accuracy": float((np.argmax(p.predictions, axis=1) == p.label_ids).mean())}

    dataset["train"].set_transform(train_transforms)
    dataset["validation"].set_transform(val_transforms)
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=dataset["train"] if training_args.do_train else None,
        eval_dataset=dataset["validation"] if training_args.do_eval else None,
        compute_metrics=compute_metrics,
        processing_class=image_processor,
        data_collator=collate_fn,
        callbacks=[StoMPPTrainerCallback()],  # 3 of 3
    )

    if training_args.do_train:
        train_result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
        trainer.save_model()
        trainer.log_metrics("train", train_result.metrics)
        trainer.save_metrics("train", train_result.metrics)
        trainer.save_state()
    if training_args.do_eval:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    trainer.create_model_card(finetuned_from=model_args.model_name_or_path, tasks="image-classification")


if __name__ == "__main__":
    main()

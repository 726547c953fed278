"""Train extractive question answering on a json file, in the shape of transformers' run_qa.py, three lines added."""

import logging
import sys
from dataclasses import dataclass, field

import numpy as np
from datasets import load_dataset
from transformers import (
    AutoConfig,
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from stompp_hf import StoMPPTrainerCallback, binarize_model  # 1 of 3


class QuestionAnsweringTrainer(Trainer):
    """Evaluates after the answers were put together from the features, as upstream's trainer_qa.py does."""

    def __init__(self, *args, eval_examples=None, post_process_function=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.eval_examples = eval_examples
        self.post_process_function = post_process_function

    def evaluate(self, eval_dataset=None, eval_examples=None, ignore_keys=None, metric_key_prefix="eval"):
        eval_dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        eval_dataloader = self.get_eval_dataloader(eval_dataset)
        eval_examples = self.eval_examples if eval_examples is None else eval_examples
        compute_metrics, self.compute_metrics = self.compute_metrics, None
        try:
            output = self.evaluation_loop(
                eval_dataloader, description="Evaluation", ignore_keys=ignore_keys, metric_key_prefix=metric_key_prefix
            )
        finally:
            self.compute_metrics = compute_metrics
        predictions = self.post_process_function(eval_examples, eval_dataset, output.predictions)
        metrics = {f"{metric_key_prefix}_{k}": v for k, v in self.compute_metrics(predictions).items()}
        metrics.update(output.metrics)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


@dataclass
class ModelArguments:
    model_name_or_path: str = field()
    tokenizer_name: str | None = field(default=None)


@dataclass
class DataTrainingArguments:
    train_file: str | None = field(default=None)
    validation_file: str | None = field(default=None)
    max_seq_length: int = field(default=384)
    doc_stride: int = field(default=128)
    pad_to_max_length: bool = field(default=True)


def main():
    parser = HfArgumentParser((ModelArguments, DataTrainingArguments, TrainingArguments))
    model_args, data_args, training_args = parser.parse_args_into_dataclasses()
    logging.basicConfig(handlers=[logging.StreamHandler(sys.stdout)], level=training_args.get_process_log_level())
    set_seed(training_args.seed)

    raw_datasets = load_dataset(
        "json", data_files={"train": data_args.train_file, "validation": data_args.validation_file}, field="data"
    )
    config = AutoConfig.from_pretrained(model_args.model_name_or_path)
    tokenizer = AutoTokenizer.from_pretrained(model_args.tokenizer_name or model_args.model_name_or_path, use_fast=True)
    model = AutoModelForQuestionAnswering.from_pretrained(model_args.model_name_or_path, config=config)
    model = binarize_model(model)  # 2 of 3
    column_names = raw_datasets["train"].column_names
    max_seq_length = min(data_args.max_seq_length, tokenizer.model_max_length)

    def tokenize(examples):
        return tokenizer(
            [question.lstrip() for question in examples["question"]],
            examples["context"],
            truncation="only_second",
            max_length=max_seq_length,
            stride=data_args.doc_stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            padding="max_length" if data_args.pad_to_max_length else False,
        )

    def prepare_train_features(examples):
        tokenized_examples = tokenize(examples)
        sample_mapping = tokenized_examples.pop("overflow_to_sample_mapping")
        offset_mapping = tokenized_examples.pop("offset_mapping")
        tokenized_examples["start_positions"] = []
        tokenized_examples["end_positions"] = []
        for i, offsets in enumerate(offset_mapping):
            answers = examples["answers"][sample_mapping[i]]
            start_char = answers["answer_start"][0]
            end_char = start_char + len(answers["text"][0])
            sequence_ids = tokenized_examples.sequence_ids(i)
            inside = [
                k for k, (a, b) in enumerate(offsets) if sequence_ids[k] == 1 and a >= start_char and b <= end_char
            ]
            tokenized_examples["start_positions"].append(inside[0] if inside else 0)
            tokenized_examples["end_positions"].append(inside[-1] if inside else 0)
        return tokenized_examples

    def prepare_validation_features(examples):
        tokenized_examples = tokenize(examples)
        sample_mapping = tokenized_examples.pop("overflow_to_sample_mapping")
        tokenized_examples["example_id"] = [examples["id"][i] for i in sample_mapping]
        for i, offsets in enumerate(tokenized_examples["offset_mapping"]):
            ids = tokenized_examples.sequence_ids(i)
            tokenized_examples["offset_mapping"][i] = [o if ids[k] == 1 else None for k, o in enumerate(offsets)]
        return tokenized_examples

    with training_args.main_process_first(desc="train dataset map pre-processing"):
        train_dataset = raw_datasets["train"].map(prepare_train_features, batched=True, remove_columns=column_names)
        eval_examples = raw_datasets["validation"]
        eval_dataset = eval_examples.map(prepare_validation_features, batched=True, remove_columns=column_names)

    def post_processing_function(examples, features, predictions, stage="eval"):
        start_logits, end_logits = predictions
        found = {}
        for feature, start, end in zip(features, start_logits, end_logits, strict=True):
            inside = [k for k, offset in enumerate(feature["offset_mapping"]) if offset is not None]
            first, last = max(inside, key=lambda k: start[k]), max(inside, key=lambda k: end[k])
            span = (feature["offset_mapping"][first][0], feature["offset_mapping"][last][1])
            score = float(start[first] + end[last])
            if score > found.get(feature["example_id"], (-np.inf,))[0]:
                found[feature["example_id"]] = (score, span)
        spans = [found[example["id"]][1] for example in examples]
        answers = [example["context"][a:b] for example, (a, b) in zip(examples, spans, strict=True)]
        return EvalPrediction(predictions=answers, label_ids=[example["answers"]["text"][0] for example in examples])

    def compute_metrics(p: EvalPrediction):
        return {"exact_match": float(np.mean([a == b for a, b in zip(p.predictions, p.label_ids, strict=True)]))}

    data_collator = default_data_collator if data_args.pad_to_max_length else DataCollatorWithPadding(tokenizer)
    trainer = QuestionAnsweringTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset if training_args.do_train else None,
        eval_dataset=eval_dataset if training_args.do_eval else None,
        eval_examples=eval_examples if training_args.do_eval else None,
        processing_class=tokenizer,
        data_collator=data_collator,
        post_process_function=post_processing_function,
        compute_metrics=compute_metrics,
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
    trainer.create_model_card(finetuned_from=model_args.model_name_or_path, tasks="question-answering")


if __name__ == "__main__":
    main()

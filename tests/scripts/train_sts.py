"""Train sentence embeddings on scored pairs, in the shape of sentence-transformers' STS script, three lines added.

python train_sts.py START PAIRS.csv OUT
"""

import logging
import sys

import torch
from datasets import load_dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    SimilarityFunction,
)
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator

from stompp_hf import StoMPPTrainerCallback, binarize_model  # 1 of 3

logging.basicConfig(format="%(asctime)s - %(message)s", level=logging.INFO)


def main():
    start, pairs, output_dir = sys.argv[1:]
    torch.manual_seed(0)
    model = SentenceTransformer(start)
    model = binarize_model(model)  # 2 of 3
    datasets = load_dataset("csv", data_files=pairs)["train"].train_test_split(0.25, seed=0)
    train_dataset, eval_dataset = datasets["train"], datasets["test"]
    evaluator = EmbeddingSimilarityEvaluator(
        sentences1=eval_dataset["sentence1"],
        sentences2=eval_dataset["sentence2"],
        scores=eval_dataset["score"],
        main_similarity=SimilarityFunction.COSINE,
        name="sts-dev",
    )
    args = SentenceTransformerTrainingArguments(
        output_dir=output_dir,
        max_steps=12,
        learning_rate=1e-3,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=8,
        warmup_steps=0.1,
        eval_strategy="steps",
        eval_steps=6,
        save_strategy="steps",
        save_steps=6,
        save_total_limit=2,
        load_best_model_at_end=True,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = SentenceTransformerTrainer(
        model=model,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        loss=losses.CosineSimilarityLoss(model=model),
        evaluator=evaluator,
        callbacks=[StoMPPTrainerCallback()],  # 3 of 3
    )
    trainer.train()
    evaluator(model)
    model.save_pretrained(f"{output_dir}/final")
    return model


if __name__ == "__main__":
    main()

"""Fine-tune or train a causal language model into one of 1-bit weights with Trainer, and serve it with llama.cpp.

    python examples/run_clm.py --output_dir runs/clm            # offline, minutes on a CPU: a small Llama, three ways
    accelerate launch examples/run_clm.py examples/configs/clm_w1a32.yaml --model_name_or_path Qwen/Qwen3-0.6B \
        --dataset_name Salesforce/wikitext --dataset_config_name wikitext-2-raw-v1 --output_dir runs/qwen3
    python -m stompp_hf export-gguf runs/qwen3 qwen3.gguf

In the shape of transformers' run_clm.py, with a fourth group of options: StoMPPConfig.
"""

import copy
import json
import logging
import math
import os
import sys
from dataclasses import dataclass, field, replace
from typing import Any

import torch
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
from stage_edges import EvaluateAtStageEdges
from text_data import DataArguments, load_text, prepare, train_tokenizer
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    LlamaConfig,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from stompp_hf import StoMPPConfig, StoMPPTrainerCallback, binarize_model, create_optimizer, get_plan, report
from stompp_hf.training.metrics import frozen_fraction

WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "full_precision": ("full_precision", {}),
    "w1a1": ("stompp", {"binarize": "weights_and_activations"}),
    "w1a32": ("stompp", {"binarize": "weights"}),
    "vanilla_ste": ("vanilla_ste", {}),
    "ste_free": ("stompp", {"frozen_gradient": "zero"}),
    "with_ste": ("stompp", {"frozen_gradient": StoMPPConfig.frozen_gradient}),
}
"""What `--compare` takes: a method, and StoMPP options in place of those given."""


@dataclass
class ModelArguments(HubArguments, MethodArguments, RecordArguments, TeacherArguments, LoraArguments):
    """Which model, and how it is trained."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Checkpoint to fine-tune; without it a model is trained from scratch."}
    )
    model_type: str | None = field(
        default=None, metadata={"help": "Type of a model from scratch, as in `llama`; without it a small Llama."}
    )
    config_name: str | None = field(default=None, metadata={"help": "Config of a model from scratch."})
    config_overrides: str | None = field(
        default=None, metadata={"help": "Changes to the config of a model from scratch, as in hidden_size=256,..."}
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Tokenizer, if not the checkpoint's; the small Llama's is trained on the text."}
    )
    compare: list[str] | None = field(
        default=None,
        metadata={"help": "Train in each of these ways, from equal weights, one by one.", "choices": list(WAYS)},
    )
    evaluate_stages: bool = field(default=True, metadata={"help": "Evaluate whenever a stage has just been frozen."})
    prompt: str | None = field(default=None, metadata={"help": "At the end, print what the model goes on with."})

    def __post_init__(self) -> None:
        if self.model_name_or_path is not None and self.config_overrides is not None:
            raise ValueError("--config_overrides is for a model from scratch; leave --model_name_or_path out.")


DEMO = {
    "block_size": 128, "end_of_text": True, "learning_rate": 2e-3, "lr_scheduler_type": "cosine", "warmup_steps": 0.1,
    "max_steps": 400, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 32, "logging_steps": 100,
    "save_strategy": "no", "disable_tqdm": True, "do_train": True, "do_eval": True, "eval_on_start": True,
    "start": 0.2, "end": 0.6, "prompt": "Return the",
}  # fmt: skip
"""Defaults of the embedded run: a small Llama from scratch, which warms up in full precision."""


def parse(words: list[str]) -> tuple[ModelArguments, DataArguments, TrainingArguments, StoMPPConfig]:
    """Options from any number of .json and .yaml files, then from the command line; what comes later wins."""
    read = read_words(words)
    theirs = {"dataset_name", "train_file", "model_name_or_path", "model_type", "config_name"}
    demo: dict[str, Any] = {} if read.given & theirs else dict(DEMO)
    if demo and not read.given & {"method", "binarize", "frozen_gradient"}:
        demo["compare"] = ["full_precision", "w1a1", "w1a32"]
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments, StoMPPConfig))
    pin = torch.accelerator.is_available()
    parser.set_defaults(binarize="weights", dataloader_pin_memory=pin, **demo)
    return parser.parse_args_into_dataclasses(read.words)  # type: ignore[return-value]


def load_tokenizer(args: ModelArguments, texts: Any) -> Any:
    """The tokenizer of the checkpoint, or one that is trained on the text."""
    name = args.tokenizer_name or args.model_name_or_path or args.config_name
    return train_tokenizer(texts) if name is None else AutoTokenizer.from_pretrained(name, **args.hub)


@dataclass
class Source:
    """What every run of one command shares."""

    tokenizer: Any
    config: Any
    data: Any


def load_config(args: ModelArguments, tokenizer: Any) -> Any:
    """The config of a checkpoint, or of a model from scratch: by name, by type, or that of a small Llama."""
    name = args.config_name or args.model_name_or_path
    words = {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id}
    words["eos_token_id"] = tokenizer.eos_token_id
    if name is not None:
        config = AutoConfig.from_pretrained(name, **args.hub)
    elif args.model_type is not None:
        config = CONFIG_MAPPING[args.model_type](**words)
    else:  # widths that 128 divides fit GGUF's Q1_0
        config = LlamaConfig(
            hidden_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=384,
            max_position_embeddings=512, **words,
        )  # fmt: skip
    if args.config_overrides is not None:
        config.update_from_string(args.config_overrides)
    return config


def load_model(args: ModelArguments, config: Any, tokenizer: Any) -> Any:
    """The checkpoint's model, or a new one, with an embedding for each token."""
    if args.model_name_or_path is not None:
        model = AutoModelForCausalLM.from_pretrained(args.model_name_or_path, config=config, **args.hub)
    else:
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=args.trust_remote_code)
    model = plain_again(model)
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))
    return model


class PrintPerplexity(TrainerCallback):
    """Prints the perplexity at each evaluation, and how much is frozen by then."""

    def __init__(self, stompp: StoMPPTrainerCallback) -> None:
        self.stompp = stompp

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        progression, stages = self.stompp.progression, ""
        plan = get_plan(kwargs["model"])
        if progression is not None and plan.freezing:
            frozen = plan.freezing - len(progression.unfinished_stages(state.global_step))
            stages = f"{frozen} of {plan.stage_count} stages frozen, "
        if state.is_world_process_zero:
            print(
                f"  step {state.global_step:6d}: {stages}perplexity {perplexity(metrics['eval_loss']):.2f}", flush=True
            )


def train(
    model_args: ModelArguments, args: TrainingArguments, stompp: StoMPPConfig, sources: DataArguments, source: Source
) -> tuple[Trainer, dict[str, float]]:
    """Train, evaluate and save one model; the trainer and the metrics of its evaluation."""
    set_seed(args.seed)
    model = load_model(model_args, copy.deepcopy(source.config), source.tokenizer)
    adapter = model_args.lora_rank is not None
    if adapter:
        if model_args.teacher is not None:
            raise ValueError("--teacher is for a base that becomes binary; leave it out beside --lora_rank.")
        finished = is_binarized(model) and frozen_fraction(model) == 1.0
        model = model_args.adapted(model, finished, task="CAUSAL_LM")
    elif not is_binarized(model):
        model = binarize_model(model, config_of(model_args.method, stompp))
    callback = StoMPPTrainerCallback()
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=source.data["train"] if args.do_train else None,
        eval_dataset=source.data["validation"] if args.do_eval else None,
        processing_class=source.tokenizer,
        data_collator=default_data_collator,
        optimizers=(create_optimizer(model, args), None) if args.do_train else (None, None),
        callbacks=[PrintPerplexity(callback)],
    )
    if not adapter:  # the base is finished: nothing is left to freeze
        callback.attach(trainer)
        model_args.add_to(trainer, model_args.method)
    if args.do_train:
        model_args.record(trainer, model_args, sources, args)
    if not adapter and model_args.evaluate_stages and args.do_train and args.do_eval:
        trainer.add_callback(EvaluateAtStageEdges(callback))
    if model_args.compare:
        trainer.remove_callback(PrinterCallback)
    if not adapter and model_args.method != "full_precision" and trainer.is_world_process_zero():
        print(report(model).splitlines()[0])

    summary: dict[str, float] = {}
    if args.do_train:
        metrics = trainer.train(resume_from_checkpoint=resumed_from(args)).metrics
        metrics["train_samples"] = len(source.data["train"])
        trainer.save_model()
        trainer.save_metrics("train", metrics)
        trainer.save_state()
        summary.update(metrics)
    if args.do_eval:
        metrics = trainer.evaluate()
        metrics["eval_samples"] = len(source.data["validation"])
        metrics["perplexity"] = perplexity(metrics["eval_loss"])
        trainer.save_metrics("eval", metrics)
        summary.update(metrics)
    if not model_args.compare:
        trainer.log_metrics("all", summary)
    if model_args.prompt is not None and trainer.is_world_process_zero():
        print_sample(trainer, model_args.prompt)
    card: dict[str, Any] = {
        "tasks": "text-generation", "finetuned_from": model_args.model_name_or_path,
        "dataset": sources.dataset_name, "tags": ["stompp", "1-bit"],
    }  # fmt: skip
    publish(trainer, card)
    return trainer, summary


def perplexity(loss: float) -> float:
    """exp(loss): among how many equally likely tokens a model with this loss is in doubt."""
    return math.exp(min(loss, 100.0))


def print_sample(trainer: Trainer, prompt: str) -> None:
    """What the model goes on with after a prompt, drawn with the seed of the run."""
    set_seed(trainer.args.seed)
    model, tokenizer = trainer.model.eval(), trainer.processing_class
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    drawn = {"do_sample": True, "temperature": 0.7, "top_k": 40, "pad_token_id": tokenizer.eos_token_id}
    words = model.generate(**inputs, max_new_tokens=48, **drawn)
    print(f"sample: {tokenizer.decode(words[0])!r}")


def compare(
    model_args: ModelArguments, args: TrainingArguments, stompp: StoMPPConfig, sources: DataArguments, source: Source
) -> dict[str, dict[str, float]]:
    """Train in each way from the same seed, so from equal weights and on equal batches, and print a table."""
    assert model_args.compare
    results: dict[str, dict[str, float]] = {}
    logging.getLogger("stompp_hf").setLevel(logging.WARNING)
    first = model_args.compare[0]
    lines = [f"\n{'':16} {'perplexity':>10} {f'to {first}':>18} {'minutes':>8}"]
    for name in model_args.compare:
        method, options = WAYS[name]
        one = copy.copy(args)
        one.output_dir = os.path.join(args.output_dir, name)
        print(f"\n{name}, in {one.output_dir}", flush=True)
        way = replace(model_args, method=method)
        trainer, result = train(way, one, replace(stompp, **options), sources, source)
        results[name] = result
        ratio = result["perplexity"] / results[first]["perplexity"]
        lines.append(f"{name:16} {result['perplexity']:10.2f} {ratio:18.3f} {result['train_runtime'] / 60:8.2f}")
    if trainer.is_world_process_zero():
        print("\n".join(lines))
        with open(os.path.join(args.output_dir, "comparison.json"), "w", encoding="utf-8") as file:
            json.dump(results, file, indent=2)
    return results


def main() -> dict[str, Any]:
    """Train, evaluate, compare; returns the metrics that were printed."""
    model_args, sources, args, stompp = parse(sys.argv[1:])
    set_up_logging(args)
    with args.main_process_first(desc="reading the text"):
        text = load_text(sources, model_args.cache_dir, model_args.token)
        tokenizer = load_tokenizer(model_args, text["train"]["text"])
        config = load_config(model_args, tokenizer)
        longest = getattr(config.get_text_config(), "max_position_embeddings", tokenizer.model_max_length)
        data = prepare(text, tokenizer, sources, min(longest, tokenizer.model_max_length))
    source = Source(tokenizer, config, data)
    if model_args.compare:
        return compare(model_args, args, stompp, sources, source)
    return train(model_args, args, stompp, sources, source)[1]


if __name__ == "__main__":
    main()

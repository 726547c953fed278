"""TRL's SFTTrainer on a model that becomes binary, given as an object and by name (own marker).

pip install --no-deps trl==1.16.0
python -m pytest -m trl
"""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from models import assert_binary
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from stompp_hf import DistillationCallback, StoMPPConfig, StoMPPTrainerCallback, binarize_model, get_plan, pack_model
from stompp_hf.errors import DistillationError
from stompp_hf.surgery.members import binary_layers

pytestmark = pytest.mark.trl

GUIDE = Path(__file__).parent.parent / "examples" / "guides" / "llm.md"
ROWS = Dataset.from_dict(
    {
        "prompt": [f"Count from {i}: " for i in range(24)],
        "completion": [f"{i + 1}, {i + 2}, {i + 3}" for i in range(24)],
    }
)
CONFIG = StoMPPConfig(binarize="weights", refresh_rate=1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Llama with a byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(ROWS["prompt"], vocab_size=280, special_tokens=["<end>"], show_progress=False)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer, eos_token="<end>", pad_token="<end>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=280, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def trainer(model: Any, folder: Path, *callbacks: Any, init: Any = None, **options: Any) -> Any:
    from trl import SFTConfig, SFTTrainer

    args = SFTConfig(
        output_dir=str(folder), max_steps=12, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1,
        report_to="none", use_cpu=True, bf16=False, save_strategy="no", disable_tqdm=True, max_length=32,
        model_init_kwargs=init,
    )  # fmt: skip
    more = [StoMPPTrainerCallback(), *callbacks]
    return SFTTrainer(model=model, args=args, train_dataset=ROWS, callbacks=more, **options)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(1, 9)[None]).logits


def test_a_model_given_as_an_object_and_by_name(tmp_path: Path, checkpoint: str) -> None:
    """All three train alike to the end; what is saved reloads, and packs."""
    model = binarize_model(AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32), CONFIG)
    runs = [
        trainer(model, tmp_path / "object"),
        trainer(checkpoint, tmp_path / "named", quantization_config=CONFIG),
        trainer(checkpoint, tmp_path / "kwargs", init={"quantization_config": CONFIG}),
    ]
    losses = []
    for run in runs:
        run.train()
        losses.append([record["loss"] for record in run.state.log_history if "loss" in record])
        for layer in binary_layers(run.model).values():
            assert_binary(layer)
        assert run.state.log_history[-2]["stompp_frozen_fraction"] == 1
    assert losses[0] == losses[1] == losses[2] and losses[0][-1] < losses[0][0] and len(losses[0]) == 12
    run.save_model()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "kwargs")
    assert get_plan(again).config.binarize == "weights" and len(binary_layers(again)) == 14
    assert torch.equal(logits(again), logits(run.model))
    assert torch.equal(logits(pack_model(again)), logits(run.model))


def test_an_adapter_beside_a_packed_base(tmp_path: Path, checkpoint: str) -> None:
    from peft import LoraConfig

    run = trainer(checkpoint, tmp_path / "base", quantization_config=CONFIG)
    run.train()
    pack_model(run.model).save_pretrained(tmp_path / "packed")
    run.processing_class.save_pretrained(tmp_path / "packed")
    from trl import SFTConfig, SFTTrainer

    args = SFTConfig(
        output_dir=str(tmp_path / "adapter"), max_steps=2, report_to="none", use_cpu=True, bf16=False,
        save_strategy="no", disable_tqdm=True, max_length=32,
    )  # fmt: skip
    lora = SFTTrainer(str(tmp_path / "packed"), args=args, train_dataset=ROWS, peft_config=LoraConfig(r=2))
    lora.train()
    lora.save_model()
    assert (tmp_path / "adapter" / "adapter_config.json").exists()
    assert get_plan(lora.model).packed and not list((tmp_path / "adapter").glob("model*.safetensors"))


@pytest.mark.parametrize(
    "weights, word",
    [({"hidden": 0.0}, "returned no logits"), ({"logits": 0.0}, "a subclass computes its loss without")],
)
def test_a_teacher_is_refused_in_words(tmp_path: Path, checkpoint: str, weights: dict[str, float], word: str) -> None:
    """SFTTrainer computes its loss from log-probabilities, past the model's own."""
    run = trainer(checkpoint, tmp_path, DistillationCallback(checkpoint, **weights), quantization_config=CONFIG)
    with pytest.raises(DistillationError, match=word):
        run.train()


def test_the_guide(tmp_path: Path, checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lines in the guide, on a CPU."""
    (block,) = re.findall(r"```py\n(.*?)```", GUIDE.read_text(encoding="utf-8"), flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"dataset": ROWS}
    exec(
        compile(
            block.replace("your-causal-lm", checkpoint).replace("learning_rate=", "use_cpu=True, learning_rate="),
            str(GUIDE),
            "exec",
        ),
        names,
    )
    assert get_plan(names["trainer"].model).config.binarize == "weights"
    assert {layer.stage_state for layer in binary_layers(names["trainer"].model).values()} == {"frozen"}
    assert (tmp_path / "runs" / "sft" / "model.safetensors").exists()

"""What `import stompp_hf` brings along, and what it must bring about: everything else comes when it is used."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from models import CASES, quick

import stompp_hf
from stompp_hf import binarize_model

HEAVY = (
    *("transformers.trainer", "transformers.trainer_callback", "transformers.modeling_utils", "torch._dynamo"),
    *("peft", "scipy", "matplotlib", "rich", "onnx", "onnxscript", "sklearn"),
)


def run(*lines: str) -> list[str]:
    """What a fresh Python prints at the end of these lines."""
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def loaded(*lines: str) -> list[str]:
    """Which of HEAVY are imported after these lines."""
    return run(*lines, "import sys", f"print(*(name for name in {HEAVY} if name in sys.modules))")


@pytest.mark.parametrize("line", ["import stompp_hf", "from stompp_hf import StoMPPConfig, StoMPPError"])
def test_the_library_alone_imports_nothing_heavy(line: str) -> None:
    assert loaded(line) == []


def test_whoever_only_loads_a_model_does_not_pay_for_trainer(tmp_path: Path) -> None:
    bert = CASES["bert"]
    binarize_model(bert.build(), quick()).save_pretrained(tmp_path)
    load = f"print(AutoModelForSequenceClassification.from_pretrained({str(tmp_path)!r}).config.quantization_config)"
    trainer = {"transformers.trainer", "transformers.trainer_callback", "peft", "matplotlib", "rich", "onnx"}
    found = loaded("import stompp_hf", "from transformers import AutoModelForSequenceClassification", load)
    assert "transformers.modeling_utils" in found and not trainer & set(found)


THEIRS = "from transformers import PreTrainedModel"
PEFT = "from peft.tuners.tuners_utils import BaseTuner"


@pytest.mark.parametrize("order", [slice(None), slice(None, None, -1)], ids=["ours first", "theirs first"])
def test_other_libraries_ask_whichever_is_imported_first(order: slice) -> None:
    asks = ("PreTrainedModel.save_pretrained", "PreTrainedModel.from_pretrained", "BaseTuner.inject_adapter")
    wrapped = f"print(*(hasattr(method, '__wrapped__') for method in ({', '.join(asks)})))"
    for theirs in ((THEIRS, PEFT), (PEFT, THEIRS)):
        lines = [line for pair in [("import stompp_hf", line) for line in theirs] for line in pair[order]]
        assert run(*lines, wrapped) == ["True"] * 3


def test_exported_programs_find_the_operators() -> None:
    assert run("import stompp_hf, torch", "print(torch.ops.stompp_hf.packed_linear)")


def test_type_checkers_see_the_names_that_are_there() -> None:
    tree = ast.parse(Path(stompp_hf.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {f"{one.module}.{alias.asname}" for one in block.body for alias in one.names}  # type: ignore[attr-defined]
    assert seen == {f"{home}.{name}" for home, names in stompp_hf._HOMES.items() for name in names.split()}
    assert set(stompp_hf.__all__) <= set(dir(stompp_hf))
    assert all(getattr(stompp_hf, name).__name__ == name for name in stompp_hf.__all__)
    assert stompp_hf.surgery.__name__ == "stompp_hf.surgery"
    with pytest.raises(AttributeError, match="no attribute 'binarise_model'"):
        stompp_hf.binarise_model  # noqa: B018

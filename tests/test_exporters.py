"""torch.export of frozen and packed models: the same numbers, and nothing but core operators once it is decomposed.

What the runtimes behind it answer is printed by examples/benchmarks/exporters.py.
"""

from typing import Any

import beyond
import models
import pytest
import torch
import vision
from torch import Tensor, nn

from stompp_hf import Progression, StoMPPConfig, binarize_model, calibrate, fuse_for_inference, pack_model
from stompp_hf.method.mixing import hard, hard_above
from stompp_hf.method.sign_bits import SignBits, pack_signs, unpack_signs
from stompp_hf.surgery.members import binary_layers

CASES = {**models.CASES, **vision.CASES}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", {}),
    "vit": ("vit", {}),
    "resnet": ("resnet", {}),
    "llama": ("llama", {}),
}
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "bert, attention and embeddings": ("bert", beyond.BOTH),
    "bert, weights": ("bert", {"binarize": "weights"}),
}


def frozen(name: str) -> tuple[Any, dict[str, Tensor]]:
    """A model frozen at once, and inputs."""
    of, options = {**MODELS, **MORE}[name]
    case = CASES[of]
    plain = beyond.build(of) if "attention" in options else case.build()
    batch = {key: value for key, value in case.batch(77).items() if key != "labels"}
    model: Any = binarize_model(plain, StoMPPConfig(end=0.0, **options), batch)
    Progression(model, 1).step(0)
    calibrate(model, [batch]).eval()
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False  # a cache is no output of a program
    return model, batch


def targets(program: torch.export.ExportedProgram) -> list[Any]:
    return [node.target for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]


def foreign(program: torch.export.ExportedProgram) -> set[str]:
    """Operators of a program that are not Core ATen; but for torch's own checks, which no backend runs."""
    other = {str(operator) for operator in targets(program) if torch.Tag.core not in operator.tags}
    return other - {"aten._assert_tensor_metadata.default"}


@pytest.mark.parametrize("form", ["frozen", "packed"])
@pytest.mark.parametrize("name", [*MODELS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_programs_compute_the_same(name: str, form: str) -> None:
    model, batch = frozen(name)
    if form == "packed":
        pack_model(model)
        if name == "bert, weights":
            fuse_for_inference(model, batch)  # has an operator only then
    with torch.no_grad():
        expected = model(**batch).logits
        program = torch.export.export(model, (), batch)
        assert torch.equal(program.module()(**batch).logits, expected)
        ours = [operator for operator in targets(program) if operator.namespace == "stompp_hf"]
        assert bool(ours) == (form == "packed") and len(ours) <= len(binary_layers(model))
        core = program.run_decompositions()
        assert foreign(core) == set()
        torch.testing.assert_close(core.module()(**batch).logits, expected, rtol=1e-5, atol=1e-6)


class Signs(nn.Module):
    """What a graph writes with other operators."""

    def forward(self, u: Tensor, threshold: Tensor, bits: Tensor) -> Any:
        sums = SignBits(bits, torch.Size((bits.shape[0], 13))).row_sums(torch.float32)
        return hard(u), hard_above(u, threshold), unpack_signs(bits, 13, torch.float32), sums


def test_signs_and_bits_in_core_operators() -> None:
    torch.manual_seed(0)
    tiny = [0.0, -0.0, 1e-45, -1e-45, 1e-38, float("inf"), float("-inf")]
    u = torch.cat([torch.tensor(tiny), torch.randn(6).round()]).expand(5, 13)
    inputs = (u, torch.randn(13).round(), pack_signs(torch.randn(5, 13)))
    program = torch.export.export(Signs(), inputs)
    assert foreign(program.run_decompositions()) == set()
    for found, expected in zip(program.module()(*inputs), Signs()(*inputs), strict=True):
        assert torch.equal(found, expected) and found.dtype == expected.dtype

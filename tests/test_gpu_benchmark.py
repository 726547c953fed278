"""`examples/benchmarks/gpu.py` to its end on a CPU: every part, what it writes, and a second run that goes on."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples" / "benchmarks"))
import gpu  # noqa: E402

pytest.importorskip("PIL")
TINY = ["--tiny", "True", "--device", "cpu", "--repeats", "1", "--batch", "2", "--seq", "8", "--size", "32"]


@pytest.mark.parametrize(
    "ways", [["eager", "autocast"], pytest.param(["compiled"], marks=pytest.mark.slow)], ids=" and ".join
)
def test_it_runs_to_its_end_and_goes_on_after_a_stop(
    ways: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*TINY, "--ways", *ways, "--backend", "eager", "--output_dir", str(tmp_path)]
    stopped = gpu.main([*words, "--minutes", "1e-6"])
    assert {name: part["done"] for name, part in stopped["parts"].items()} == {
        "Kernels": True, "Linear layers": True, "Training": False, "CIFAR-10": False,
    }  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(gpu, "kernel_rows", None)  # complete, and not run again
        results = gpu.main(words)
    rows = {name: part["rows"] for name, part in results["parts"].items()}
    assert all(part["done"] for part in results["parts"].values())
    assert {row["against torch"] for row in rows["Kernels"]} <= {"equal", "no kernel, plain torch"}
    assert all(row["packed"] > 0 and row["float32"] > 0 for row in rows["Linear layers"])
    assert not [row for row in rows["Training"] if "failed" in row]
    found = {(row["shapes"], row["way"], row["method"]) for row in rows["Training"]}
    assert len(found) == len(rows["Training"]) == 2 * len(ways) * 4
    assert [row["cell"].split("-")[1:3] for row in rows["CIFAR-10"]] == [
        ["vanilla_ste", "lr0.05"], ["stompp", "forward"], ["stompp_ste", "forward"], ["stompp", "reverse"],
    ]  # fmt: skip
    assert json.loads((tmp_path / "results.json").read_text()) == results
    text = (tmp_path / "results.md").read_text()
    assert all(f"## {name}" in text for name in gpu.PARTS) and "Not complete" not in text

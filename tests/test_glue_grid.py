"""The grid of fine-tuning runs: cells that are what run_glue.py takes, resumable, with paired differences."""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import ClassLabel, Dataset
from test_examples import ROOT, tiny_bert
from transformers import AutoModel, AutoModelForSequenceClassification

sys.path.insert(0, str(ROOT / "examples" / "ablations"))
import glue
import glue_grid
import run_glue
from glue_grid import METHODS, PRESETS, TextCell

OWN_TEACHER = TextCell("sst2", "stompp_ste_distilled", 1e-3)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options that name a tiny checkpoint and tiny data."""
    folder = tmp_path_factory.mktemp("glue")
    tiny_bert(folder / "model", labels=2)
    for split, count in (("train", 96), ("validation", 24)):
        data = Dataset.from_dict({"sentence": [f"word{i % 24}" for i in range(count)], "label": [0, 1] * (count // 2)})
        (folder / "sst2").mkdir(exist_ok=True)
        data.cast_column("label", ClassLabel(names=["no", "yes"])).to_parquet(folder / "sst2" / f"{split}.parquet")
    return ["--preset", "quick", "--model", str(folder / "model"), "--data_dir", str(folder), "--seeds", "0"]


def test_cells_are_run_once_and_can_be_repeated_by_hand(
    words: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    out = [*words, "--output_dir", str(tmp_path)]
    glue.main([*out, "--only", "*-vanilla_ste-*"])
    glue.main([*out, "--workers", "2"])
    assert "4 cells, 4 of them to run, on 2 workers" in caplog.text  # 3, and one that is another's teacher
    text = (tmp_path / "results.md").read_text()
    assert all(record["cpu_seconds"] > 1 and record["peak_mb"] > 50 for record in glue.read(tmp_path).values())
    assert text.count("| sst2 |") == 5 and "StoMPP+STE, windowed, own teacher" in text
    folder = tmp_path / "cells" / OWN_TEACHER.id
    model, _, training, stompp = run_glue.parse([str(folder / "options.json")])
    assert (model.teacher, stompp.start, stompp.end, stompp.pending_lr) == ("own", 0.2, 0.35, 0.1)
    assert (training.learning_rate, training.max_grad_norm, training.num_train_epochs) == (1e-3, 0.0, 2)
    assert (folder / "_teacher" / "config.json").is_file()
    kept = {path.parent.name for path in tmp_path.rglob("*.safetensors")}
    assert kept == {"sst2-full_precision-lr0.001-s0", "sst2-full_precision-lr0.0001-s0"}
    taught = tmp_path / "cells" / TextCell("sst2", "stompp_ste_taught", 1e-3).id
    model, *_ = run_glue.parse([str(taught / "options.json")])
    assert model.teacher == model.model_name_or_path == str(tmp_path / "cells" / "sst2-full_precision-lr0.0001-s0")
    assert json.loads((taught / "all_results.json").read_text())["eval_samples"] == 24
    assert "(weights and activations)" in (taught / "log.txt").read_text()  # binary, though it began as a baseline
    with pytest.raises(SystemExit, match="num_train_epochs"):
        glue.main([*out, "--options", '{"num_train_epochs": 3}'])
    elsewhere = ["--output_dir", str(tmp_path / "elsewhere"), "--known", str(tmp_path / "results.json")]
    glue.main([*words, *elsewhere])
    assert "4 cells, 0 of them to run" in caplog.text
    assert (tmp_path / "elsewhere" / "results.md").read_text() == text
    assert str(tmp_path) not in (tmp_path / "results.json").read_text()


def test_what_each_part_costs(words: list[str], tmp_path: Path) -> None:
    asked = [*words, "--output_dir", str(tmp_path), "--parts", "real", "binary", "--learning_rates", "1e-3"]
    (args,) = glue.HfArgumentParser(glue.GlueArguments).parse_args_into_dataclasses(asked)
    found = [cell for cell in glue.selected(args).cells if cell.method == "vanilla_ste"]
    names = [cell.part for cell in found]
    assert names[0] == "" and len(names) == len(set(names)) == 1 + 2 * (6 + 2)  # kinds, and blocks
    assert {"real output.dense", "binary attention.self.query", "real layer.0"} <= set(names)
    assert not [c for c in glue.selected(args).cells if c.method == "full_precision" and c.part]
    chosen = ["*-vanilla_ste-lr0.001-s0", "*-vanilla_ste-*-real_output.dense-*", "*-vanilla_ste-*-binary_layer.0-*"]
    glue.main([*asked, "--only", *chosen])
    results = glue.read(tmp_path)
    logs = {cell.part: (tmp_path / "cells" / cell.id / "log.txt").read_text() for cell in results}
    assert "12 binary layers in 2 stages" in logs[""]
    assert "10 binary layers in 2 stages" in logs["real output.dense"]
    assert "6 binary layers in 1 stages" in logs["binary layer.0"]
    sizes = {cell.part: record["binary"]["bytes"] for cell, record in results.items()}
    assert sizes[""] < sizes["real output.dense"] < sizes["binary layer.0"]
    with pytest.raises(SystemExit, match="choose real, binary, or both"):
        glue.main([*asked[:-2], "--parts", "half"])


def test_a_table_at_several_learning_rates(words: list[str], tmp_path: Path) -> None:
    asked = ["--output_dir", str(tmp_path), "--learning_rates", "1e-3", "2e-3", "--only", "*-vanilla_ste-*"]
    (args,) = glue.HfArgumentParser(glue.GlueArguments).parse_args_into_dataclasses([*words, *asked])
    assert [cell.id for cell in glue.selected(args).cells] == [f"sst2-vanilla_ste-lr{lr}-s0" for lr in (0.001, 0.002)]


def test_a_cell_that_fails_is_named_and_tried_again(words: list[str], tmp_path: Path) -> None:
    out = [*words, "--output_dir", str(tmp_path), "--only", "*-full_precision-*"]
    with pytest.raises(SystemExit, match=r"1 cells failed: sst2-full_precision-lr0\.001-s0"):
        glue.main([*out, "--options", '{"no_such_option": 3}'])
    glue.main(out)
    assert len(glue.read(tmp_path)) == 1


@pytest.mark.parametrize("preset", PRESETS)
def test_every_cell_is_a_valid_run(preset: str, tmp_path: Path) -> None:
    made = PRESETS[preset](["sst2", "stsb"], [0, 1])
    assert len({cell.id for cell in made.cells}) == len(made.cells)
    for cell in made.cells:
        path = tmp_path / "options.json"
        path.write_text(json.dumps({**made.recipe.options(), **cell.options(), "output_dir": str(tmp_path)}))
        model, _, training, stompp = run_glue.parse([str(path)])
        assert training.seed == stompp.mask_seed == cell.seed
        if cell.rule == "paper":
            assert stompp.weight_scale == stompp.activation_scale == "none" and stompp.end == 1.0
            assert stompp.frozen_gradient == {"stompp_ste": "ste"}.get(cell.method, "zero")
        assert model.method == METHODS[cell.method].get("method", "stompp")


@pytest.mark.parametrize(("file", "method"), [("binary", "stompp_ste"), ("taught", "stompp_ste_taught")])
def test_the_shipped_recipes_are_the_grids(file: str, method: str) -> None:
    """The config files of the fine-tuning recipes have the options of the grid's methods."""
    recipe = str(ROOT / "examples" / "configs" / f"glue_{file}.yaml")
    cell = TextCell("sst2", method, glue_grid.BEST[method])
    options = {**glue_grid.TextRecipe(0, 3).options(), **cell.options()}
    told = {name: value for name, value in options.items() if value == glue_grid.FINE_TUNED}
    parts = run_glue.parse([recipe, "--task_name", "sst2", *(f"--{name}={value}" for name, value in told.items())])
    of_a_grid = {"seed", "mask_seed", "save_strategy", "evaluate_stages", "disable_tqdm", "report_to"}
    for name in options.keys() - of_a_grid:
        assert next(getattr(part, name) for part in parts if hasattr(part, name)) == options[name], name


def test_sentence_pairs_learn_for_steps_from_a_teacher_of_a_few_epochs() -> None:
    preset = PRESETS["pairs"](["stsb"], [2])
    options = {cell.method: {**preset.recipe.options(), **cell.options()} for cell in preset.cells}
    assert options["full_precision"]["max_steps"] == -1 and options["full_precision"]["num_train_epochs"] == 3
    for method in ("vanilla_taught", "stompp_ste_taught"):
        assert (options[method]["max_steps"], options[method]["teacher_hidden"]) == (1800, 10.0)
        cell = next(cell for cell in preset.cells if cell.method == method)
        assert cell.fine_tuned is not None and cell.fine_tuned.id == "stsb-full_precision-lr0.0001-pairs-s2"
    assert {cell["max_grad_norm"] for cell in options.values()} == {1.0}


def test_the_recipe_for_small_tasks_is_the_grids() -> None:
    preset = PRESETS["small"](["mrpc"], [0])
    cell = next(cell for cell in preset.cells if cell.method == "stompp_ste_taught")
    assert cell.fine_tuned is not None and cell.fine_tuned.id == "mrpc-full_precision-lr0.0001-small-s0"
    options = {**preset.recipe.options(), **cell.options()}
    told = {name: value for name, value in options.items() if value == glue_grid.FINE_TUNED}
    recipe = str(ROOT / "examples" / "configs" / "glue_pairs.yaml")
    parts = run_glue.parse([recipe, "--task_name", "mrpc", *(f"--{name}={value}" for name, value in told.items())])
    of_a_grid = {"seed", "mask_seed", "save_strategy", "evaluate_stages", "disable_tqdm", "report_to", "logging_steps"}
    for name in options.keys() - of_a_grid:
        assert next(getattr(part, name) for part in parts if hasattr(part, name)) == options[name], name


CHANGES = {
    "weights": {"learning_rate": 2e-4, "max_grad_norm": 1.0, "binarize": "weights", "pending_lr": None},
    "pairs": {
        "num_train_epochs": 20,
        "per_device_train_batch_size": 8,
        "learning_rate": 5e-4,
        "max_grad_norm": 1.0,
        "task_weight": 0.0,
        "teacher_logits": 0.0,
        "teacher_hidden": 1.0,
        "logging_steps": 200,
    },
}


@pytest.mark.parametrize("name", CHANGES)
def test_recipes_for_sentence_pairs_differ_from_the_taught_one_as_they_say(name: str) -> None:
    taught, mine = (
        yaml.safe_load((ROOT / "examples" / "configs" / f"glue_{file}.yaml").read_text(encoding="utf-8"))
        for file in ("taught", name)
    )
    changed = {option: mine.get(option) for option in {*taught, *mine} if taught.get(option) != mine.get(option)}
    assert changed == {"output_dir": f"runs/glue_{name}", **CHANGES[name]}
    model, _, training, stompp = run_glue.parse([str(ROOT / f"examples/configs/glue_{name}.yaml"), "--task_name=stsb"])
    assert stompp.binary_weights and stompp.binary_activations == (name == "pairs")
    assert stompp.pending_lr == (1.0 if name == "weights" else 0.1) and training.max_grad_norm == 1.0
    assert model.teacher_hidden == 1.0 and model.task_weight == CHANGES[name].get("task_weight", 1.0)


def record(cell: TextCell, accuracy: float) -> dict[str, Any]:
    """A finished run, as the grid keeps it."""
    return {"cell": asdict(cell), "metrics": {"eval_accuracy": accuracy}, "cpu_seconds": 60.0, "peak_mb": 500}


def test_a_part_is_paired_with_the_run_in_which_all_is_binary() -> None:
    results = {}
    for seed, (whole, part) in enumerate([(0.70, 0.76), (0.72, 0.76)]):
        cell = TextCell("sst2", "stompp_ste", 5e-5, seed, rule="script")
        results[cell] = record(cell, whole)
        other = replace(cell, part="real output.dense")
        results[other] = {**record(other, part), "binary": {"bytes": 61.2e6, "share_1bit": 0.66}}
    assert "output.dense" not in glue.table(results) and "| 71.00 " in glue.table(results)
    row = glue.parts_table(results).splitlines()[2]
    assert "| real output.dense | 2 | 76.00 " in row and "| +5.00 [" in row and row.endswith("| 61.20 | 66% |")
    assert glue.parts_table({cell: r for cell, r in results.items() if not cell.part}) == ""


def test_differences_are_paired_with_the_best_learning_rate() -> None:
    results = {}
    for seed, values in enumerate([(0.70, 0.60, 0.75, 0.90), (0.72, 0.50, 0.78, 0.92)]):
        names = [("vanilla_ste", 1e-4), ("vanilla_ste", 4e-4), ("stompp_ste", 4e-4), ("full_precision", 1e-4)]
        for (method, lr), value in zip(names, values, strict=True):
            cell = TextCell("sst2", method, lr, seed)
            results[cell] = record(cell, value)
    mine = [TextCell("sst2", "stompp_ste", 4e-4, seed) for seed in (0, 1)]
    margin = glue.versus(results, mine, "vanilla_ste")
    assert margin is not None and margin.mean == pytest.approx(5.5) and margin.count == 2
    lucky = TextCell("sst2", "vanilla_ste", 8e-4, 0)  # better, and one seed only
    assert glue.versus({**results, lucky: record(lucky, 0.99)}, mine, "vanilla_ste") == margin
    text = glue.table(results)
    assert "| sst2 | StoMPP+STE, windowed | 0.0004 | 2 | 76.50 ± 2.12 | +5.50" in text and "84.1%" in text
    rivals = {"vanilla_identity": 0.6, "stompp_identity": 0.625, "vanilla_taught": 0.7, "stompp_ste_taught": 0.74}
    for method, value in rivals.items():
        results[TextCell("sst2", method, 4e-4, 0)] = record(TextCell("sst2", method, 4e-4, 0), value)
    text = glue.table(results)
    assert "identity surrogate | 0.0004 | 1 | 62.50 | +2.50 (one seed) |" in text
    assert "identity surrogate | 0.0004 | 1 | 60.00 | -10.00 (one seed) |" in text
    assert "from its fine-tuned teacher | 0.0004 | 1 | 74.00 | +4.00 (one seed) |" in text
    other = TextCell("sst2", "stompp_ste", 4e-4, 0, layers=2)
    assert glue.versus({**results, other: record(other, 0.5)}, [other], "vanilla_ste") is None


def test_a_share_is_of_the_full_precision_runs_of_its_own_rule_and_seeds() -> None:
    real = {("default", 0): 0.90, ("default", 1): 0.60, ("pairs", 0): 0.80}
    cells = {TextCell("sst2", "full_precision", 1e-4, seed, rule=rule): value for (rule, seed), value in real.items()}
    results = {cell: record(cell, value) for cell, value in cells.items()}
    mine = {
        rule: TextCell("sst2", method, 1e-3, seed, rule=rule)
        for rule, method, seed in [("default", "stompp", 1), ("pairs", "stompp_ste_taught", 0), ("paper", "stompp", 0)]
    }
    results |= {cell: record(cell, 0.45) for cell in mine.values()}
    found = {rule: glue.share(results, [cell]) for rule, cell in mine.items()}
    assert found == pytest.approx({"default": 0.45 / 0.60, "pairs": 0.45 / 0.80, "paper": 0.45 / 0.90})
    assert glue.share(results, [TextCell("sst2", "full_precision", 1e-4, 0)]) is None
    late = TextCell("sst2", "stompp", 1e-3, 7)  # no full precision of this seed
    assert glue.share({**results, late: record(late, 0.5)}, [late]) is None
    assert "| 56.2% |" in glue.table(results)


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_resized_checkpoints_take_their_layers_from_the_model(layers: int, tmp_path: Path) -> None:
    tiny_bert(tmp_path / "model", labels=2)
    AutoModel.from_pretrained(tmp_path / "model").save_pretrained(tmp_path / "model")  # without a head
    path = glue.resized(str(tmp_path / "model"), layers, tmp_path / "models")
    assert path == glue.resized(str(tmp_path / "model"), layers, tmp_path / "models")
    old = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").bert
    whole = AutoModelForSequenceClassification.from_pretrained(path)
    new = whole.bert
    assert len(new.encoder.layer) == layers
    again = glue.resized(str(tmp_path / "model"), layers, tmp_path / "others")
    head = AutoModelForSequenceClassification.from_pretrained(again).classifier
    assert torch.equal(head.weight, whole.classifier.weight)
    for place, layer in enumerate(new.encoder.layer):
        wanted = old.encoder.layer[place * 2 // layers].state_dict()
        assert all(torch.equal(value, wanted[name]) for name, value in layer.state_dict().items())
    assert torch.equal(new.embeddings.word_embeddings.weight, old.embeddings.word_embeddings.weight)


def test_held_out_rows_are_the_last_ones_and_never_trained_on(tmp_path: Path) -> None:
    (tmp_path / "sst2").mkdir()
    train = tmp_path / "sst2" / "train.parquet"
    Dataset.from_dict({"sentence": [f"s{i}" for i in range(20)], "label": [i % 2 for i in range(20)]}).to_parquet(train)
    path = glue.held_out(train, 5, 15, tmp_path / "data")
    assert Dataset.from_parquet(str(path))["sentence"][:] == [f"s{i}" for i in range(15, 20)]
    for used in (16, 0):
        with pytest.raises(SystemExit, match="has 20 rows"):
            glue.held_out(train, 5, used, tmp_path / "data")


def test_bad_selections_say_what_would_work(words: list[str], tmp_path: Path) -> None:
    out = [*words, "--output_dir", str(tmp_path)]
    with pytest.raises(SystemExit, match="list_cells"):
        glue.main([*out, "--only", "nothing"])
    with pytest.raises(SystemExit, match="choose among sst2, mrpc, stsb"):
        glue.main([*out, "--tasks", "cola"])
    with pytest.raises(SystemExit, match="no finished cell"):
        glue.write_report(tmp_path)
    assert set(glue_grid.LABELS) == set(METHODS)

"""stage_curve: what each stage's end weighs, against models that really stop there; and its picture."""

import json
from pathlib import Path

import pytest
from models import CASES, quick
from test_callback import bert, trainer_of

from stompp_hf import (
    Progression,
    StoMPPTrainerCallback,
    binarize_model,
    calibrate,
    pack_model,
    read_run,
    record_stages,
    stage_curve,
    summary,
)
from stompp_hf.reports.html_report import write_report
from stompp_hf.reports.stage_curve import values_of

BERT = CASES["bert"]


def stopped(stages: int):
    """A tiny BERT with the first of its two stages frozen, or both, packed."""
    model = binarize_model(BERT.build(), quick(last_stage=stages))
    progression = Progression(model, 10)
    progression.step(10)
    calibrate(model, [BERT.batch()])
    return pack_model(model)


def test_points_are_those_of_models_that_stop_there() -> None:
    points = stage_curve(binarize_model(BERT.build(), quick()))
    assert [(point.frozen, point.name) for point in points] == [
        (0, ""), (1, "bert.encoder.layer.0"), (2, "bert.encoder.layer.1"),
    ]  # fmt: skip
    assert points[0].bytes > sum(4 * p.numel() for p in BERT.build().parameters()) and points[0].share_1bit == 0.0
    for point in points[1:]:
        totals = summary(stopped(point.frozen)).totals
        assert point.bytes == totals.stored
        assert point.share_1bit == pytest.approx(totals.ratios["share_1bit"])


def test_it_ends_where_freezing_ends() -> None:
    assert len(stage_curve(binarize_model(BERT.build(), quick(last_stage=1)))) == 2
    weights = stage_curve(binarize_model(BERT.build(), quick(binarize="weights")))
    assert {point.share_1bit for point in weights} == {0.0}  # a real operand is no 1-bit product


def test_a_report_draws_it(tmp_path: Path) -> None:
    stompp = StoMPPTrainerCallback()
    trainer = trainer_of(
        tmp_path, bert(), stompp, eval_strategy="steps", eval_steps=2, compute_metrics=lambda _: {"a": 1}
    )
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    path = record_stages(tmp_path, trainer.model)
    run = read_run(tmp_path)
    assert [point.frozen for point, _ in values_of(run)] == [0, 1, 2]
    assert {value for _, value in values_of(run)} == {1}
    write_report([tmp_path], tmp_path / "r.html", pictures=tmp_path / "pictures")
    assert (tmp_path / "pictures" / "curve.png").is_file()
    assert "Where to stop" in (tmp_path / "r.html").read_text()
    path.write_text(json.dumps({"stages": [3, {"frozen": "x"}]}))
    assert values_of(read_run(tmp_path)) == []

"""A search on `torch-cpu`, from its latency table to the file that runs on the compiled kernels."""

import json
from pathlib import Path

import pytest
import torch

import tightrope as tr
from tests import digits
from tightrope.compressors.kernels.linear import QuantLinear
from tightrope.compressors.kernels.onednn import QuantConv2d
from tightrope.estimators.measured import fitted
from tightrope.search import config as configs
from tightrope.search.evaluate import evaluator_for, pack, unpack
from tightrope.search.progress import Quiet
from tightrope.search.session import set_up
from tightrope.spaces import Choice

QUICK = {"MET": 60, "ANCHORS": 8, "PASSES": 1, "TURNS": 1, "NODE_ROUNDS": 6, "NET_ROUNDS": 6}
SPACE = {"rank_shares": [0.25], "least_width": 0.5}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[tr.Study, Path]:
    folder = tmp_path_factory.mktemp("runs") / "digits"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIGHTROPE_CACHE", str(tmp_path_factory.mktemp("tables")))
        for name, value in QUICK.items():
            patch.setattr(fitted, name, value)
        study = tr.search(
            digits.task(), device="torch-cpu", budget=["latency<=20x", "size<=0.5x"], trials=5, workers=0, out=str(folder),
            progress=Quiet(), agent="random", space=SPACE, finetune={"epochs": 1, "candidates": 1},
        )  # type: ignore[operator]  # fmt: skip
    return study, folder


def test_the_report_measures_best_against_dense_in_torch(run: tuple[tr.Study, Path]) -> None:
    study, folder = run
    assert len(study.trials) == 5 and all(t.score is not None for t in study.trials)
    report = json.loads((folder / "best" / "report.json").read_text())
    rows = {row["name"]: row for row in report["rows"]}
    assert report["device"] == "torch-cpu" and not report["simulated"]
    assert {"dense", "uniform", "recipe", "best"} <= set(rows)
    for row in rows.values():
        measured = row["latency_ratio_measured"]
        assert measured["low"] <= measured["ratio"] <= measured["high"]
    assert not (folder / "best" / "model.onnx").exists()


def test_the_exported_file_runs_and_scores_what_the_report_says(run: tuple[tr.Study, Path]) -> None:
    module = tr.load(run[1] / "best" / "model.safetensors")
    best = next(r for r in json.loads((run[1] / "best" / "report.json").read_text())["rows"] if r["name"] == "best")
    x, y = digits.data()
    with torch.no_grad():
        right = module(x[1300:]).argmax(1) == y[1300:]
    assert 100 * right.float().mean().item() == pytest.approx(best["score_test"]["value"], abs=1e-3)


def test_workers_score_on_the_kernels_what_the_driver_scores(run: tuple[tr.Study, Path]) -> None:
    """The evaluator travels as arrays and plain data, without the traced model."""
    study, _ = run
    task = digits.task()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tightrope.estimators.measured.base.Measured.prepare", lambda *a, **k: None)
        setting = set_up(task, configs.make({"device": "torch-cpu", "space": SPACE}))
    here = evaluator_for(setting.source, task)
    there = unpack(pack(here))
    for trial in study.trials[:3]:
        assert there.evaluate(trial.policy) == here.evaluate(trial.policy) == trial.score


def test_size_budgets_bring_narrow_convolutions_back() -> None:
    task = digits.task()
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tightrope.estimators.measured.base.Measured.prepare", lambda *a, **k: None)
        for budget in ("latency<=0.5x", "size<=50KB"):
            found[budget] = set_up(task, configs.make({"device": "torch-cpu", "budget": [budget]})).space
    narrow, wide = found["latency<=0.5x"], found["size<=50KB"]
    assert narrow.pairs["body"] == ((8, 8), (32, 32)) and any("convolutions are dropped" in note for note in narrow.dropped)
    assert wide.pairs["body"][0] == (2, 8) and not any("convolutions" in note for note in wide.dropped)


def test_compress_and_export_by_hand(tmp_path: Path) -> None:
    task = digits.task()
    network = tr.trace(task.model, task.example_inputs)
    policy = tr.Policy.make(network, {}, {"stem": Choice(8, 8), "body": Choice(3, 8), "head": Choice(4, 8)})
    small = tr.compress(task, policy)
    module = tr.load(tr.export(small, tmp_path / "net.safetensors", device="torch-cpu"))
    assert isinstance(module.body, QuantConv2d) and isinstance(module.head, QuantLinear)
    assert (module.body.bits, module.head.bits) == (3, 4)
    x = digits.data()[0][:50]
    with torch.no_grad():
        torch.testing.assert_close(module(x), small(x), rtol=1e-4, atol=1e-4)

"""The Python face: a search from start to report, on a real net and ONNX Runtime's clock."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import tightrope as tr
from tests import digits
from tests.processor import exact_int8
from tightrope.estimators.measured import ort
from tightrope.search import config as configs
from tightrope.search.evaluate import TorchEvaluator, evaluator_for, held, let_go, open_session, pack, score_module, unpack
from tightrope.search.progress import Quiet
from tightrope.search.session import set_up
from tightrope.search.task import load, one_example, score_of
from tightrope.spaces.errors import ConfigError, DataError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[tr.Study, Path]:
    """A search on `ort-cpu`, in this process; size decides what is found, since by any clock the latency is within its limit."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    study = tr.search(
        digits.task(), budget=["latency<=20x", "size<=0.5x"], trials=8, workers=0, out=str(folder), progress=Quiet(),
        space={"rank_shares": [0.25], "least_width": 0.5}, finetune={"epochs": 1, "candidates": 2},
    )  # type: ignore[operator]  # fmt: skip
    return study, folder


def test_every_trial_is_within_the_budget_and_scored(run: tuple[tr.Study, Path]) -> None:
    study, _ = run
    assert len(study.trials) == 8
    for trial in study.trials:
        assert trial.score is not None and study.problem.limits.met(trial.cost)
    assert study.best is not None and study.best in study.front
    assert len(study.to_pandas()) == 8


def test_the_report_has_dense_controls_and_best_measured(run: tuple[tr.Study, Path]) -> None:
    report = json.loads((run[1] / "best" / "report.json").read_text())
    rows = {row["name"]: row for row in report["rows"]}
    assert {"dense", "uniform", "random", "recipe", "best"} <= set(rows)
    for row in rows.values():
        measured = row["latency_ratio_measured"]
        assert measured["low"] <= measured["ratio"] <= measured["high"]
        assert row["score_test"]["count"] == 497 and row["score_search"]["count"] == 400
    assert rows["dense"]["latency_ratio_measured"]["ratio"] == 1.0
    assert report["versions"]["torch"] == torch.__version__ and set(report["seconds"]) >= {"controls", "measure", "test"}


def test_the_exported_file_runs_in_integers_and_scores_what_the_report_says(run: tuple[tr.Study, Path]) -> None:
    _, folder = run
    best = next(r for r in json.loads((folder / "best" / "report.json").read_text())["rows"] if r["name"] == "best")
    session = open_session((folder / "best" / "model.onnx").read_bytes())
    x, y = digits.data()
    name = session.get_inputs()[0].name
    outputs = np.concatenate([session.run(None, {name: x[i : i + 1].numpy()})[0] for i in range(1300, 1797)])
    assert 100 * (outputs.argmax(1) == y[1300:].numpy()).mean() == pytest.approx(best["score_test"]["value"], abs=0.21)


def test_compress_and_export_by_hand(run: tuple[tr.Study, Path], tmp_path: Path) -> None:
    study, _ = run
    task = digits.task()
    assert study.best is not None
    before = {name: p.detach().clone() for name, p in task.model.named_parameters()}
    small = tr.compress(task, study.best.policy)
    assert all(torch.equal(before[name], p) for name, p in task.model.named_parameters())
    path = tr.export(small, tmp_path / "net.onnx", device="ort-cpu")
    x = digits.data()[0][:1]
    session = open_session(path.read_bytes())
    got = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(got), small(x), atol=0.5, rtol=0.05)
    assert tr.export(small, tmp_path / "net.safetensors").exists()
    with pytest.raises(tr.TightropeError, match="ends in"):
        tr.export(small, tmp_path / "net.pt")


def test_workers_score_what_the_driver_scores() -> None:
    """The evaluator that travels to workers, with its arrays shared, gives the same scores."""
    task = digits.task()
    setting = set_up(task, configs.make({"device": "bitfusion"}))
    here = evaluator_for(setting.source, task)
    arrays = pack(here)
    for array in arrays.values():
        array.flags.writeable = False
    there = unpack(arrays)
    rng = np.random.default_rng(0)
    for _ in range(3):
        policy = setting.space.sample(rng)
        assert there.evaluate(policy) == here.evaluate(policy)
    slow = TorchEvaluator(setting.prepared, task)  # of models that ONNX cannot hold
    assert unpack(pack(slow)).evaluate(policy) == slow.evaluate(policy)


@pytest.mark.parametrize("lost", [False, True])
def test_a_processor_that_loses_8_bit_sums_is_told(
    lost: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:  # fmt: skip
    monkeypatch.setattr(ort, "saturates", lambda: lost)
    set_up(digits.task(), configs.make({"device": "bitfusion"}))
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert ["products of ONNX Runtime saturate" in text and "those of bitfusion do not" in text for text in told] == [True] * lost


@exact_int8
def test_8_bit_sums_are_whole_with_vnni() -> None:
    assert not ort.saturates()


@exact_int8
def test_torch_scores_roughly_what_onnx_runtime_does() -> None:
    task = digits.task()
    setting = set_up(task, configs.make({"device": "bitfusion"}))
    evaluator, rng = evaluator_for(setting.source, task), np.random.default_rng(0)
    for _ in range(3):
        policy = setting.space.sample(rng)
        score, module = evaluator.evaluate(policy), tr.compress_prepared(None, policy, setting.prepared)
        assert score_module(module, task.split("search"), task.measure).value == pytest.approx(score.value, abs=2 * score.stderr)


def test_slices_of_one_tensor_travel_once_and_come_back_as_ones_own() -> None:
    whole = torch.randn(1000, 50)
    batches = [((x, {"mask": x > 0}), torch.arange(10)) for x in whole.split(10)] + [((whole[:, ::2].bfloat16(), {}), "a target")]
    arrays = pack(held(batches))
    sent = sum(array.nbytes for array in arrays.values())
    assert sent < 1.3 * (whole.nbytes + whole.numel()) + 100_000  # the rows and their masks; besides names, targets, the last batch
    for array in arrays.values():
        array.flags.writeable = False
    found = let_go(unpack(arrays))
    assert all(
        torch.equal(x, y) and torch.equal(mask["mask"], other["mask"])
        for ((x, mask), _), ((y, other), _) in zip(batches[:-1], found[:-1], strict=True)
    )
    assert found[-1][0][0].dtype == torch.bfloat16 and found[-1][1] == "a target"
    found[0][0][0].add_(1.0)
    assert torch.equal(let_go(unpack(arrays))[0][0][0], whole[:10])


def test_the_readme_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    code = text.split("```python\n", 1)[1].split("```", 1)[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    assert (tmp_path / "digits.onnx").exists()


def test_tasks_by_reference_and_their_errors() -> None:
    task = load("tests.digits:build", "tests.digits:splits")
    assert one_example(task.split("search")[0][0]).shape == (1, 1, 8, 8)
    with pytest.raises(ConfigError, match="written as module:name"):
        load("tests.digits", "tests.digits:splits")
    with pytest.raises(DataError, match="finite"):
        score_of([np.array([1.0, float("inf")])])
    with pytest.raises(ConfigError, match="metric must be"):
        tr.Task(digits.build(), digits.data()[0][:1], [], [], metric="accuracy")


def test_what_is_not_on_the_cpu_is_refused() -> None:
    x, y = digits.data()
    part = [(x[:10], y[:10])]
    tr.Task(digits.fresh(), x[:1], part, part).check()
    for model, inputs in ((digits.fresh().to("meta"), x[:1]), (digits.fresh(), x[:1].to("meta"))):
        with pytest.raises(DataError, match=r"must be on the CPU.* on meta: call .cpu\(\)"):
            tr.Task(model, inputs, part, part).check()


def test_configurations_override_and_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "net.yaml"
    path.write_text("budget: latency<=0.5x\ntrials: 7\n")
    found = configs.load(path, ["space.least_width=0.25", "finetune.epochs=0"], agent="random", workers=None)
    assert (found.budget, found.trials, found.space.least_width, found.finetune.epochs, found.agent) == (
        ["latency<=0.5x"],
        7,
        0.25,
        0,
        "random",
    )
    found.save(path)
    assert configs.load(path) == found


def test_a_model_can_be_prepared_where_gradients_are_off() -> None:
    task = digits.task()
    with torch.inference_mode():
        prepared = tr.prepare(task.model, task.example_inputs, task.split("calibration"))
    assert all(layer.saliency.any() for layer in prepared.statistics.layers.values())

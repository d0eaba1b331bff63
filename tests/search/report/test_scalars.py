"""What a search writes for TensorBoard's own panels, read back with TensorBoard's own reader."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import problems

from tightrope.search.distribute import Inline
from tightrope.search.report.runs import KINDS, open_run
from tightrope.search.report.scalars import MOST_HPARAMS, Board, summary
from tightrope.search.study import Study
from tightrope.spaces import Budget, Choice, Cost, Network, Policy, UnitCost, lower


class WithUnits(problems.Additive):
    """A device that tells what each unit costs."""

    def estimate(self, network: Network, policy: Policy) -> Cost:
        units = tuple(UnitCost(u.layer, u.layer, u.kind, self.unit_ms(u)) for u in lower(network, policy))
        return replace(super().estimate(network, policy), units=units)


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Study]:
    folder = tmp_path_factory.mktemp("run")
    device, executor = WithUnits(), Inline(lambda _: problems.ClosedForm(problems.residual_network()))
    space, budget = problems.make_space(device), Budget.parse("latency<=0.3x")
    with (
        Board(folder) as board,
        Study.start(space, device, budget, executor, folder=folder, agent="random", trials=40, seed=3) as study,
    ):
        study.run(executor, on_trial=[board])
        board.finish(study, "# Report\n\n| a | b |\n|---|---|\n| 1 | 2 |")
    return folder, study


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    events = EventAccumulator(str(folder), size_guidance={"tensors": 0})
    events.Reload()
    found = {}
    for tag in events.Tags()["tensors"]:
        if events.SummaryMetadata(tag).plugin_data.plugin_name == "scalars":
            found[tag] = {event.step: float(make_ndarray(event.tensor_proto)) for event in events.Tensors(tag)}
    return found


def test_every_trial_has_its_numbers(searched: tuple[Path, Study]) -> None:
    folder, study = searched
    found = scalars(folder)
    trials = {t.number: t for t in study.trials}
    assert found["trial/score"] == pytest.approx({n: t.score.value for n, t in trials.items() if t.score}, rel=1e-6)
    assert found["trial/latency_ms"] == pytest.approx({n: t.cost.latency_ms for n, t in trials.items()}, rel=1e-6)
    assert all(speed > 0 for speed in found["speed/trials_per_second"].values())


def test_best_and_front_are_those_of_the_study(searched: tuple[Path, Study]) -> None:
    folder, study = searched
    found = scalars(folder)
    last = len(study.trials) - 1
    assert study.best and study.best.score
    assert found["best/score_under_budget"][last] == pytest.approx(study.best.score.value, rel=1e-6)
    assert found["front/hypervolume"][last] == pytest.approx(study.hypervolume, rel=1e-6)
    assert found["front/points"][last] == len(study.front)
    volumes = [found["front/hypervolume"][n] for n in sorted(found["front/hypervolume"])]
    assert volumes == sorted(volumes) and volumes[0] < volumes[-1]


def test_the_latency_of_each_layer_is_kept_for_the_front(searched: tuple[Path, Study]) -> None:
    folder, study = searched
    (folder / "network.json").write_text(json.dumps(study.problem.network.to_json()))
    run = open_run(folder)
    kinds = [KINDS[int(kind)] for kind in run.columns["kind"]]
    front = {t.number for t in study.front}
    for index, (kind, number) in enumerate(zip(kinds, run.columns["number"], strict=True)):
        if kind == "trial" and number in front:
            trial = study.trials[int(number)]
            latency = run.detail(index)["latency"]
            device = study.problem.device
            assert isinstance(device, WithUnits)
            expected = {}
            for unit in lower(study.problem.network, trial.policy):
                expected[unit.layer] = expected.get(unit.layer, 0.0) + device.unit_ms(unit)
            assert latency == pytest.approx(expected)
            assert sum(latency.values()) == pytest.approx(trial.cost.latency_ms)


def test_hparams_hold_the_front_only(searched: tuple[Path, Study]) -> None:
    folder, study = searched
    names = {f"trial-{t.number}" for t in study.front}
    assert {p.name for p in (folder / "hparams").iterdir() if p.is_dir()} == names
    assert 0 < len(names) <= MOST_HPARAMS
    trial = study.front[0]
    assert trial.score
    found = scalars(folder / "hparams" / f"trial-{trial.number}")
    assert found["hparams/score"][0] == pytest.approx(trial.score.value, rel=1e-6)
    assert found["hparams/cost_to_dense"][0] == pytest.approx(study.price(trial), rel=1e-6)


def test_the_report_is_text_and_the_front_has_histograms(searched: tuple[Path, Study]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, study = searched
    events = EventAccumulator(str(folder), size_guidance={"tensors": 0})
    events.Reload()
    text = events.Tensors("report")[0].tensor_proto.string_val[0]
    assert text.startswith(b"# Report")
    assert [e.step for e in events.Tensors("policy_over_front/weight_bits")] == list(range(len(study.front)))


def test_summary_of_a_policy_by_hand() -> None:
    net = problems.residual_network()
    dense = summary(net, Policy.make(net))
    assert dense == {
        "mean_weight_bits": 32, "mean_act_bits": 32, "channels_kept": 1, "low_rank_layers": 0, "weights_kept": 1,
    }  # fmt: skip
    half = Policy.make(net, {"d": 48}, {"head": Choice(8, 8)})
    # 3x32x9, 32x48x9 twice, 32x64x9, 64x9, then 64x96 and 96x10 of which half remain.
    before, after = 864 + 13824 * 2 + 18432 + 576 + 6144 + 960, 864 + 13824 * 2 + 18432 + 576 + 3072 + 480
    found = summary(net, half)
    assert found["weights_kept"] == round(after / before, 4)
    assert found["channels_kept"] == 0.875
    assert found["mean_weight_bits"] == round((32 * (after - 480) + 8 * 480) / after, 3)


@pytest.mark.parametrize("heavy", ["tensorboard", "torch", "rich"])
def test_importing_the_board_is_cheap(heavy: str) -> None:
    code = f"import sys, tightrope.search, tightrope.search.report.scalars; sys.exit({heavy!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_full_disk_does_not_end_the_search(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")  # a folder cannot be made below a file
    with Board(tmp_path / "file") as board:
        for step in range(3):
            board.scalars({"a": 1.0}, step=step)
    assert [record.message.partition(":")[0] for record in caplog.records] == ["nothing more is written for TensorBoard"]

"""Giving up hopeless policies: the error rate by simulation, what it saves, and that the search stays reproducible."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from problems import DEVICE, SPACE, ClosedForm, essence, mark

from tightrope.search import journal
from tightrope.search.distribute import Inline
from tightrope.search.stopping import Pairing, Rival, Scored
from tightrope.search.study import Study
from tightrope.spaces import Budget, Policy, Score
from tightrope.spaces.errors import FormatError

Right = NDArray[np.bool_]


def play(own: Right, rival: Right, *, error: float, margin: float = 0.0, chunk: int = 16) -> tuple[bool, Pairing]:
    """Whether a policy is given up before its last chunk, and the test."""
    test = Pairing(Rival(np.packbits(rival).tobytes(), margin, error), len(own))
    for start in range(0, len(own), chunk):
        if test.hopeless(own[start : start + chunk]) and start + chunk < len(own):
            return True, test
    return False, test


@pytest.mark.parametrize(("level", "apart"), [(0.9, 0.05), (0.7, 0.2), (0.97, 0.02)])
@pytest.mark.parametrize("margin", [0.0, 1.5])
def test_a_policy_as_good_as_its_rival_is_given_up_no_more_often_than_stated(level: float, apart: float, margin: float) -> None:
    rng, error, runs, n = np.random.default_rng(0), 0.1, 600, 500
    given_up = 0
    for _ in range(runs):
        rival = rng.random(n) < level
        swap = int(apart * n)  # as many gained as lost, but for the margin: the hardest case that is not hopeless
        own = rival.copy()
        own[rng.choice(np.flatnonzero(rival), swap, replace=False)] = False
        gained = min(swap - int(margin / 100 * n), int((~rival).sum()))
        own[rng.choice(np.flatnonzero(~rival), gained, replace=False)] = True
        if own.sum() - rival.sum() < -margin / 100 * n:
            continue
        order = rng.permutation(n)
        given_up += play(own[order], rival[order], error=error, margin=margin)[0]
    assert given_up / runs <= error + 2 * np.sqrt(error * (1 - error) / runs)


def test_a_hopeless_policy_ends_early_with_a_score_below_its_rivals() -> None:
    rng, n = np.random.default_rng(1), 1000
    rival = rng.random(n) < 0.92
    seen = []
    for quality in (0.8, 0.5):
        own = rng.random(n) < quality
        stopped, test = play(own, rival, error=0.02)
        score = test.score()
        seen.append(score.count)
        assert stopped and score.count < n
        assert score.value < 100 * rival.mean()
        assert abs(score.value - 100 * quality) < 4 * score.stderr + 2
    assert seen[1] < seen[0] < 400


def test_what_cannot_come_level_is_given_up_without_error() -> None:
    rival = np.ones(100, bool)
    own = rival.copy()
    own[3] = False  # behind by one example, and the rival has no other wrong
    stopped, test = play(own, rival, error=1e-9, chunk=10)
    assert stopped and test.score().count == 10


def test_a_margin_keeps_what_is_only_a_little_behind() -> None:
    rng = np.random.default_rng(2)
    rival = np.arange(1000) % 10 > 0
    own = rival & (np.arange(1000) % 50 != 7)  # 2 points fewer
    order = rng.permutation(1000)
    assert play(own[order], rival[order], error=0.05)[0]
    assert not play(own[order], rival[order], error=0.05, margin=2.0)[0]


class Examples(ClosedForm):
    """A closed-form score as outcomes of 400 examples: the harder ones are right only under better policies."""

    def __init__(self, payload: object) -> None:
        super().__init__(SPACE.network)
        self.seen: dict[int, int] = {}

    def compare(self, policy: Policy, rival: Rival | None) -> Scored:
        noise = np.random.default_rng(mark(policy)).normal(0, 3, 400)
        right = np.random.default_rng(0).uniform(0, 100, 400) + noise < self.evaluate(policy).value
        if rival is not None:
            stopped, test = play(right, np.unpackbits(np.frombuffer(rival.right, np.uint8)).astype(bool), error=rival.error)
            if stopped:
                return test.score(), None
        return Score(100 * right.mean(), 100 * right.std() / 20, 400), np.packbits(right).tobytes()


def begin(folder: Path, stopping: float, budget: str = "latency<=0.2x") -> tuple[Study, Inline]:
    executor = Inline(Examples)
    study = Study.start(
        SPACE, DEVICE, Budget.parse(budget), executor, folder=folder, agent="random", trials=60, stopping=stopping
    )  # fmt: skip
    return study, executor


def test_a_search_that_gives_up_finds_the_same_best_and_resumes(tmp_path: Path) -> None:
    results = {}
    for error in (0.0, 0.02):
        study, executor = begin(tmp_path / str(error), error)
        with study:
            study.run(executor)
        results[error] = study
    whole, short = results[0.0], results[0.02]
    counts = [t.score.count for t in short.trials if t.score]
    assert all(t.right is None for t in whole.trials)
    assert min(counts) < max(counts) == 400 and sum(counts) < 0.7 * 400 * 60
    assert short.best is not None and whole.best is not None and short.best.policy == whole.best.policy
    assert not any(t.number in {f.number for f in short.front} for t in short.trials if t.score and t.score.count < 400)

    study, executor = begin(tmp_path / "parts", 0.02)
    with study:
        study.run(executor, 25)
    with Study.resume(tmp_path / "parts", SPACE, DEVICE) as study:
        study.run(executor)
    assert essence(study.trials) == essence(short.trials)
    assert [t.right for t in journal.read(tmp_path / "parts").trials] == [t.right for t in short.trials]


def test_under_an_accuracy_to_be_kept_the_dense_model_less_the_points_is_the_rival(tmp_path: Path) -> None:
    study, _ = begin(tmp_path, 0.02, "accuracy>=-2")
    with study:
        rival = study.rival(SPACE.dense)
    assert rival is not None and rival.margin == 2.0 and rival.right == study.header.right


def test_damaged_outcomes_are_said_with_line_and_field(tmp_path: Path) -> None:
    study, executor = begin(tmp_path, 0.02)
    with study:
        study.run(executor, 2)
    path = tmp_path / "trials.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1].replace('"right":"', '"right":"!'), *lines[2:]]) + "\n")
    with pytest.raises(FormatError, match=r"trials.jsonl:2.right must be base64"):
        journal.read(tmp_path)

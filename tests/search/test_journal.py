"""The one record of a search: what it keeps when things go wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from problems import Watched, judge, make_problem, make_space

from tightrope.search import journal
from tightrope.search.distribute import Inline
from tightrope.search.journal import Control, Final, Journal
from tightrope.search.study import Study
from tightrope.spaces import Budget, Score
from tightrope.spaces.errors import FormatError, RunError, TightropeError

PROBLEM = make_problem()


def search(folder: Path, trials: int = 5) -> Study:
    """A finished search of a few trials."""
    executor, device = Inline(Watched), PROBLEM.device
    with Study.start(
        PROBLEM.space, device, Budget.parse("latency<=0.2x"), executor, folder=folder, agent="uniform", trials=trials
    ) as study:  # fmt: skip
        study.run(executor)
    return study


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a journal with every kind of line."""
    folder = tmp_path_factory.mktemp("run")
    study = search(folder)
    best = study.best
    assert best is not None and best.score is not None
    with Journal(folder) as book:
        book.append(Control("recipe", best.policy, best.cost, best.score))
        book.append(Final(best.number, Score(98.0, 0.4, 1000), best.cost, (0.21, 0.2, 0.22)))
    return (folder / journal.NAME).read_bytes()


def test_what_is_read_is_what_was_written(text: bytes, tmp_path: Path) -> None:
    (tmp_path / journal.NAME).write_bytes(text)
    record = journal.read(tmp_path)
    lines = [record.header, *record.trials, *record.controls, *record.finals]
    assert [line.to_json() for line in lines] == [json.loads(line) for line in text.splitlines()]
    assert [line.to_json()["kind"] for line in lines] == ["study"] + ["trial"] * 5 + ["control", "final"]


@given(data=st.data())
def test_a_torn_last_line_is_left_out_wherever_it_is_torn(
    text: bytes, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    first = text.index(b"\n") + 1
    end = data.draw(st.integers(first, len(text)))
    path = tmp_path_factory.mktemp("torn") / journal.NAME
    path.write_bytes(text[:end])
    whole = text[:end].rfind(b"\n") + 1
    record = journal.read(path)
    assert record.torn == end - whole
    assert 1 + len(record.trials) + len(record.controls) + len(record.finals) == text[:whole].count(b"\n")
    with Journal(path.parent) as book:
        assert book.mend() == end - whole
        book.append(Final(3, Score(98.0, 0.4, 1000), PROBLEM.dense_cost))
    assert path.read_bytes()[:whole] == text[:whole]
    assert journal.read(path).finals[-1].number == 3


@pytest.mark.parametrize(
    ("line", "old", "new", "message"),
    [
        (3, b'"latency_ms":', b'"latency_ms":"', r"trials\.jsonl:3 is not JSON"),
        (3, b'"number":1', b'"number":"1"', r"trials\.jsonl:3\.number must be int"),
        (2, b'"size_bytes":', b'"size_bites":', r"trials\.jsonl:2\.cost\.size_bytes is missing"),
        (2, b'"kind":"trial"', b'"kind":"trail"', r"trials\.jsonl:2\.kind must be trial or control or final, got 'trail'"),
        (1, b'"version":1', b'"version":9', r"trials\.jsonl:1\.version must lie in \[1, 1\], got 9; a newer Tightrope"),
        (3, b'"number":1', b'"number":0', r"holds trial 0 more than once"),
        (5, b"{", b"\xff", r"trials\.jsonl:5 is not UTF-8"),
    ],
)  # fmt: skip
def test_a_corrupt_line_is_named_with_its_field(
    text: bytes, tmp_path: Path, line: int, old: bytes, new: bytes, message: str
) -> None:
    lines = text.split(b"\n")
    assert old in lines[line - 1]
    lines[line - 1] = lines[line - 1].replace(old, new, 1)
    (tmp_path / journal.NAME).write_bytes(b"\n".join(lines))
    with pytest.raises(FormatError, match=message):
        journal.read(tmp_path)


@given(data=st.data())
def test_no_damage_raises_anything_but_our_errors(
    text: bytes, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    damaged = bytearray(text)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged") / journal.NAME
    path.write_bytes(bytes(damaged))
    try:
        journal.read(path)
    except TightropeError as error:
        assert str(path) in str(error) or "bits" in str(error)


def test_nothing_there_or_nothing_finished_is_said(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="there is no search in"):
        journal.read(tmp_path)
    (tmp_path / journal.NAME).write_bytes(b'{"kind":"study"')
    with pytest.raises(RunError, match="first line was never finished"):
        journal.read(tmp_path)


def test_a_second_driver_is_refused_and_a_stale_lock_does_no_harm(tmp_path: Path) -> None:
    holder = (
        "import sys, time; from pathlib import Path; from tightrope.search.journal import Journal;"
        "b = Journal(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    )
    search(tmp_path)
    with subprocess.Popen([sys.executable, "-c", holder, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(RunError, match="is in use by another search"):
            Study.resume(tmp_path, PROBLEM.space, PROBLEM.device)
        other.kill()
    Study.resume(tmp_path, PROBLEM.space, PROBLEM.device).close()


def test_a_folder_with_a_search_is_not_begun_again(tmp_path: Path) -> None:
    search(tmp_path)
    before = (tmp_path / journal.NAME).read_bytes()
    with pytest.raises(RunError, match="already holds a search; resume it"):
        search(tmp_path)
    assert (tmp_path / journal.NAME).read_bytes() == before


def test_a_search_killed_before_its_first_line_can_begin_again(tmp_path: Path) -> None:
    (tmp_path / journal.NAME).write_bytes(b'{"kind":"study","ver')
    assert len(search(tmp_path).trials) == 5
    assert len(journal.read(tmp_path).trials) == 5


def test_a_full_disk_is_said_and_loses_nothing_told(tmp_path: Path) -> None:
    """The kernel refuses to grow the file beyond a limit in the middle of a line, as a full disk does."""
    code = (
        "import resource, signal, sys; from pathlib import Path; from test_journal import search;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000));"
        "search(Path(sys.argv[1]), 50)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert "RunError" in done.stderr and "cannot be written" in done.stderr and "make room and resume" in done.stderr
    record = journal.read(tmp_path)
    assert record.torn == 0 and len(record.trials) >= 2
    executor = Inline(Watched)
    with Study.resume(tmp_path, PROBLEM.space, PROBLEM.device) as study:
        study.run(executor, 12)
    assert study.trials[: len(record.trials)] == list(record.trials)
    assert len(journal.read(tmp_path).trials) == 12


def test_a_search_of_something_else_is_refused(tmp_path: Path) -> None:
    search(tmp_path)
    other = make_problem()
    with pytest.raises(RunError, match="is a search of network"):
        Study.resume(tmp_path, make_space(PROBLEM.device), type(PROBLEM.device)(name="other"))  # type: ignore[call-arg]
    assert judge(other, 0, other.cheapest).feasible

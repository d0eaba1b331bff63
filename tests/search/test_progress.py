"""Where a run reports to."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

from tightrope.search.progress import Lines, Quiet, default


def test_plain_lines_where_asked_for_and_in_a_notebook(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert type(default()) is Quiet and type(default(lines=True)) is Lines
    shell = ModuleType("IPython")
    monkeypatch.setitem(sys.modules, "IPython", shell)
    for found, kind in ((None, Quiet), (SimpleNamespace(kernel=None), Quiet), (SimpleNamespace(kernel=object()), Lines)):
        monkeypatch.setattr(shell, "get_ipython", lambda found=found: found, raising=False)
        assert type(default()) is kind
    progress = Lines()
    progress.EVERY_SECONDS = -1.0
    progress.phase("search", 3)
    progress.step(1, 3, "best 98.00 at 0.250x")
    progress.close()
    assert [line.split("] ")[1] for line in capsys.readouterr().out.splitlines()] == ["search", "  1/3 best 98.00 at 0.250x"]
    assert progress.seconds.keys() == {"search"}

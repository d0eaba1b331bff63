"""Energy counters as the kernel shows them, in a folder that stands in for it."""

import time
from pathlib import Path

import pytest

from tightrope.estimators.measured import fitted, rapl


def counter(folder: Path, name: str, microjoules: object, most: int = 1_000_000, label: str = "package-0") -> Path:
    """A counter as Documentation/power/powercap/powercap.rst of Linux lays it out."""
    (folder / name).mkdir()
    (folder / name / "name").write_text(f"{label}\n")
    (folder / name / "energy_uj").write_text(f"{microjoules}\n")
    (folder / name / "max_energy_range_uj").write_text(f"{most}\n")
    return folder / name / "energy_uj"


def test_packages_and_their_dram_are_added_and_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rapl, "ROOT", tmp_path)
    first, second = counter(tmp_path, "intel-rapl:0", 100), counter(tmp_path, "intel-rapl:1", 999_000, label="package-1")
    dram = counter(tmp_path, "intel-rapl:0:2", 50, label="dram")
    inside = [
        counter(tmp_path, "intel-rapl:0:0", 5, label="core"), counter(tmp_path, "intel-rapl:0:1", 5, label="uncore"),
        counter(tmp_path, "intel-rapl:2", 5, label="psys"), counter(tmp_path, "intel-rapl-mmio:0", 5),
    ]  # fmt: skip
    (tmp_path / "intel-rapl").mkdir()  # the control type itself, which counts nothing

    def work() -> None:
        first.write_text("300100\n")
        second.write_text("9000\n")  # it began again at zero
        dram.write_text("40050\n")
        for path in inside:
            path.write_text("200000\n")

    assert rapl.joules(work) == pytest.approx(0.3 + 0.01 + 0.04)


def test_a_counter_that_began_again_is_not_told_without_its_range(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rapl, "ROOT", tmp_path)
    energy = counter(tmp_path, "intel-rapl:0", 100)
    (energy.parent / "max_energy_range_uj").unlink()
    assert rapl.joules(lambda: energy.write_text("90\n")) is None
    assert rapl.joules(lambda: energy.write_text("1090\n")) == pytest.approx(0.001)


def test_a_counter_that_may_not_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:  # fmt: skip
    monkeypatch.setattr(rapl, "ROOT", tmp_path)
    counter(tmp_path, "intel-rapl:0", 100)
    hidden = counter(tmp_path, "intel-rapl:1", 100)
    hidden.unlink()
    hidden.mkdir()  # reading it fails, for root too
    assert rapl.counters() == [] and rapl.joules(lambda: None) is None
    assert str(hidden) in caplog.text and "only root may read it" in caplog.text


def test_power_is_told_for_a_second_of_cpu_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rapl, "ROOT", tmp_path)
    monkeypatch.setattr(fitted, "POWER_SECONDS", 0.05)

    class Net:
        def visit(self) -> int:
            start = time.thread_time_ns()
            while time.thread_time_ns() - start < 1_000_000:
                pass
            spent = time.thread_time_ns() - start
            energy.write_text(str(int(energy.read_text()) + spent * 7 // 1000))  # 7 W
            return spent

    assert fitted.power_of(Net()) is None
    energy = counter(tmp_path, "intel-rapl:0", 0, 10**12)
    assert 0 < (fitted.power_of(Net()) or 0) < 7.1  # what the test itself takes is not counted as energy


@pytest.mark.parametrize("content", ["", "no number"])
def test_without_counters_nothing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    monkeypatch.setattr(rapl, "ROOT", tmp_path / "missing")
    assert rapl.counters() == [] and rapl.joules(lambda: None) is None
    monkeypatch.setattr(rapl, "ROOT", tmp_path)
    counter(tmp_path, "intel-rapl:0", content)
    assert rapl.joules(lambda: None) is None

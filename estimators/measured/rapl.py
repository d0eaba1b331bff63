"""Energy counters of the processor (RAPL), where the system has them and lets them be read."""

from collections.abc import Callable
from pathlib import Path

ROOT = Path("/sys/class/powercap")


def counters() -> list[Path]:
    """The counters of whole packages that can be read."""
    packages = (folder for folder in sorted(ROOT.glob("intel-rapl:*")) if folder.name.count(":") == 1)
    return [folder for folder in packages if _read(folder / "energy_uj") is not None]


def joules(work: Callable[[], object]) -> float | None:
    """Joules that the packages took while `work` ran, idle power and all other programs included; None without counters."""
    packages = counters()
    before = [_read(p / "energy_uj") for p in packages]
    work()
    after = [_read(p / "energy_uj") for p in packages]
    total = 0.0
    for package, first, last in zip(packages, before, after, strict=True):
        if first is None or last is None:
            return None
        total += (last - first if last >= first else last - first + (_read(package / "max_energy_range_uj") or 0)) / 1e6
    return total or None


def _read(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None

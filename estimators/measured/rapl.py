"""Energy counters of the processor (RAPL), where the system has them and lets them be read.

Linux shows them below `/sys/class/powercap` (Documentation/power/powercap/powercap.rst): `intel-rapl:0` is a package, or `psys` for
the whole platform, and `intel-rapl:0:1` a part of it. Cores and graphics are inside the package's count, its DRAM is not.
"""

import logging
from collections.abc import Callable
from pathlib import Path

ROOT = Path("/sys/class/powercap")
log = logging.getLogger(__name__)


def counters() -> list[Path]:
    """The folders whose counters add up to what all packages and their DRAM take; none where one of them cannot be read."""
    found = [folder for folder in sorted(ROOT.glob("intel-rapl:*")) if _counts(folder)]
    hidden = [folder / "energy_uj" for folder in found if _number(folder / "energy_uj") is None]
    if hidden:
        log.warning(
            "%s cannot be read, so that energy is modelled and not measured; since Linux 5.10 only root may read it: start the "
            "preparation as root once, or let everybody read it with `chmod a+r`", hidden[0],
        )  # fmt: skip
    return [] if hidden else found


def joules(work: Callable[[], object]) -> float | None:
    """Joules that packages and DRAM took while `work` ran, idle power and all other programs included; None without counters."""
    folders = counters()
    before = [_number(folder / "energy_uj") for folder in folders]
    work()
    total = 0
    for folder, first in zip(folders, before, strict=True):
        last, most = _number(folder / "energy_uj"), _number(folder / "max_energy_range_uj")
        if first is None or last is None or (last < first and most is None):
            return None
        total += last - first if last >= first else last - first + (most or 0)  # it began again at zero
    return total / 1e6 or None


def _counts(folder: Path) -> bool:
    """Whether a counter is that of a package, or of DRAM, which no package's counter holds."""
    name = _text(folder / "name") or ""
    return name == "dram" if folder.name.count(":") > 1 else name.startswith("package")


def _number(path: Path) -> int | None:
    try:
        return int(_text(path) or "")
    except ValueError:
        return None


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None

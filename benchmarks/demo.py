"""The demo as a newcomer runs it: how long it takes, and how much memory its driver and workers take together.

    python -m benchmarks.demo [--json FILE] [--out DIR] [--quick]

Runs `tightrope demo` in a process of its own and, twice a second, adds up the proportional set size (PSS: shared pages count once)
of every process that it started, Ray's own among them. The net is trained at first use and read from the cache afterwards; which
of the two it was is printed. `--quick` is for few trials: that it runs, no more.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

MARK = "TIGHTROPE_BENCHMARK"
PERIOD_SECONDS = 0.5
QUICK = ("--trials", "12")


def pss_bytes(mark: str) -> int:
    """Proportional set size of all processes whose environment has the mark; those that end meanwhile count nothing."""
    wanted, total = f"{MARK}={mark}".encode(), 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if wanted not in (process / "environ").read_bytes().split(b"\0"):
                continue
            for line in (process / "smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += 1024 * int(line.split()[1])
        except (OSError, ValueError):
            continue
    return total


def run(out: Path, extra: tuple[str, ...]) -> dict[str, float]:
    """Wall seconds and peak memory of one demo."""
    mark = uuid.uuid4().hex
    start, peak = time.monotonic(), 0
    command = [sys.executable, "-m", "tightrope.search.cli", "demo", "--out", str(out), *extra]
    with subprocess.Popen(command, env={**os.environ, MARK: mark}) as process:
        while process.poll() is None:
            peak = max(peak, pss_bytes(mark))
            time.sleep(PERIOD_SECONDS)
    if process.returncode:
        raise SystemExit(f"demo: it ended with exit code {process.returncode}")
    return {"demo_seconds": time.monotonic() - start, "demo_peak_pss": peak / 2**30}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help='write [{"name", "value", "unit"}] here')
    parser.add_argument("--out", type=Path, help="folder of its runs; a temporary one unless given")
    parser.add_argument("--quick", action="store_true", help="few trials: that it runs, no more")
    given = parser.parse_args()
    from tightrope.search.demo_task import cache_dir

    trained = any((cache_dir() / "weights").glob("demo-resnet-0-*"))
    with tempfile.TemporaryDirectory() as scratch:
        found = run(given.out or Path(scratch), QUICK if given.quick else ())
    print(f"the net was {'read from the cache' if trained else 'trained first'}")
    units = {"demo_seconds": "s", "demo_peak_pss": "GiB"}
    rows: list[dict[str, Any]] = [{"name": name, "value": round(value, 3), "unit": units[name]} for name, value in found.items()]
    for row in rows:
        print(f"{row['name']:20} {row['value']:9.2f} {row['unit']}")
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

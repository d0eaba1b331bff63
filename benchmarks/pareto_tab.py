"""The Pareto tab under load: 20,000 trials over 20 runs, in a real TensorBoard and a headless Chromium.

    python benchmarks/pareto_tab.py [--quick] [--json FILE]

Needs Chromium on the PATH and `pip install playwright`. The runs are synthetic, of the size that a search writes. Figures:
seconds from the click on the tab to all points painted, by the browser's clock, median and worst of several openings; the
same in CPU milliseconds of the page's main thread, which another program's load does not change; milliseconds of a frame while
panning and zooming, by both clocks; the server's memory beyond a TensorBoard without the plug-in; and bytes read from disk by
polls.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "search" / "report"))

SERVER = """
import sys, time
from tensorboard import default, program
plugins = default.get_static_plugins()
if sys.argv[2] == "with":
    from tightrope.search.report.plugin import ParetoPlugin
    plugins.append(ParetoPlugin)
board = program.TensorBoard(plugins=plugins)
board.configure(argv=["tensorboard", "--logdir", sys.argv[1], "--port", "0", "--host", "127.0.0.1", "--load_fast", "false"])
print(board.launch(), flush=True)
time.sleep(3600)
"""
PAINTED = """
const now = () => performance.timeOrigin + performance.now();
addEventListener('click', () => { window.clicked = now(); }, true);
new MutationObserver(() => requestAnimationFrame(() => setTimeout(() => { window.painted = now(); })))
    .observe(document, {subtree: true, attributes: true, attributeFilter: ['data-drawn']});
"""
FRAMES = """async (steps) => {
    const host = document.querySelector('.scatter');
    const box = host.getBoundingClientRect();
    const at = (type, x, y, more) => host.dispatchEvent(new (type === 'wheel' ? WheelEvent : PointerEvent)(type,
        {clientX: box.x + x, clientY: box.y + y, pointerId: 1, button: 0, bubbles: true, cancelable: true, ...more}));
    const frame = () => new Promise((done) => requestAnimationFrame(done));
    const times = [];
    host.setPointerCapture = () => {};
    at('pointerdown', 300, 200);
    for (let i = 0; i < 2 * steps; i++) {
        const start = performance.now();
        if (i < steps) at('pointermove', 300 + 4 * i, 200 + 2 * (i % 20));
        else at('wheel', 320, 180, {ctrlKey: true, deltaY: i % 20 < 10 ? -20 : 20});
        if (i === steps - 1) at('pointerup', 300 + 4 * i, 200);
        await frame();
        await frame();
        times.push((performance.now() - start) / 2);
    }
    return times.sort((a, b) => a - b);
}"""


@contextmanager
def served(logdir: Path, which: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A TensorBoard in a process of its own."""
    command = [sys.executable, "-c", SERVER, logdir.name, which]
    process = subprocess.Popen(command, cwd=logdir.parent, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline().strip()
    finally:
        process.terminate()
        process.wait()


def field(pid: int, file: str, name: str) -> int:
    """A number of `/proc`."""
    for line in Path(f"/proc/{pid}/{file}").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1])
    raise LookupError(name)


def launch(play: Any) -> Any:
    """A headless Chromium."""
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-sync"
    return play.chromium.launch(executable_path=shutil.which("chromium"), args=flags.split())


class Tab:
    """The tab, opened in a browser of its own."""

    def __init__(self, play: Any, address: str, trials: int) -> None:
        self.browser = launch(play)
        page = self.browser.new_page(viewport={"width": 1440, "height": 1000})
        page.add_init_script(PAINTED)
        page.goto(f"{address}#timeseries")
        page.wait_for_selector("text=/pareto/i", timeout=60_000)
        page.wait_for_timeout(3000)  # TensorBoard itself is at rest
        self._clock = page.context.new_cdp_session(page)
        self._clock.send("Performance.enable", {"timeDomain": "threadTicks"})
        before = self.cpu_ms()
        page.click("text=/pareto/i")
        page.wait_for_selector("iframe[src*=plugin_entry]", timeout=30_000)
        self.frame = page.query_selector("iframe[src*=plugin_entry]").content_frame()
        every = f"() => Number(document.querySelector('.scatter')?.dataset.drawn) >= {trials} && window.painted"
        painted = self.frame.wait_for_function(every, timeout=120_000, polling=200).json_value()
        self.seconds = (painted - page.evaluate("window.clicked")) / 1000
        self.opening_ms = self.cpu_ms() - before

    def cpu_ms(self) -> float:
        """CPU time of the main thread's tasks so far."""
        found = {m["name"]: m["value"] for m in self._clock.send("Performance.getMetrics")["metrics"]}
        return 1000 * float(found["TaskDuration"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="a tenth of the trials")
    arguments = parser.parse_args()
    import sample_runs
    from playwright.sync_api import sync_playwright

    from tightrope.search.report import runs as reader

    each, openings = (100, 2) if arguments.quick else (1000, 5)
    found: list[dict[str, Any]] = []

    def tell(name: str, value: float, unit: str) -> None:
        found.append({"name": name, "value": round(value, 4), "unit": unit})
        print(f"{name:32} {value:10.3f} {unit}")

    with tempfile.TemporaryDirectory() as folder:
        logdir = Path(folder)
        net = sample_runs.network(5)
        made = [list(sample_runs.lines(net, name="", trials=min(each, 250), agent="tpe", seed=seed)) for seed in range(4)]
        scored = 0
        for i in range(20):  # a few searches, written out again and again under other numbers
            run, (study, *rest) = logdir / f"run-{i:02}", made[i % 4]
            run.mkdir()
            (run / "network.json").write_text(json.dumps(net.to_json()))
            trials = [line for line in rest if line["kind"] == "trial"]
            written = [{**trials[k % len(trials)], "number": k} for k in range(each)]
            for k, line in enumerate(written):
                line["cost"] = {**line["cost"], "latency_ms": line["cost"]["latency_ms"] * (1 + 0.02 * ((k * 7919 + i) % 13) / 13)}
            (run / "trials.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (study, *written)))
            scored += sum(line["score"] is not None for line in written)
        tell("trials", 20 * each, "")
        tell("journal_bytes", sum(p.stat().st_size for p in logdir.rglob("trials.jsonl")), "B")
        with sync_playwright() as play:
            with served(logdir, "without") as (process, address):
                browser = launch(play)
                page = browser.new_page()
                page.goto(address)
                page.wait_for_timeout(3000)
                browser.close()
                without = field(process.pid, "status", "VmHWM")
            with served(logdir, "with") as (process, address):
                opened = []
                for k in range(openings):
                    tab = Tab(play, address, scored)
                    opened.append((tab.seconds, tab.opening_ms))
                    if k < openings - 1:
                        tab.browser.close()
                seconds, opening_ms = zip(*opened, strict=True)
                tell("load_average", os.getloadavg()[0], "")
                tell("first_drawing", statistics.median(seconds), "s")
                tell("first_drawing_worst", max(seconds), "s")
                tell("first_drawing_cpu", statistics.median(opening_ms), "ms")
                tell("points_drawn", int(tab.frame.get_attribute(".scatter", "data-drawn")), "")
                before_ms = tab.cpu_ms()
                times = tab.frame.evaluate(FRAMES, 40)
                tell("frame_cpu", (tab.cpu_ms() - before_ms) / (2 * len(times)), "ms")
                tell("frame_median", times[len(times) // 2], "ms")
                tell("frame_95th", times[int(len(times) * 0.95)], "ms")
                tell("server_memory_beyond", (field(process.pid, "status", "VmHWM") - without) / 1024, "MiB")
                before = field(process.pid, "io", "rchar")
                tab.frame.page.wait_for_timeout(6500)
                idle = field(process.pid, "io", "rchar") - before
                tab.browser.close()
        tell("bytes_read_by_idle_polls", idle, "B")
        # Only new lines: what the reader takes from the file when ten are added.
        run = reader.open_run(logdir / "run-00")
        lines = (logdir / "run-00" / "trials.jsonl").read_bytes().splitlines(keepends=True)[-10:]
        with (logdir / "run-00" / "trials.jsonl").open("ab") as file:
            file.writelines(lines)
        before = field(os.getpid(), "io", "rchar")
        run.refresh()
        tell("bytes_read_for_ten_lines", field(os.getpid(), "io", "rchar") - before, "B")
        tell("bytes_of_ten_lines", sum(map(len, lines)), "B")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

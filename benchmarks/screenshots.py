"""The pictures of the docs: the Pareto tab of TensorBoard, light and dark, and the front as SVG.

    python benchmarks/screenshots.py [RUN ...] [--out docs/screenshots]

With run folders, pictures of them. Without, of two synthetic runs whose name and provenance say that they are made up.
Needs Chromium on the PATH and `pip install playwright`.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests" / "search" / "report")]
BEST = """() => {
    const best = document.querySelector('.best').getBoundingClientRect();
    const host = document.querySelector('.scatter').getBoundingClientRect();
    return {x: best.x + best.width / 2 - host.x, y: best.y + best.height / 2 - host.y};
}"""


def shoot(play: Any, address: str, out: Path) -> None:
    """Take the pictures of a TensorBoard that is running."""
    import pareto_tab

    browser = pareto_tab.launch(play)
    for theme in ("light", "dark"):
        page = browser.new_page(viewport={"width": 1440, "height": 1130})
        page.goto(f"{address}?darkMode={str(theme == 'dark').lower()}#pareto")
        page.wait_for_selector("iframe[src*=plugin_entry]", timeout=60_000)
        frame = page.query_selector("iframe[src*=plugin_entry]").content_frame()
        frame.wait_for_selector(".scatter[data-ready]", timeout=60_000)
        if theme == "dark":
            page.evaluate("document.body.classList.add('dark-mode')")
            frame.select_option("#choose-colour", "number")
            frame.select_option("#choose-heat", "channels")
        page.wait_for_timeout(500)
        if frame.query_selector(".best"):
            frame.click(".scatter", position=frame.evaluate(BEST))
            frame.wait_for_selector(".policy tbody tr")
        page.mouse.move(5, 5)
        page.wait_for_timeout(500)
        page.screenshot(path=out / f"pareto-{theme}.png")
        if theme == "light":
            frame.click("button:text-is('Pin')")
            frame.focus(".scatter")
            for key in ("End", "ArrowLeft", "ArrowLeft", "ArrowLeft", "ArrowLeft"):
                page.keyboard.press(key)
            frame.wait_for_selector("text='to the pinned'")
            page.wait_for_timeout(300)
            frame.query_selector(".detail").screenshot(path=out / "policy.png")
        page.close()
    browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "screenshots")
    arguments = parser.parse_args()
    import pareto_tab
    import sample_runs
    from playwright.sync_api import sync_playwright

    from tightrope.search.report.picture import write_svg

    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        logdir = Path(folder) / "runs"
        logdir.mkdir()
        for run in arguments.runs:
            copy = logdir / run.resolve().name
            copy.mkdir()
            for name in ("trials.jsonl", "network.json", "layers.jsonl"):
                if (run / name).exists():
                    (copy / name).write_bytes((run / name).read_bytes())
        if not arguments.runs:
            for agent, seed in (("ddpg", 2), ("tpe", 1)):
                sample_runs.write_run(logdir / f"made-up-{agent}", agent=agent, seed=seed)
        with pareto_tab.served(logdir, "with") as (_, address), sync_playwright() as play:
            shoot(play, address, arguments.out)
        write_svg(sorted(logdir.iterdir())[-1], arguments.out / "front.svg")
    for file in sorted(arguments.out.iterdir()):
        print(f"{file.stat().st_size / 1000:8.1f} kB  {file}")


if __name__ == "__main__":
    main()

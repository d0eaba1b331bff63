"""The front as table, plot, CSV, picture and page."""

import csv
import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import sample_runs
from rich.console import Console

from tightrope.search.report.axis import Axis
from tightrope.search.report.front import Front, amount, write_csv
from tightrope.search.report.page import write_html
from tightrope.search.report.picture import write_svg
from tightrope.search.report.terminal import export_hint, front_plot, front_table
from tightrope.spaces.errors import RunError

MARKUP = "<script>window.hacked=1</script>"
NAMESPACE = "{http://www.w3.org/2000/svg}"


def expected_front(journal: list[dict[str, Any]], metric: str = "latency_ms") -> list[int]:
    """Numbers of the front from cheapest to best, by comparing each with each."""
    points = {
        line["number"]: (line["cost"][metric], -line["score"]["value"])
        for line in journal
        if line["kind"] == "trial" and line["score"]
    }
    kept = [n for n, p in points.items() if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points.values())]
    return sorted(kept, key=lambda n: points[n])


def shown(renderable: object) -> str:
    console = Console(file=StringIO(), width=200)
    console.print(renderable)
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("runs") / "net"
    return folder, sample_runs.write_run(folder, trials=120)


def test_the_csv_is_the_front(run: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    folder, journal = run
    write_csv(folder, tmp_path / "front.csv")
    rows = list(csv.DictReader((tmp_path / "front.csv").open()))
    assert [int(row["number"]) for row in rows] == expected_front(journal)
    dense = journal[0]["dense"]
    for row in rows:
        line = journal[1 + int(row["number"])]
        assert float(row["latency_ms"]) == line["cost"]["latency_ms"]
        assert float(row["score"]) == line["score"]["value"]
        assert float(row["cost_to_dense"]) == pytest.approx(line["cost"]["latency_ms"] / dense["cost"]["latency_ms"], abs=1e-6)
    assert sum(int(row["best"]) for row in rows) <= 1


def test_the_table_names_the_front_the_best_and_the_controls(run: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, journal = run
    text = shown(front_table(folder))
    front = Front.load(folder)
    rows = [row.replace("●", "").replace("+", "", 1).split() for row in text.splitlines()]
    numbers = [cells[0] for cells in rows if len(cells) > 5 and "±" in cells[1]]
    assert numbers == [*map(str, expected_front(journal)), "dense", "uniform", "recipe", "random"]
    assert front.best is not None
    if front.best in front.trials:
        assert f"● {front.best.number} " in text


def test_the_plot_has_every_mark(run: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, journal = run
    lines = front_plot(folder, width=76, height=18).plain.splitlines()
    assert max(map(len, lines[1:-1])) <= 77
    body = "\n".join(lines[1:-2])
    assert 1 <= body.count("●") <= len(expected_front(journal))
    assert all(mark in body for mark in "·DURX")


def test_markup_in_a_run_is_text_in_table_picture_and_page(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    sample_runs.write_run(folder, trials=20, agent=f"[bold]{MARKUP}[/nonsense]", device=MARKUP)
    assert MARKUP in shown(front_table(folder))
    write_svg(folder, tmp_path / "front.svg")
    tree = ET.parse(tmp_path / "front.svg")
    assert not list(tree.iter(f"{NAMESPACE}script"))
    assert any(MARKUP in (node.text or "") for node in tree.iter(f"{NAMESPACE}text"))
    write_html(folder, tmp_path / "page.html")
    assert MARKUP not in (tmp_path / "page.html").read_text()


def test_the_picture_draws_the_front(run: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    folder, journal = run
    write_svg(folder, tmp_path / "front.svg")
    tree = ET.parse(tmp_path / "front.svg")
    marks = [
        node
        for node in tree.iter(f"{NAMESPACE}circle")
        if node.get("class") in ("on-front", "infeasible") and node.get("r") == "4.5"
    ]
    assert len(marks) == len(expected_front(journal))
    assert [float(m.get("cx", 0)) for m in marks] == sorted(float(m.get("cx", 0)) for m in marks)
    assert [float(m.get("cy", 0)) for m in marks] == sorted((float(m.get("cy", 0)) for m in marks), reverse=True)
    assert len([n for n in tree.iter(f"{NAMESPACE}path") if n.get("class") == "control"]) == 4


def test_the_page_needs_nothing_but_itself(run: tuple[Path, list[dict[str, Any]]], tmp_path: Path, chromium: Any) -> None:
    folder, journal = run
    write_html(folder, tmp_path / "page.html")
    page = chromium.new_page()
    errors: list[str] = []
    asked: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: asked.append(request.url))
    page.goto((tmp_path / "page.html").as_uri())
    page.wait_for_selector(".scatter[data-ready]")
    assert len(page.query_selector_all(".trial")) == sum(bool(line["score"]) for line in journal if line["kind"] == "trial")
    page.focus(".scatter")
    page.keyboard.press("Home")
    page.wait_for_selector(f".detail h2:text-is('Trial {expected_front(journal)[0]}')")
    page.wait_for_selector(".policy tbody tr")
    with page.expect_download() as download:
        page.click("button:text-is('policy.json')")
    assert '"version": 1' in Path(download.value.path()).read_text()
    assert [url for url in asked if not url.startswith(("file:", "blob:", "data:"))] == []
    assert errors == []
    page.close()


def test_the_command_that_exports_the_best(run: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    best = Front.load(run[0]).best
    assert best is not None
    assert export_hint(run[0]) == f"tightrope export {run[0]} --trial {best.number} --format onnx"
    sample_runs.write_run(tmp_path / "a b", trials=30, device="bitfusion")
    assert export_hint(tmp_path / "a b").startswith(f"tightrope export '{tmp_path}/a b' --trial ")
    assert export_hint(tmp_path / "a b").endswith(" --format packed")


def test_a_trial_that_was_given_up_stands_on_no_front(tmp_path: Path) -> None:
    journal = sample_runs.write_run(tmp_path / "net", trials=40)
    numbers = expected_front(journal)[::2]
    for number in numbers:
        journal[1 + number]["score"]["count"] = 250
    (tmp_path / "net" / "trials.jsonl").write_text("".join(json.dumps(line) + "\n" for line in journal))
    assert f"{len(numbers)} trials were given up early" in shown(front_table(tmp_path / "net"))
    write_csv(tmp_path / "net", tmp_path / "front.csv")
    rows = list(csv.DictReader((tmp_path / "front.csv").open()))
    left = expected_front([line for line in journal if line.get("number") not in numbers])
    assert [int(row["number"]) for row in rows] == left and not {*left} & {*numbers}
    assert {row["scored_on"] for row in rows} == {"1000"}


def test_a_folder_that_is_no_run_is_a_clear_error(tmp_path: Path) -> None:
    for write in (write_csv, write_svg, write_html):
        with pytest.raises(RunError, match=r"trials\.jsonl"):
            write(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_amounts_are_read_easily() -> None:
    assert amount("latency_ms", 0.1234) == "123.4 µs"
    assert amount("size_bytes", 1_229_608) == "1.23 MB"
    assert amount("macs", 900) == "900"
    assert amount("energy_mj", None) == "–"


def test_ticks_are_round_and_inside() -> None:
    assert Axis(0, 10, 0, 100).ticks(5) == [0, 2, 4, 6, 8, 10]
    assert Axis(0.06, 1.2, 0, 100, True).ticks(7) == pytest.approx([0.1, 0.2, 0.5, 1.0])
    assert Axis(0.1, 10, 0, 100, True).at(1) == pytest.approx(50)


@pytest.mark.parametrize("module", ["front", "picture", "terminal", "page", "runs"])
def test_importing_is_cheap(module: str) -> None:
    heavy = {"torch", "tensorboard", "rich", "ray"}
    code = f"import sys, tightrope.search.report.{module}; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

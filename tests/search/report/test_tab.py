"""The tab "Pareto" in a real browser against a real TensorBoard."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sample_runs

CENTRE = """(node) => {
    const [box, host] = [node, document.querySelector('.scatter')].map((n) => n.getBoundingClientRect());
    return {x: box.x + box.width / 2 - host.x, y: box.y + box.height / 2 - host.y};
}"""


def click_trial(frame: Any, number: int) -> None:
    """Click the point of a trial."""
    position = frame.evaluate(f"({CENTRE})(document.querySelector('.trial[data-number=\"{number}\"]'))")
    frame.click(".scatter", position=position)
    frame.wait_for_selector(f".detail h2:text-is('Trial {number}')")


def shown_policy(frame: Any) -> dict[str, list[str]]:
    """The table of the policy: channels, rank, weight and activation bits of each layer."""
    frame.wait_for_selector(".policy tbody tr")
    rows = frame.eval_on_selector_all(
        ".policy tbody tr", "rows => rows.map(r => [r.dataset.layer, [...r.cells].slice(1, 5).map(c => c.innerText.trim())])"
    )
    return dict(rows)


def expected_policy(policy: dict[str, Any]) -> dict[str, list[str]]:
    """What the table must show, worked out from the journal's line alone."""
    net = sample_runs.network()
    found = {}
    for layer in net.layers:
        width = {**net.widths, **policy["channels"]}
        choice = policy["layers"].get(layer.name, {})
        (group, _), *_ = layer.outputs.terms or (("", 0),)
        kept = f"{width[group]}/{net.widths[group]}" if group else "10/10"
        bits = ["fp" if choice.get(key, 32) == 32 else str(choice[key]) for key in ("weight_bits", "act_bits")]
        found[layer.name] = [kept, str(choice["rank"]) if "rank" in choice else "–", *bits]
    return found


def test_all_trials_are_drawn_and_a_click_shows_the_policy(
    tmp_path: Path, tensorboard: Callable[[Path], str], tab: Callable[..., Any]
) -> None:
    journal = sample_runs.write_run(tmp_path / "net", trials=300)
    trials = [line for line in journal if line["kind"] == "trial"]
    scored = [line for line in trials if line["score"]]
    frame = tab(tensorboard(tmp_path))

    assert len(frame.query_selector_all(".trial")) == len(scored) >= 290
    assert {e.get_attribute("data-name") for e in frame.query_selector_all(".control")} == {"dense", "uniform", "random", "recipe"}

    numbers = [int(e.get_attribute("data-number")) for e in frame.query_selector_all(".trial.on-front")]
    # The front, by comparing each with each.
    points = {t["number"]: (t["cost"]["latency_ms"], -t["score"]["value"]) for t in scored}
    beaten = {n for n, p in points.items() if any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points.values())}
    assert set(numbers) == set(points) - beaten

    for number in numbers[:3]:
        click_trial(frame, number)
        shown, expected = shown_policy(frame), expected_policy(trials[number]["policy"])
        for layer, (channels, rank, *bits) in expected.items():
            assert shown[layer][0] == channels
            assert shown[layer][1].split("/")[0] == rank
            assert shown[layer][2:] == bits
        latency = sample_runs.shares(sample_runs.network(), trials[number]["policy"])
        told = frame.eval_on_selector_all(".policy tbody tr td:nth-child(6)", "cells => cells.map(c => parseFloat(c.innerText))")
        assert told == pytest.approx([100 * ms / sum(latency.values()) for ms in latency.values()], rel=0.06)
        command = frame.inner_text(".command code")
        assert command == f"tightrope export {tmp_path / 'net'} --trial {number} --format onnx"


def test_policy_can_be_downloaded(tmp_path: Path, tensorboard: Callable[[Path], str], tab: Callable[..., Any]) -> None:
    journal = sample_runs.write_run(tmp_path / "net", trials=40)
    frame = tab(tensorboard(tmp_path))
    number = int(frame.query_selector(".trial.on-front").get_attribute("data-number"))
    click_trial(frame, number)
    with frame.page.expect_download() as download:
        frame.click("button:text-is('policy.json')")
    saved = json.loads(Path(download.value.path()).read_text())
    assert saved == next(line["policy"] for line in journal if line.get("number") == number and line["kind"] == "trial")


def write_lines(folder: Path, lines: list[dict[str, Any]], mode: str = "a") -> None:
    with (folder / "trials.jsonl").open(mode) as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def test_a_growing_run_updates_without_reload(tmp_path: Path, tensorboard: Callable[[Path], str], tab: Callable[..., Any]) -> None:
    journal = sample_runs.write_run(tmp_path / "net", trials=60)
    write_lines(tmp_path / "net", journal[:21], "w")
    frame = tab(tensorboard(tmp_path))
    drawn = len(frame.query_selector_all(".trial"))
    assert drawn == sum(bool(line["score"]) for line in journal[1:21])
    frame.evaluate("window.untouched = true")
    half = json.dumps(journal[61])
    write_lines(tmp_path / "net", journal[21:61])
    with (tmp_path / "net" / "trials.jsonl").open("a") as file:
        file.write(half[: len(half) // 2])
    expected = sum(bool(line["score"]) for line in journal[1:61])
    frame.wait_for_function(f"() => document.querySelectorAll('.trial').length === {expected}", timeout=10_000)
    assert frame.query_selector_all(".control[data-name='uniform']") == []  # its line is half written
    with (tmp_path / "net" / "trials.jsonl").open("a") as file:
        file.write(half[len(half) // 2 :] + "\n")
    frame.wait_for_selector(".control[data-name='uniform']", state="attached", timeout=10_000)
    assert frame.evaluate("window.untouched") is True


def test_an_empty_log_folder_waits_for_its_first_run(
    tmp_path: Path, tensorboard: Callable[[Path], str], tab: Callable[..., Any]
) -> None:
    frame = tab(tensorboard(tmp_path), wait=False)
    frame.wait_for_selector("text=No search here yet", timeout=30_000)
    assert not frame.is_visible(".scatter")
    sample_runs.write_run(tmp_path / "net", trials=10)
    frame.wait_for_selector(".scatter[data-ready]", timeout=10_000)
    frame.wait_for_selector(".trial", state="attached")
    assert not frame.is_visible("text=No search here yet")


def test_axes_change(tmp_path: Path, tensorboard: Callable[[Path], str], tab: Callable[..., Any]) -> None:
    journal = sample_runs.write_run(tmp_path / "net", trials=80, simulated=True, device="bitfusion")
    frame = tab(tensorboard(tmp_path))
    offered = frame.eval_on_selector_all("#choose-x option", "options => options.map(o => o.value)")
    assert offered == ["score", "latency_ms", "energy_mj", "size_bytes", "peak_ram_bytes", "macs"]
    trials = {line["number"]: line for line in journal if line["kind"] == "trial" and line["score"]}
    for x, y in (("size_bytes", "score"), ("macs", "score"), ("energy_mj", "score"), ("size_bytes", "latency_ms")):
        serial = frame.get_attribute(".scatter", "data-ready")
        frame.select_option("#choose-x", x)
        frame.select_option("#choose-y", y)
        frame.wait_for_function(f"() => Number(document.querySelector('.scatter').dataset.ready) > {serial}")
        frame.page.wait_for_timeout(100)
        points = {n: (t["cost"][x], -t["score"]["value"] if y == "score" else t["cost"][y]) for n, t in trials.items()}
        beaten = {n for n, p in points.items() if any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points.values())}
        drawn = frame.eval_on_selector_all(".trial.on-front", "points => points.map(p => Number(p.dataset.number))")
        assert {points[n] for n in drawn} == {points[n] for n in set(points) - beaten}  # of equal ones the first is kept
        assert len(drawn) == len({points[n] for n in drawn})
    frame.check("#choose-relative")
    frame.wait_for_selector(".scatter text.title:text('× dense')", state="attached")


def test_two_runs_overlay_and_can_be_hidden(tmp_path: Path, tensorboard: Callable[[Path], str], tab: Callable[..., Any]) -> None:
    from tightrope.search import pareto

    counts, points = {}, {}
    for name, agent, seed in (("one", "tpe", 1), ("two", "ddpg", 2)):
        journal = sample_runs.write_run(tmp_path / name, trials=80, agent=agent, seed=seed)
        scored = [line for line in journal if line["kind"] == "trial" and line["score"]]
        counts[name] = len(scored)
        points[name] = [(line["cost"]["latency_ms"], line["score"]["value"]) for line in scored]
    dense, limit = journal[0]["dense"]["score"]["value"], journal[0]["budget"]["limits"]["latency_ms"]
    frame = tab(tensorboard(tmp_path))
    assert len(frame.query_selector_all(".trial")) == sum(counts.values())
    colours = frame.eval_on_selector_all(
        ".trial:not(.infeasible)", "points => [...new Set(points.map(p => p.getAttribute('fill')))]"
    )
    assert len(colours) == 2

    facts = dict(
        frame.eval_on_selector_all(".runs li", "items => items.map(i => [i.querySelector('.name').innerText, i.innerText])")
    )
    both = [p for run in points.values() for p in run]
    joint = {p for p, kept in zip(both, pareto.non_dominated(*zip(*both, strict=True)), strict=True) if kept}
    for name, run in points.items():
        assert f"joint front {len(joint & set(run))} of {len(joint)}" in facts[name]
        highest = max(line["dense"]["score"]["value"] for line in map(first_line, (tmp_path / "one", tmp_path / "two")))
        volume = pareto.hypervolume([c / limit for c, _ in run], [s / (highest / 2) for _, s in run], (1, 1))
        assert f"hypervolume {volume:.4f}".rstrip("0") in facts[name]
    assert dense > 90

    frame.click(".runs li:has-text('two') input")
    frame.wait_for_function(f"() => document.querySelectorAll('.trial').length === {counts['one']}")
    frame.select_option("#choose-colour", "number")
    frame.wait_for_function("() => new Set([...document.querySelectorAll('.trial')].map(p => p.getAttribute('fill'))).size > 8")


def first_line(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "trials.jsonl").read_text().partition("\n")[0])
    return found


def test_agents_of_one_run_have_colours_and_scores_on_a_part_are_hollow(
    tmp_path: Path, tensorboard: Callable[[Path], str], tab: Callable[..., Any]
) -> None:
    journal = sample_runs.write_run(tmp_path / "net", trials=60, agent="auto")
    labels = {line["number"]: f"auto:{('ilp', 'ddpg', 'tpe')[line['number'] % 3]}" for line in journal if line["kind"] == "trial"}
    scored = [line for line in journal if line["kind"] == "trial" and line["score"]]
    for line in journal:
        if line["kind"] == "trial":
            line["agent"] = labels[line["number"]]
    parts = {line["number"] for line in scored if line["number"] % 4 == 1}
    for line in scored:
        if line["number"] in parts:
            line["score"]["count"] = 250
    write_lines(tmp_path / "net", journal, "w")
    frame = tab(tensorboard(tmp_path))
    hollow = frame.eval_on_selector_all(".trial.part", "points => points.map(p => Number(p.dataset.number))")
    assert set(hollow) == parts
    assert "scored on a part of the split" in frame.inner_text(".legend")
    frame.select_option("#choose-colour", "agent")
    frame.wait_for_selector(".legend :text('auto:ilp')")
    drawn = frame.eval_on_selector_all(
        ".trial:not(.infeasible)",
        "all => all.map(p => [Number(p.dataset.number), p.getAttribute(p.matches('.part') ? 'stroke' : 'fill')])",
    )
    colours = {labels[number]: {c for n, c in drawn if labels[n] == labels[number]} for number, _ in drawn}
    assert len(colours) == 3 and all(len(found) == 1 for found in colours.values())
    assert len(set.union(*colours.values())) == 3
    front = frame.eval_on_selector_all(".trial.on-front", "points => points.map(p => Number(p.dataset.number))")
    for label in colours:
        given = sum(labels[number] == label for number in front)
        assert f"{label}: {given} of the front’s {len(front)}" in frame.inner_text(".legend")
    assert front and not parts & set(front)
    click_trial(frame, min(parts))
    assert "250 of 1,000" in frame.inner_text(".detail")


def test_the_best_of_each_run_stands_there_first_and_columns_of_the_heat_map_can_be_walked(
    tmp_path: Path, tensorboard: Callable[[Path], str], tab: Callable[..., Any]
) -> None:
    from tightrope.search.report.front import Front

    for name, seed in (("one", 1), ("two", 2)):
        sample_runs.write_run(tmp_path / name, trials=60, seed=seed)
    # A trial far below all others is left out of the first view, and the plot says so.
    outlier = json.loads((tmp_path / "one" / "trials.jsonl").read_text().splitlines()[3])
    write_lines(tmp_path / "one", [{**outlier, "number": 999, "score": {"value": -500.0, "stderr": 0.1, "count": 1000}}])
    bests = {name: Front.load(tmp_path / name).best for name in ("one", "two")}
    frame = tab(tensorboard(tmp_path))
    shown = frame.eval_on_selector_all(
        ".bests tbody tr", "rows => rows.map(r => [...r.cells].slice(0, 2).map(c => c.innerText.trim()))"
    )
    assert shown == [[name, f"Trial {best.number}"] for name, best in bests.items() if best]
    assert "1 far below is not in view" in frame.text_content(".scatter .outside")
    frame.click("button[aria-label='Show all']")
    frame.wait_for_selector(".scatter .outside", state="detached")
    frame.click(".bests tr:has-text('two') button")
    assert bests["two"] is not None
    frame.wait_for_selector(f".detail h2:text-is('Trial {bests['two'].number}')")
    frame.click("button[aria-label='Close']")
    frame.wait_for_selector(".bests")
    frame.wait_for_selector(".cell", state="attached")
    frame.focus(".heat")
    frame.page.keyboard.press("End")
    last = Front.load(tmp_path / "one").trials[-1]
    frame.wait_for_selector(f".detail h2:text-is('Trial {last.number}')")
    frame.page.keyboard.press("ArrowLeft")
    before = Front.load(tmp_path / "one").trials[-2]
    frame.wait_for_selector(f".detail h2:text-is('Trial {before.number}')")


MARKUP = "<img src=x onerror='window.hacked=1'><script>window.hacked=1</script>"


def test_markup_in_a_run_is_text(tmp_path: Path, tensorboard: Callable[[Path], str], tab: Callable[..., Any]) -> None:
    net = sample_runs.network(prefix=MARKUP)
    folder = tmp_path / MARKUP.replace("/", "")
    sample_runs.write_run(
        folder, net=net, trials=40, agent=f'"><svg onload=window.hacked=1>{MARKUP}', device=f"javascript:{MARKUP}"
    )
    study = first_line(folder)
    lines = (folder / "trials.jsonl").read_text().splitlines()
    study["budget"]["text"] = [f"latency<=0.25x {MARKUP}"]
    study["metric"] = MARKUP
    failed = {"kind": "trial", "number": 77, "agent": MARKUP, "cost": json.loads(lines[1])["cost"], "failed": MARKUP, "score": None,
              "policy": {"version": MARKUP}}  # fmt: skip
    failed["cost"]["provenance"] = MARKUP
    control = {**json.loads(lines[-4]), "name": f"control {MARKUP}"}
    (folder / "trials.jsonl").write_text("\n".join([json.dumps(study), *lines[1:], json.dumps(failed), json.dumps(control)]) + "\n")
    frame = tab(tensorboard(tmp_path))
    number = int(frame.query_selector(".trial.on-front").get_attribute("data-number"))
    click_trial(frame, number)
    layers = [*shown_policy(frame)]
    assert layers == [layer.name for layer in net.layers] and MARKUP in layers[0]
    frame.click("button:text-is('Pin')")
    frame.hover(".policy tbody tr")
    frame.select_option("#choose-y", "size_bytes")  # the failed trial, which has no score, is drawn over two costs
    frame.wait_for_selector('.trial[data-number="77"]', state="attached")
    frame.focus(".scatter")
    frame.select_option("#choose-colour", "agent")
    frame.hover(".line >> nth=0")
    frame.page.wait_for_timeout(300)
    assert frame.query_selector_all("img, script[src], iframe, object, embed, foreignObject") == []
    assert frame.evaluate("window.hacked") is None and frame.page.evaluate("window.hacked") is None
    assert MARKUP.replace("/", "") in frame.inner_text(".runs")


def test_the_front_can_be_walked_with_the_keyboard(
    tmp_path: Path, tensorboard: Callable[[Path], str], tab: Callable[..., Any]
) -> None:
    sample_runs.write_run(tmp_path / "net", trials=80)
    frame = tab(tensorboard(tmp_path))
    cheapest_first = sorted(
        frame.eval_on_selector_all(".trial.on-front", f"points => points.map(p => [({CENTRE})(p).x, Number(p.dataset.number)])")
    )
    frame.focus(".scatter")
    frame.page.keyboard.press("Home")
    frame.wait_for_selector(f".detail h2:text-is('Trial {cheapest_first[0][1]}')")
    frame.page.keyboard.press("ArrowRight")
    frame.wait_for_selector(f".detail h2:text-is('Trial {cheapest_first[1][1]}')")
    frame.page.keyboard.press("End")
    frame.wait_for_selector(f".detail h2:text-is('Trial {cheapest_first[-1][1]}')")
    assert f"Trial {cheapest_first[-1][1]}" in frame.inner_text("[aria-live]")
    ticks = frame.eval_on_selector_all(".scatter text", "texts => texts.map(t => t.textContent).join()")
    frame.page.keyboard.press("+")
    frame.wait_for_function(
        f"() => [...document.querySelectorAll('.scatter text')].map(t => t.textContent).join() !== {json.dumps(ticks)}"
    )
    frame.page.keyboard.press("0")
    frame.page.keyboard.press("Enter")
    assert frame.evaluate("document.activeElement.className") == "card detail"
    nameless = """[...document.querySelectorAll('button, select, input')]
        .filter(e => !(e.textContent.trim() || e.getAttribute('aria-label') || e.labels?.length)).map(e => e.outerHTML)"""
    assert frame.evaluate(nameless) == []


def test_a_brush_selects_and_a_pin_compares(tmp_path: Path, tensorboard: Callable[[Path], str], tab: Callable[..., Any]) -> None:
    journal = sample_runs.write_run(tmp_path / "net", trials=80)
    frame = tab(tensorboard(tmp_path))
    box = frame.query_selector(".scatter").bounding_box()
    mouse, keyboard = frame.page.mouse, frame.page.keyboard
    keyboard.down("Shift")
    mouse.move(box["x"] + 75, box["y"] + 16)
    mouse.down()
    mouse.move(box["x"] + box["width"] - 22, box["y"] + box["height"] - 48, steps=4)
    mouse.up()
    keyboard.up("Shift")
    scored = sum(bool(line["score"]) for line in journal if line["kind"] == "trial")
    frame.wait_for_selector(f"text='{scored} selected'")
    frame.click("button:text-is('Clear')")
    numbers = frame.eval_on_selector_all(".trial.on-front", "points => points.map(p => Number(p.dataset.number))")
    click_trial(frame, numbers[0])
    frame.click("button:text-is('Pin')")
    click_trial(frame, numbers[-1])
    frame.wait_for_selector("text='to the pinned'")
    changed = frame.eval_on_selector_all(".policy tr.changed", "rows => rows.map(r => r.dataset.layer)")
    first, last = (expected_policy(journal[1 + n]["policy"]) for n in (numbers[0], numbers[-1]))
    assert changed == [layer for layer in first if first[layer] != last[layer]]


def test_the_heat_map_has_the_front_from_cheapest_to_best(
    tmp_path: Path, tensorboard: Callable[[Path], str], tab: Callable[..., Any]
) -> None:
    journal = sample_runs.write_run(tmp_path / "net", trials=60)
    frame = tab(tensorboard(tmp_path))
    frame.wait_for_selector(".cell", state="attached")
    scored = {t["number"]: t for t in journal if t["kind"] == "trial" and t["score"]}
    order = sorted((t["cost"]["latency_ms"], -t["score"]["value"], n) for n, t in scored.items())
    best, front = -1.0, []
    for *_, number in order:
        if scored[number]["score"]["value"] > best:
            best = scored[number]["score"]["value"]
            front.append(number)
    net = sample_runs.network()
    cells = frame.query_selector_all(".cell")
    assert len(cells) == len(front) * len(net.layers)
    cells[len(net.layers) * 2].click()  # the first layer of the third column
    frame.wait_for_selector(f".detail h2:text-is('Trial {front[2]}')")


def test_light_dark_and_large(tmp_path: Path, tensorboard: Callable[[Path], str], tab: Callable[..., Any], chromium: Any) -> None:
    sample_runs.write_run(tmp_path / "net", trials=40)
    address = tensorboard(tmp_path)
    frame = tab(address)
    luminance = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).map(Number).reduce((a, b) => a + b) / 3"
    assert frame.evaluate(luminance) > 200
    frame.page.evaluate("document.body.classList.add('dark-mode')")
    frame.wait_for_function(f"() => {luminance} < 60")
    # 200 % zoom halves the room that the page has.
    frame.page.set_viewport_size({"width": 720, "height": 600})
    frame.page.wait_for_timeout(300)
    assert frame.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_many_trials_are_drawn_on_a_canvas(tmp_path: Path, tensorboard: Callable[[Path], str], tab: Callable[..., Any]) -> None:
    journal = sample_runs.write_run(tmp_path / "net", trials=100)
    trials = [line for line in journal if line["kind"] == "trial" and line["score"]]
    again = [{**trials[k % len(trials)], "number": k} for k in range(100, 2000)]
    write_lines(tmp_path / "net", again)
    frame = tab(tensorboard(tmp_path))
    frame.wait_for_function(f"() => Number(document.querySelector('.scatter').dataset.drawn) === {len(trials) + len(again)}")
    inked = "document.querySelector('canvas').getContext('2d').getImageData(0, 0, 2000, 2000).data.some((v) => v > 0)"
    assert frame.evaluate(inked)
    front = frame.query_selector_all(".trial")
    assert 0 < len(front) < 100 and all("on-front" in e.get_attribute("class") for e in front)
    number = int(front[0].get_attribute("data-number"))
    click_trial(frame, number)
    assert shown_policy(frame)["stem"][0] == expected_policy(journal[1 + number]["policy"])["stem"][0]


@pytest.mark.parametrize("floor", [None, -8.0])
def test_the_best_is_the_one_that_the_search_takes(
    tmp_path: Path, tensorboard: Callable[[Path], str], tab: Callable[..., Any], floor: float | None
) -> None:
    from tightrope.search import pareto
    from tightrope.search.report.front import Front

    journal = sample_runs.write_run(tmp_path / "net", trials=120)
    if floor is not None:  # an accuracy to be kept instead of a latency
        study = journal[0]
        study["budget"] = {"text": [f"accuracy>={floor:g}"], "limits": {}, "floor": floor}
        for line in journal[1:]:
            if line["kind"] == "trial":
                kept = line["score"] and line["score"]["value"] >= study["dense"]["score"]["value"] + floor
                line["feasible"] = bool(kept)
        write_lines(tmp_path / "net", journal, "w")
    best = Front.load(tmp_path / "net").best
    assert best is not None
    frame = tab(tensorboard(tmp_path))
    assert [int(e.get_attribute("data-number")) for e in frame.query_selector_all("circle.best")] == [best.number]
    assert len(frame.query_selector_all("line.budget")) == 1
    titles = frame.eval_on_selector_all(".line text.title", "texts => texts.map(t => t.textContent)")
    assert ("least latency (ms)" in titles) == (floor is not None)
    front = Front.load(tmp_path / "net")
    near = pareto.ties(front.record.trials, best, lambda t: t.cost.latency_ms) if floor is None else []
    frame.focus(".scatter")
    frame.page.keyboard.press("End")
    for trial in reversed(front.trials[-3:]):
        frame.wait_for_selector(f".detail h2:text-is('Trial {trial.number}')")
        badges = frame.eval_on_selector_all(".detail .badge", "all => all.map(b => b.textContent)")
        assert ("ties with the best" in badges) == (trial in near)
        frame.page.keyboard.press("ArrowLeft")


def test_a_dense_model_of_far_higher_cost_is_named_at_the_edge(
    tmp_path: Path, tensorboard: Callable[[Path], str], tab: Callable[..., Any]
) -> None:
    journal = sample_runs.write_run(tmp_path / "net", trials=40)
    journal[0]["dense"]["cost"]["latency_ms"] *= 20
    write_lines(tmp_path / "net", journal, "w")
    frame = tab(tensorboard(tmp_path))
    (label,) = frame.eval_on_selector_all(".scatter .label", "all => all.map(t => t.textContent).filter(t => t.endsWith('→'))")
    assert label.startswith("dense, ")
    frame.click("button[aria-label='Show all']")
    frame.wait_for_selector(".scatter .label:text-is('dense')", state="attached")


def test_what_became_of_a_trial_appears_while_it_is_shown(
    tmp_path: Path, tensorboard: Callable[[Path], str], tab: Callable[..., Any]
) -> None:
    journal = sample_runs.write_run(tmp_path / "net", trials=60)
    final = journal[-1]
    write_lines(tmp_path / "net", [line for line in journal if line["kind"] != "final"], "w")
    frame = tab(tensorboard(tmp_path))
    click_trial(frame, final["number"])
    assert "measured" not in frame.inner_text(".detail")
    write_lines(tmp_path / "net", [final])
    frame.wait_for_selector(".detail :text('fine-tuned: measured')", timeout=10_000)
    assert f"{final['score']['value']:.2f}" in frame.inner_text(".detail")

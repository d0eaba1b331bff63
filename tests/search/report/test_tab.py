"""The tab "Pareto" in a real browser against a real TensorBoard."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sample_runs

CENTRE = """(node) => {
    const [box, host] = [node, document.querySelector('.scatter')].map((n) => n.getBoundingClientRect());
    return {x: box.x + box.width / 2 - host.x, y: box.y + box.height / 2 - host.y};
}"""


def click_trial(frame: Any, number: int) -> None:
    """Click the point of a trial."""
    point = frame.query_selector(f'.trial[data-number="{number}"]')
    frame.query_selector(".scatter").click(position=point.evaluate(CENTRE))
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

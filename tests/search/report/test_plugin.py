"""The routes of the plug-in, from a real TensorBoard."""

import importlib
import os
import socket
import subprocess
import sys
import time
import tomllib
import urllib.request
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import sample_runs
from plugin_client import Answer, get

Start = Callable[[Path], str]


@pytest.mark.parametrize(
    ("path", "kind"), [("/index.js", "text/javascript"), ("/pareto.css", "text/css"), ("/runs", "application/json")]
)
def test_types_are_said(tmp_path: Path, tensorboard: Start, path: str, kind: str) -> None:
    answer = get(tensorboard(tmp_path), path)
    assert answer.status == 200
    assert answer.headers["Content-Type"].startswith(kind)
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


def test_runs_are_listed_once_and_then_only_when_something_is_new(tmp_path: Path, tensorboard: Start) -> None:
    journal = sample_runs.write_run(tmp_path / "net", trials=20)
    address = tensorboard(tmp_path)
    first = get(address, "/runs").json
    assert [(run["name"], run["count"]) for run in first["runs"]] == [("net", len(journal))]
    assert get(address, f"/runs?tag={first['tag']}").json == {"tag": first["tag"]}
    with (tmp_path / "net" / "trials.jsonl").open("a") as file:
        file.write('{"kind": "trial", "number": 99, "cost": {"latency_ms": 1.5}}\n')
    second = get(address, f"/runs?tag={first['tag']}").json
    assert second["runs"][0]["count"] == len(journal) + 1


def test_only_records_after_those_known_are_sent(tmp_path: Path, tensorboard: Start) -> None:
    journal = sample_runs.write_run(tmp_path / "net", trials=20)
    address = tensorboard(tmp_path)
    (run,) = get(address, "/runs").json["runs"]
    everything = get(address, f"/trials?since={run['id']}..0").body
    some = get(address, f"/trials?since={run['id']}.{run['epoch']}.{len(journal) - 2}").body
    assert len(some) < len(everything) / 2
    assert f'"from": {len(journal) - 2}, "count": 2'.encode() in some
    # Of another file than the one that was read: from the start.
    assert b'"from": 0' in get(address, f"/trials?since={run['id']}.other.5").body


def test_a_policy_is_the_journals(tmp_path: Path, tensorboard: Start) -> None:
    journal = sample_runs.write_run(tmp_path / "net", trials=20)
    address = tensorboard(tmp_path)
    (run,) = get(address, "/runs").json["runs"]
    found = get(address, f"/policies?run={run['id']}&index=0,5,17").json["policies"]
    assert [f["policy"] for f in found] == [journal[0]["dense"]["policy"], journal[5]["policy"], journal[17]["policy"]]


@pytest.mark.parametrize(
    "path",
    ["/policies?run=../secret&index=0", "/policies?run=%2Fetc&index=0", "/policies?run=..%2F..%2Fsecret&index=1",
     "/policies?index=1", "/trials?since=../secret..0", "/trials?since=", "/trials?since=%2Fetc%2Fpasswd..0",
     "/policies?run=ID&index=999999",
     "/../plugin.py", "/%2e%2e/plugin.py", "/static/index.js", "/index.js/../plugin.py", "//etc/passwd", "/trials.jsonl"],
)  # fmt: skip
def test_nothing_else_is_served(tmp_path: Path, tensorboard: Start, path: str) -> None:
    sample_runs.write_run(tmp_path / "secret", trials=3)
    sample_runs.write_run(tmp_path / "runs" / "net", trials=3)
    address = tensorboard(tmp_path / "runs")
    (run,) = get(address, "/runs").json["runs"]
    answer: Answer = get(address, path.replace("ID", run["id"]))
    assert answer.status == 404
    assert b"kind" not in answer.body and b"root:" not in answer.body and b"import" not in answer.body


def test_an_empty_log_folder_is_no_error(tmp_path: Path, tensorboard: Start) -> None:
    address = tensorboard(tmp_path)
    assert get(address, "/runs").json["runs"] == []
    with urllib.request.urlopen(f"{address}data/plugins_listing") as answer:
        assert b'"pareto"' in answer.read()


def test_the_folders_of_logdir_spec_are_served(tmp_path: Path, tensorboard: Callable[..., str]) -> None:
    for name in ("a/net", "b/net", "c/net", "secret/net"):
        sample_runs.write_run(tmp_path / name, trials=3)
    address = tensorboard(f"first:{tmp_path}/a,second:{tmp_path}/b,{tmp_path}/c", option="--logdir_spec")
    runs = get(address, "/runs").json["runs"]
    commands = [f"tightrope export {tmp_path}/{name}/net" for name in ("a", "b", "c")]
    assert sorted((run["name"], run["command"]) for run in runs) == [
        (name, command)
        for name, command in zip(("first/net", "net", "second/net"), (commands[0], commands[2], commands[1]), strict=True)
    ]
    for run in runs:
        (found,) = get(address, f"/policies?run={run['id']}&index=1").json["policies"]
        assert found["layers"]


def test_the_plugin_is_found_by_its_entry_point() -> None:
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())
    module, _, name = project["project"]["entry-points"]["tensorboard_plugins"]["pareto"].partition(":")
    plugin = getattr(importlib.import_module(module), name)
    assert plugin.plugin_name == "pareto"


def test_the_command_tensorboard_has_the_tab(tmp_path: Path) -> None:
    """`tensorboard --logdir`, as a user starts it, with its own data server, finds the plug-in where the package is installed."""
    sample_runs.write_run(tmp_path / "runs" / "net", trials=5)
    environment = dict(os.environ)
    if not any(point.name == "pareto" for point in entry_points(group="tensorboard_plugins")):  # a checkout that is not installed
        metadata = tmp_path / "site" / "tightrope_checkout-0.dist-info"
        metadata.mkdir(parents=True)
        (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: tightrope-checkout\nVersion: 0\n")
        (metadata / "entry_points.txt").write_text("[tensorboard_plugins]\npareto = tightrope.search.report.plugin:ParetoPlugin\n")
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(metadata.parent), environment.get("PYTHONPATH")]))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", "runs", "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 60
        while True:
            try:
                runs = get(f"http://127.0.0.1:{port}/", "/runs").json["runs"]
                break
            except (OSError, ValueError):
                assert process.poll() is None and time.monotonic() < end
                time.sleep(0.3)
        assert [(run["name"], run["command"]) for run in runs] == [("net", "tightrope export runs/net")]
    finally:
        process.terminate()
        process.wait(timeout=20)

"""The command line as a user meets it: what works, and one clear line for what cannot."""

import contextlib
import io
import json
import logging
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest

from tightrope.search import cli
from tightrope.spaces.policy import Policy

ROOT = Path(__file__).parents[2]
GOOD = """
model: tests.digits:fresh
data: tests.digits:splits
device: bitfusion
budget: [latency<=0.7x]
agent: random
trials: 3
workers: 0
controls: false
finetune: {epochs: 0, candidates: 1}
"""


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


def alone(*args: str | Path) -> Done:
    """The command in a process of its own."""
    command = [sys.executable, "-m", "tightrope.search.cli", *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    return Done(done.returncode, done.stdout, done.stderr)


def tightrope(*args: str | Path) -> Done:
    """The same in this process, which has torch already."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    before = sys.argv, list(warnings.filters), logging.root.handlers[:]
    sys.argv = ["tightrope", *map(str, args)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        sys.argv, warnings.filters[:], logging.root.handlers[:] = before
    return Done(code, out.getvalue(), err.getvalue())


def refused(done: Done, *words: str) -> None:
    """Exit code 2, one line on stderr with these words, no traceback."""
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.strip().splitlines() if line]
    assert len(lines) == 1, done.stderr
    for word in words:
        assert word in lines[0]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("runs")
    config = folder / "net.yaml"
    config.write_text(GOOD)
    done = alone("search", config, "--out", folder / "net")
    assert done.returncode == 0, done.stderr
    assert "best" in done.stdout and "tightrope export" in done.stdout
    return folder / "net"


def test_help_answers_without_loading_what_takes_seconds() -> None:
    heavy = "{'torch', 'ray', 'optuna', 'onnxruntime'}"
    code = f"import sys; from tightrope.search import cli\ntry: cli.main()\nfinally: assert not {heavy} & {{*sys.modules}}"
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    for command in ("demo", "search", "resume", "front", "export", "estimate", "devices"):
        assert command in done.stdout


def test_a_run_folder_holds_what_the_design_says(run: Path) -> None:
    for name in (
        "config.yaml",
        "network.json",
        "trials.jsonl",
        "front.csv",
        "best/policy.json",
        "best/report.json",
        "best/report.md",
    ):
        assert (run / name).exists(), name
    assert (run / "best" / "model.safetensors").exists() and not (run / "best" / "model.onnx").exists()  # simulated: no ONNX
    report = json.loads((run / "best" / "report.json").read_text())
    assert report["rows"][0]["name"] == "dense" and report["simulated"] is True


def test_front_export_and_estimate_of_a_run(run: Path, tmp_path: Path) -> None:
    for option, name in (("--html", "f.html"), ("--csv", "f.csv"), ("--svg", "f.svg")):
        assert tightrope("front", run, option, tmp_path / name).returncode == 0
        assert (tmp_path / name).stat().st_size > 100
    assert "trial" in tightrope("front", run).stdout
    assert tightrope("export", run, "--trial", "1", "--format", "policy", "-o", tmp_path / "p.json").returncode == 0
    trials = [json.loads(line) for line in (run / "trials.jsonl").read_text().splitlines()]
    assert Policy.load(tmp_path / "p.json").to_json() == next(t["policy"] for t in trials if t.get("number") == 1)
    shown = tightrope("estimate", run, "--policy", tmp_path / "p.json")
    assert shown.returncode == 0 and "simulated" in shown.stdout and "wide" in shown.stdout


def test_resume_of_a_finished_run_changes_no_trial(run: Path) -> None:
    before = [line for line in (run / "trials.jsonl").read_text().splitlines() if '"trial"' in line]
    done = tightrope("resume", run)
    assert done.returncode == 0, done.stderr
    after = [line for line in (run / "trials.jsonl").read_text().splitlines() if '"trial"' in line]
    assert after[: len(before)] == before


def test_a_cluster_that_is_not_there_is_said_and_the_folder_stays_free(tmp_path: Path) -> None:
    (tmp_path / "net.yaml").write_text(GOOD.replace("workers: 0", "workers: 1"))
    done = tightrope("search", tmp_path / "net.yaml", "--address", "127.0.0.1:1", "--out", tmp_path / "net")
    refused(done, "Ray cannot be reached at '127.0.0.1:1'", "without an address it is started here")
    assert not (tmp_path / "net" / "trials.jsonl").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("trails: 3", ("unknown key 'trails'", "did you mean 'trials'")),
        ("trials: many", ("trials", "'many'")),
        ("space: {least_widht: 0.5}", ("space.least_widht", "least_width")),
        ("model: tests.nowhere:build", ("tests.nowhere", "cannot be imported")),
        ("model: tests.digits:bild", ("tests.digits", "has no 'bild'")),
        ("model: tests.digits:Untraceable", ("cannot be traced",)),
        ("data: tests.digits:no_search", ("search split", "empty")),
        ("data: tests.digits:mismatched", ("100 inputs and 90 targets",)),
        ("metric: tests.digits:nan_metric", ("finite", "nan")),
        ("device: bitfussion", ("bitfussion", "did you mean 'bitfusion'")),
        ("budget: [latencie<=0.5x]", ("latencie", "did you mean 'latency'")),
        ("budget: [latency<=0.0001x]", ("nothing in the space meets", "cheapest")),
        ("agent: tpee", ("tpee", "did you mean 'tpe'")),
    ],
)
def test_bad_input_is_one_clear_line(change: str, words: tuple[str, ...], tmp_path: Path) -> None:
    key = change.partition(":")[0]
    kept = [line for line in GOOD.splitlines() if not line.startswith(key + ":")]
    (tmp_path / "net.yaml").write_text("\n".join([*kept, change]) + "\n")
    refused(tightrope("search", tmp_path / "net.yaml", "--out", tmp_path / "run"), *words)


def test_ram_on_ort_cpu_is_refused(tmp_path: Path) -> None:
    from tightrope.estimators import registry
    from tightrope.spaces.budget import Budget
    from tightrope.spaces.cost import Cost
    from tightrope.spaces.errors import BudgetError

    device = registry.make("ort-cpu")
    with pytest.raises(BudgetError, match=r"'ort-cpu' cannot tell the cost in 'ram<=1KB'; it tells energy, latency"):
        Budget.parse("ram<=1KB").resolve(Cost(1.0, 1, 1), device.metrics, device.name)


def test_a_job_for_a_device_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tightrope.estimators.measured import fitted, job

    monkeypatch.setenv("TIGHTROPE_CACHE", str(tmp_path))
    for name, value in {"MET": 20, "PLAIN": 20}.items():
        monkeypatch.setattr(fitted, name, value)
    (tmp_path / "net.yaml").write_text(GOOD)
    done = tightrope("devices", "probe", tmp_path / "net.yaml")
    assert done.returncode == 0 and "python runner.py job.jsonl results.csv" in done.stderr
    made = job.read(done.stdout.encode(), "job.jsonl")
    assert [path.stem for path in (tmp_path / "devices" / "jobs").iterdir()] == [made.digest]
    (tmp_path / "results.csv").write_text("id,ms\n")
    refused(tightrope("devices", "import", "phone", tmp_path / "results.csv"), "as runner.py writes it")
    refused(tightrope("devices", "import", "bitfusion", tmp_path / "results.csv"), "of another kind")
    assert "uncalibrated" in tightrope("devices", "check", "gpu-a100").stdout
    assert "noise floor" in tightrope("devices", "check", "ort-cpu").stdout


def test_runs_in_use_torn_or_missing_are_refused(run: Path, tmp_path: Path) -> None:
    config = tmp_path / "net.yaml"
    config.write_text(GOOD)
    refused(alone("search", config, "--out", run), "already holds a search")
    refused(tightrope("resume", tmp_path / "nothing"), "there is no configuration")
    broken = tmp_path / "broken"
    broken.mkdir()
    lines = (run / "trials.jsonl").read_text().splitlines()
    (broken / "trials.jsonl").write_text("\n".join([lines[0], lines[1][:40], *lines[2:]]) + "\n")
    (broken / "config.yaml").write_text((run / "config.yaml").read_text())
    (broken / "network.json").write_text((run / "network.json").read_text())
    refused(tightrope("front", broken), "trials.jsonl")


def test_a_policy_of_another_network_or_version_is_refused(run: Path, tmp_path: Path) -> None:
    good = json.loads((run / "best" / "policy.json").read_text())
    cases = {
        "network": ({**good, "network": "0" * 16}, "for network 0000000000000000"),
        "version": ({**good, "version": 99}, "version must lie in [1, 1]"),
        "layer": ({**good, "layers": {"steem": {"weight_bits": 8}}}, "did you mean 'stem'"),
        "width": ({**good, "channels": {"wide": 400}}, "must lie in [1, 48]"),
    }
    for name, (policy, words) in cases.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(policy))
        refused(tightrope("estimate", run, "--policy", tmp_path / f"{name}.json"), words)

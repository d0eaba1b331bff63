"""A device elsewhere: a job, the runner where only numpy and onnxruntime are installed, and results that must be believable."""

import json
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from handmade import Handmade, resnet8
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from test_ort import Source

from tightrope.estimators import registry
from tightrope.estimators.measured import fitted, imported, job, runner
from tightrope.estimators.measured.base import mark_of
from tightrope.estimators.measured.layouts import BLOCKS
from tightrope.estimators.measured.ort import OrtCpu
from tightrope.spaces import Policy, Space
from tightrope.spaces.errors import DeviceError

NET = Handmade(resnet8)
SPACE = Space.build(NET.network, OrtCpu().pairs, least_width=0.5, width_step=16, rank_shares=(0.25,))
MARK = mark_of(NET.network, SPACE, 1, {**OrtCpu.versions, "isa": OrtCpu().isa})


@pytest.fixture(scope="module")
def work(python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a store, a job and what the runner made of it, in two goes with a torn line between them."""
    folder = tmp_path_factory.mktemp("elsewhere")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIGHTROPE_CACHE", str(folder / "cache"))
        for name, value in {"MET": 150, "PLAIN": 100}.items():
            patch.setattr(fitted, name, value)
        told: list[tuple[int, int]] = []
        lines = job.write(NET.network, SPACE, Source(), OrtCpu().encoder(NET.network), MARK, lambda *done: told.append(done))
        models = sum('"model":' in line for line in lines)
        assert told == [(done, models) for done in range(1, models + 1)]
        text = "".join(lines)
        (folder / "job.jsonl").write_text(text)
        assert imported.keep_job(text).exists()
        first = run(python, folder, stop_after=2)
        kept = (folder / "results.csv").read_bytes()
        (folder / "results.csv").write_bytes(kept + b"9999,0.1,0.00")  # torn in the middle of a line
        second = run(python, folder)
        assert "0 done" in first and f"{len(kept.splitlines()) - 2} done" in second
        assert (folder / "results.csv").read_bytes().startswith(kept)
        yield folder


RUN = """
import sys
path, stop = sys.argv[1], int(sys.argv[2])
sys.argv = ["runner.py", *sys.argv[3:]]
space = {"__name__": "runner", "__file__": path}
exec(compile(open(path).read(), path, "exec"), space)
if stop:
    said, tell = [], space["tell"]
    def stopping(text):
        tell(text)
        said.append(text)
        if len(said) > stop:
            raise SystemExit(9)
    space["tell"] = stopping
space["CHUNK"], space["MOST_NOISE"] = 64, 10.0
space["main"]()
"""


def declared(*names: str) -> set[str]:
    """Distributions, and all that they declare to need."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name not in found:
            found.add(name)
            needs = [Requirement(text) for text in metadata.requires(name) or ()]
            waiting += [r.name for r in needs if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


def link(distribution: str, site: Path) -> None:
    """Link what a distribution installed into another environment's packages; parts of it where others share its folder."""
    for file in metadata.files(distribution) or ():
        if file.parts[0] in ("..", "__pycache__"):
            continue
        whole = Path(str(metadata.distribution(distribution).locate_file(file.parts[0])))
        shared = whole.is_dir() and len(file.parts) > 1 and not (whole / "__init__.py").exists()
        parts = file.parts[: 2 if shared else 1]
        target = site.joinpath(*parts)
        if not target.is_symlink():
            target.parent.mkdir(exist_ok=True)
            target.symlink_to(whole.parent.joinpath(*parts))


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a virtual environment that has numpy, onnxruntime, what these declare to need, and nothing else."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, symlinks=True)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)}))
    for distribution in declared("numpy", "onnxruntime"):
        link(distribution, site)
    return Path(sysconfig.get_path("scripts", "venv", {"base": str(folder), "platbase": str(folder)})) / "python"


def run(python: Path, folder: Path, stop_after: int = 0) -> str:
    """The runner in that environment, the job copied beside it as to a device."""
    shutil.copy(str(runner.__file__), folder / "runner.py")
    done = subprocess.run(
        [python, "-I", "-c", RUN, "runner.py", str(stop_after), "job.jsonl", "results.csv", "--rounds", "6"],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == (9 if stop_after else 0), done.stderr
    return done.stdout


def test_the_environment_of_the_runner_is_bare(python: Path) -> None:
    names = ["numpy", "onnxruntime", "onnx", "torch", "pip", "tightrope"]
    code = f"from importlib.util import find_spec\nprint([name for name in {names} if find_spec(name)])"
    done = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['numpy', 'onnxruntime']"


@pytest.mark.parametrize("edit", ["other", "none"])
def test_the_runner_refuses_a_job_for_another_processor_and_one_that_names_none(work: Path, tmp_path: Path, edit: str) -> None:
    first, rest = (work / "job.jsonl").read_text().split("\n", 1)
    head, here = json.loads(first), OrtCpu().isa
    wanted = next(name for name in BLOCKS if name != here)
    if edit == "other":
        head["mark"]["isa"] = wanted
    else:
        del head["mark"]["isa"]
    (tmp_path / "job.jsonl").write_text(json.dumps(head) + "\n" + rest)
    command = [sys.executable, str(runner.__file__), "job.jsonl", "results.csv"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    expected = f"is for {wanted}, this device has {here}" if edit == "other" else "is not a whole probe job"
    assert done.returncode == 1 and expected in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "results.csv").exists()


def test_a_job_comes_back_as_a_device(work: Path) -> None:
    report = imported.import_results("my-phone", work / "results.csv")
    assert len(report.left_out) == job.NETS and len(report.held_out) == job.HELD
    assert imported.mape(report.held_out) < 30  # six rounds on a busy machine; the benchmark has the figure
    assert "my-phone" in registry.names() and registry.summary("my-phone")[0] == "imported"
    device = registry.make("my-phone")
    device.prepare(NET.network, SPACE, Source())  # type: ignore[attr-defined]
    device.budgeted({"peak_ram_bytes"})  # type: ignore[attr-defined]
    rng = np.random.default_rng(0)
    policies = [SPACE.dense, *(SPACE.sample(rng) for _ in range(20))]
    costs = device.estimate_many(NET.network, policies)
    assert all(0 < c.latency_ms <= 1.5 * costs[0].latency_ms and not c.simulated for c in costs)
    assert costs == [device.estimate(NET.network, p) for p in policies]
    assert "my-phone" in costs[0].provenance
    assert next(imported.reports("my-phone")) == report


def test_what_the_table_does_not_enclose_is_refused(work: Path) -> None:
    if "my-phone" not in registry.names():
        imported.import_results("my-phone", work / "results.csv")
    device = imported.Imported("my-phone")
    with pytest.raises(DeviceError, match="has no table"):
        device.prepare(NET.network, Space.build(NET.network, device.pairs), Source())
    with pytest.raises(DeviceError, match="has no table"):
        imported.Imported("my-phone", batch=2).prepare(NET.network, SPACE, Source())
    device.prepare(NET.network, SPACE, Source())
    with pytest.raises(DeviceError, match="outside of what was timed"):
        device.estimate_many(NET.network, [Policy.make(NET.network, dict.fromkeys(NET.network.widths, 1))])


def changed(edit: Callable[[list[str]], list[str]]) -> Callable[[str], str]:
    return lambda text: "\n".join(edit(text.splitlines())) + "\n"


def cell(column: int, value: str) -> Callable[[str], str]:
    """The results with another value in the first row of times."""

    def edit(lines: list[str]) -> list[str]:
        parts = lines[2].split(",")
        parts[column] = value
        return [*lines[:2], ",".join(parts), *lines[3:]]

    return changed(edit)


def head(**values: object) -> Callable[[str], str]:
    return changed(lambda lines: ["#" + json.dumps(json.loads(lines[0][1:]) | values), *lines[1:]])


BAD: dict[str, tuple[Callable[[str], str], str]] = {
    "torn": (lambda text: text[:-9], "torn"),
    "cut short": (changed(lambda lines: lines[:-3]), "3 are missing"),
    "doubled": (changed(lambda lines: [*lines, lines[2]]), "twice"),
    "negative": (cell(4, "0.1 -0.2"), "not below zero"),
    "nan": (cell(4, "0.1 nan"), "finite"),
    "infinite": (cell(1, "inf"), "finite"),
    "words": (cell(4, "fast"), "with numbers"),
    "no samples": (cell(4, ""), "not below zero"),
    "no dense net": (cell(3, "0.0"), "not below zero"),
    "no reference": (cell(1, "0.0"), "not below zero"),
    "unknown model": (cell(0, "99999"), "id must be"),
    "another job": (head(job="0" * 16), "not written here"),
    "another runtime": (head(onnxruntime="1.0.0"), "install that version"),
    "another version": (head(version=99), "version"),
    "no head": (changed(lambda lines: lines[1:]), "runner.py"),
    "no columns": (changed(lambda lines: [lines[0], *lines[2:]]), "line 2"),
    "empty": (lambda text: "", "runner.py"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_results_are_named_and_nothing_is_stored(work: Path, name: str) -> None:
    edit, says = BAD[name]
    (work / "bad.csv").write_text(edit((work / "results.csv").read_text()))
    before = sorted((work / "cache").rglob("*.jsonl"))
    with pytest.raises(DeviceError, match=says):
        imported.import_results("bad", work / "bad.csv")
    assert sorted((work / "cache").rglob("*.jsonl")) == before


def test_a_table_is_never_overwritten(work: Path) -> None:
    if "twice" not in registry.names():
        imported.import_results("twice", work / "results.csv")
    (table,) = (work / "cache" / "devices" / "twice").glob("*.jsonl")
    kept = table.read_bytes()
    with pytest.raises(DeviceError, match="already has this table"):
        imported.import_results("twice", work / "results.csv")
    assert table.read_bytes() == kept
    with pytest.raises(DeviceError, match="name must be"):
        imported.import_results("../elsewhere", work / "results.csv")


def test_a_torn_job_is_refused(work: Path, tmp_path: Path) -> None:
    text = (work / "job.jsonl").read_text()
    (tmp_path / "torn.jsonl").write_text(text[:-2000])
    with pytest.raises(DeviceError, match="write the job again"):
        imported.import_results("torn", work / "results.csv", tmp_path / "torn.jsonl")
    with pytest.raises(DeviceError, match="results of job"):
        (tmp_path / "other.jsonl").write_text(text.replace('"version":1', '"version": 1', 1))
        imported.import_results("torn", work / "results.csv", tmp_path / "other.jsonl")


def test_models_of_a_job_take_a_few_hundred_bytes(work: Path) -> None:
    entries = [json.loads(line) for line in (work / "job.jsonl").read_text().splitlines() if '"role":"node"' in line]
    assert np.median([len(e["model"]) for e in entries]) < 900

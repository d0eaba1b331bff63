"""Reading run folders as they grow, and nothing else."""

import json
import math
import os
import shutil
import struct
from pathlib import Path

import pytest
import sample_runs

from tightrope.search.report.runs import COLUMNS, KINDS, LogFolder, Run, layers, open_run, pack
from tightrope.spaces import Choice, Policy
from tightrope.spaces.errors import PolicyError, RunError
from tightrope.spaces.unit import macs, size_bytes


def column(run: Run, name: str, kind: str = "trial") -> list[float]:
    kinds = run.columns["kind"]
    return [value for value, k in zip(run.columns[name], kinds, strict=True) if KINDS[int(k)] == kind]


def bytes_read() -> int:
    return int(next(line for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("rchar")).split()[1])


def test_columns_hold_what_the_journal_says(tmp_path: Path) -> None:
    journal = sample_runs.write_run(tmp_path / "net", trials=30)
    run = open_run(tmp_path / "net")
    trials = [line for line in journal if line["kind"] == "trial"]
    assert column(run, "number") == [t["number"] for t in trials]
    assert column(run, "latency_ms") == [t["cost"]["latency_ms"] for t in trials]
    assert column(run, "feasible") == [t["feasible"] for t in trials]
    assert {v for v in column(run, "count") if not math.isnan(v)} == {1000}
    for value, trial in zip(column(run, "score"), trials, strict=True):
        assert math.isnan(value) if trial["score"] is None else value == trial["score"]["value"]
    assert column(run, "score", "dense") == [journal[0]["dense"]["score"]["value"]]
    assert [run.strings[int(i)] for i in column(run, "label", "control")] == ["uniform", "recipe", "random"]
    assert len(column(run, "ratio", "final")) == 3
    assert run.study["limits"] == journal[0]["budget"]["limits"]


def test_a_growing_journal_is_read_by_its_new_lines_only(tmp_path: Path) -> None:
    journal = sample_runs.write_run(tmp_path / "net", trials=400)
    path = tmp_path / "net" / "trials.jsonl"
    text = [json.dumps(line) + "\n" for line in journal]
    path.write_text("".join(text[:390]))
    run = open_run(tmp_path / "net")
    epoch = run.epoch
    assert len(run) == 390
    with path.open("a") as file:
        file.writelines(text[390:])
    before = bytes_read()
    run.refresh()
    read = bytes_read() - before
    assert (len(run), run.epoch) == (len(journal), epoch)
    assert read < 2 * sum(map(len, text[390:])) + 4096 < path.stat().st_size / 2
    before = bytes_read()
    run.refresh()
    assert bytes_read() - before < 1024  # nothing but reading /proc


def test_a_half_written_line_waits_until_it_is_whole(tmp_path: Path) -> None:
    journal = sample_runs.write_run(tmp_path / "net", trials=10)
    path = tmp_path / "net" / "trials.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    for cut in (1, len(lines[5]) // 2, len(lines[5]) - 1):
        path.write_bytes(b"".join(lines[:5]) + lines[5][:cut])
        run = open_run(tmp_path / "net")
        assert len(run) == 5
        with path.open("ab") as file:
            file.write(lines[5][cut:])
        run.refresh()
        assert (len(run), run.bad_lines) == (6, 0)
        assert column(run, "number")[-1] == journal[5]["number"]


def test_a_journal_that_is_replaced_is_read_anew(tmp_path: Path) -> None:
    sample_runs.write_run(tmp_path / "net", trials=20, seed=1)
    run = open_run(tmp_path / "net")
    epoch, scores = run.epoch, column(run, "score")
    sample_runs.write_run(tmp_path / "other", trials=30, seed=2)
    # In place: the same inode, and longer.
    (tmp_path / "net" / "trials.jsonl").write_bytes((tmp_path / "other" / "trials.jsonl").read_bytes())
    run.refresh()
    assert run.epoch != epoch
    assert repr(column(run, "score")) == repr(column(open_run(tmp_path / "other"), "score")) != repr(scores)
    epoch = run.epoch
    (tmp_path / "net" / "trials.jsonl").unlink()
    run.refresh()
    assert len(run) == 0 and run.epoch != epoch


@pytest.mark.parametrize(
    "line",
    ["{", "[]", "7", "nonsense", '{"kind": "trial"}', '{"kind": "trial", "number": "x"}',
     '{"kind": "trial", "number": 3, "cost": 5}',
     '{"kind": "trial", "number": 4, "cost": {"interval_ms": [1]}}', "[" * 100_000],
)  # fmt: skip
def test_a_corrupt_line_is_counted_and_the_rest_is_read(tmp_path: Path, line: str) -> None:
    sample_runs.write_run(tmp_path / "net", trials=10)
    path = tmp_path / "net" / "trials.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:4], line, *lines[4:]]) + "\n")
    run = open_run(tmp_path / "net")
    assert (len(run), run.bad_lines) == (len(lines), 1)
    assert run.detail(len(run) - 1)["layers"] is not None


def test_numbers_that_are_none_are_missing(tmp_path: Path) -> None:
    sample_runs.write_run(tmp_path / "net", trials=1)
    strange = {
        "kind": "trial",
        "number": 7,
        "cost": {"latency_ms": "<b>", "macs": True, "size_bytes": 10**400},
        "score": {"value": None},
    }
    with (tmp_path / "net" / "trials.jsonl").open("a") as file:
        file.write(json.dumps(strange) + "\n")
        file.write(
            '{"kind": "trial", "number": 8, "policy": {"x": NaN}, "cost": {"latency_ms": Infinity}, "score": {"value": NaN}}\n'
        )
    run = open_run(tmp_path / "net")
    for name in ("latency_ms", "macs", "size_bytes", "score"):
        assert all(math.isnan(value) for value in column(run, name)[-2:])
    json.dumps(run.detail(len(run) - 1), allow_nan=False)


def test_an_answer_can_be_unpacked(tmp_path: Path) -> None:
    sample_runs.write_run(tmp_path / "net", trials=12)
    run = open_run(tmp_path / "net")
    body = pack([run.part(3, 5), run.part(8, 100)])
    (length,) = struct.unpack_from("<I", body)
    first, second = json.loads(body[4 : 4 + length])
    assert (first["from"], first["count"], first["more"]) == (3, 5, True)
    assert (second["from"], second["count"], second["more"]) == (8, len(run) - 8, False)
    assert (4 + length) % 8 == 0
    block = struct.unpack_from(f"<{5 * len(COLUMNS)}d", body, 4 + length)
    assert block[5 * COLUMNS.index("latency_ms") :][:5] == tuple(run.columns["latency_ms"][3:8])


def test_layers_add_up_to_the_network(tmp_path: Path) -> None:
    net = sample_runs.network()
    policy = Policy.make(net, {"inner1": 16, "stage3": 64}, {"block2.conv1": Choice(4, 8, 12, "spatial"), "head": Choice(8, 8)})
    rows = {row["name"]: row for row in layers(net, policy)}
    assert sum(row["macs"] for row in rows.values()) == macs(net, policy)
    assert sum(row["size_bytes"] for row in rows.values()) == size_bytes(net, policy)
    assert sum(row["of_macs"] for row in rows.values()) == macs(net, Policy.make(net))
    assert (rows["block1.conv1"]["channels"], rows["block1.conv1"]["of_channels"]) == (16, 32)
    assert (rows["block2.conv1"]["rank"], rows["block2.conv1"]["of_rank"]) == (12, 96)
    with pytest.raises(PolicyError, match="is for network"):
        layers(sample_runs.network(2), policy)


def test_a_run_without_its_network_still_shows_its_policies(tmp_path: Path) -> None:
    journal = sample_runs.write_run(tmp_path / "net", trials=3)
    (tmp_path / "net" / "network.json").unlink()
    detail = open_run(tmp_path / "net").detail(1)
    assert detail["policy"] == journal[1]["policy"]
    assert detail["layers"] is None and "network.json" in detail["problem"]


def test_a_final_has_the_policy_of_its_trial(tmp_path: Path) -> None:
    journal = sample_runs.write_run(tmp_path / "net", trials=30)
    number = journal[-1]["number"]
    assert journal[-1]["kind"] == "final"
    detail = open_run(tmp_path / "net").detail(len(journal) - 1)
    assert detail["policy"] == next(line["policy"] for line in journal if line.get("number") == number)


def test_runs_are_found_at_any_depth_and_open_where_they_were_copied(tmp_path: Path) -> None:
    sample_runs.write_run(tmp_path / "runs" / "a" / "net", trials=5)
    shutil.copytree(tmp_path / "runs" / "a", tmp_path / "elsewhere" / "b c")
    (here,) = LogFolder([("", tmp_path / "runs")]).runs()
    (there,) = LogFolder([("", tmp_path / "elsewhere")]).runs()
    assert (here.name, there.name) == ("a/net", "b c/net")
    for run in (here, there):
        run.refresh()
    assert repr(here.columns) == repr(there.columns) and len(here) == 12
    assert here.detail(3) == there.detail(3)
    assert there.summary()["command"] == f"tightrope export '{tmp_path}/elsewhere/b c/net'"
    (itself,) = LogFolder([("", tmp_path / "runs" / "a" / "net")]).runs()
    assert itself.name == "net"


def test_the_command_exports_what_the_device_takes(tmp_path: Path) -> None:
    for device, form in (("ort-cpu", "onnx"), ("torch-cpu", "packed"), ("bitfusion", "packed")):
        sample_runs.write_run(tmp_path / device, trials=2, device=device)
        assert open_run(tmp_path / device).summary()["format"] == form


def test_nothing_outside_the_log_folder_is_read(tmp_path: Path) -> None:
    sample_runs.write_run(tmp_path / "secret", trials=5)
    runs = tmp_path / "runs"
    sample_runs.write_run(runs / "good", trials=5)
    (runs / "linked").symlink_to(tmp_path / "secret")
    (runs / "journal-linked").mkdir()
    (runs / "journal-linked" / "trials.jsonl").symlink_to(tmp_path / "secret" / "trials.jsonl")
    (runs / "fifo").mkdir()
    os.mkfifo(runs / "fifo" / "trials.jsonl")
    folder = LogFolder([("", runs)])
    for run in folder.runs():
        run.refresh()
    assert {run.name for run in folder.runs() if len(run)} == {"good"}
    for asked in ("../secret", str(tmp_path / "secret"), "good", "", ".", "..", "linked"):
        with pytest.raises(RunError, match="no such run"):
            folder.run(asked)
    # A network that is swapped for a link later on is not followed either.
    good = next(run for run in folder.runs() if run.name == "good")
    (runs / "good" / "network.json").unlink()
    (runs / "good" / "network.json").symlink_to(tmp_path / "secret" / "network.json")
    assert good.detail(1)["layers"] is None
    (runs / "good" / "trials.jsonl").rename(runs / "old")
    (runs / "good" / "trials.jsonl").symlink_to(tmp_path / "secret" / "trials.jsonl")
    good.refresh()
    assert len(good) == 0


def test_a_log_folder_may_be_a_link_or_missing(tmp_path: Path) -> None:
    sample_runs.write_run(tmp_path / "real" / "net", trials=5)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (run,) = LogFolder([("", tmp_path / "link")]).runs()
    run.refresh()
    assert len(run) == 12  # dense, five trials, three controls, three finals
    assert run.summary()["command"].endswith("/link/net")
    assert LogFolder([("", tmp_path / "missing")]).runs() == []


@pytest.mark.parametrize("name", ["<img src=x onerror=alert(1)>", "a'b\"c", "-rf", "new\nline", "über", "$(touch x)"])
def test_the_command_quotes_any_name(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import shlex

    sample_runs.write_run(tmp_path / name, trials=1)
    monkeypatch.chdir(tmp_path)
    (run,) = LogFolder([("", Path())]).runs()
    words = shlex.split(run.summary()["command"])
    assert words[:2] == ["tightrope", "export"] and len(words) == 3
    assert Path(words[2]) == Path(name) and not words[2].startswith("-")


def test_a_name_that_is_not_utf8_can_be_sent(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe"))
    sample_runs.write_run(folder, trials=1)
    (run,) = LogFolder([("", tmp_path)]).runs()
    json.dumps(run.summary(), ensure_ascii=False).encode()


def test_a_folder_without_a_journal_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no run folder: it holds no trials\.jsonl"):
        open_run(tmp_path)
    (tmp_path / "trials.jsonl").write_text("nonsense\n")
    with pytest.raises(RunError, match="no study line"):
        open_run(tmp_path)

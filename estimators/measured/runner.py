"""Times a probe job on a device: this one file, Python 3.10 or newer, numpy and onnxruntime are all that it needs.

    python runner.py job.jsonl results.csv [--rounds 20] [--seed 0]

Stopped at any point, it goes on where it was when started again. Models are timed side by side in a fresh random order each
round, the second of two calls, by the CPU time of the one thread that runs them. The noise floor comes first: where the same
models differ by more than 10 % between even and odd rounds, nothing is timed and the reason is printed.
"""

from __future__ import annotations

import argparse
import base64
import gc
import hashlib
import json
import os
import platform
import sys
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import onnxruntime

VERSION = 3  # of jobs and results
CHUNK, CHUNK_BYTES, CHUNK_SECONDS = 128, 64 << 20, 4.0
LEAST_ROUNDS, MOST_NOISE = 6, 0.10
COLUMNS = "id,reference_ms,empty_ms,dense_ms,ms"
STEADY = ("reference", "empty", "dense")  # timed beside all others
OVER = "over "  # what the name of an output begins with that takes the memory of the input that the rest names


class Model:
    """A model of the job, loaded on one thread, inputs and outputs bound; inputs begin as ones."""

    def __init__(self, entry: dict[str, Any]) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 4
        level = onnxruntime.GraphOptimizationLevel
        options.graph_optimization_level = level.ORT_ENABLE_ALL if entry["optimise"] else level.ORT_DISABLE_ALL
        data = zlib.decompress(zlib.decompress(base64.b64decode(entry["model"])))
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        binding = session.io_binding()
        kinds: dict[str, Any] = {"float": np.float32, "uint8": np.uint8, "int64": np.int64, "int32": np.int32, "bool": np.bool_}
        self.tensors = {
            given.name: onnxruntime.OrtValue.ortvalue_from_numpy(np.ones(given.shape, kinds[given.type[7:-1]]))
            for given in session.get_inputs()
        }
        for name, tensor in self.tensors.items():
            binding.bind_ortvalue_input(name, tensor)
        for made in session.get_outputs():
            if made.name.startswith(OVER):
                binding.bind_ortvalue_output(made.name, self.tensors[made.name[len(OVER) :]])
            else:
                binding.bind_output(made.name, "cpu")
        self.size, self.call, self.binding = len(data), session.run_with_iobinding, binding
        self.call(binding)  # the first call allocates

    def visit(self) -> float:
        """CPU milliseconds of the second of two calls."""
        self.call(self.binding)
        start = time.thread_time_ns()
        self.call(self.binding)
        return (time.thread_time_ns() - start) / 1e6


def time_rounds(models: Sequence[Model], rounds: int, rng: np.random.Generator) -> Any:
    """Milliseconds, `rounds x models`."""
    found = np.empty((rounds, len(models)))
    gc.disable()
    for row in found:
        for index in rng.permutation(len(models)).tolist():
            row[index] = models[index].visit()
    gc.enable()
    return found


def low(samples: Any) -> Any:
    """The low quartile over rounds."""
    return np.percentile(samples, 25, axis=0)


def read_job(path: Path) -> tuple[str, str, list[dict[str, Any]]]:
    """What tells the job from any other, the instruction set that it is for, and its models."""
    data = path.read_bytes()
    try:
        head, *rest = [json.loads(line) for line in data.splitlines()]
        entries = [line for line in rest if "model" in line]
        wanted_isa = head["mark"]["isa"]
        if head["tightrope"] != "probe job" or head["version"] != VERSION or len(entries) != head["models"]:
            raise ValueError
    except (KeyError, TypeError, ValueError):
        sys.exit(f"{path} is not a whole probe job of version {VERSION}; write it again with `tightrope devices probe`")
    return hashlib.sha256(data).hexdigest()[:16], wanted_isa, entries


def cpuinfo() -> list[str]:
    """What Linux says of the device's CPU."""
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []


def isa() -> str:
    """The device's instruction set as `tightrope devices probe --isa` names it; empty where it cannot be told."""
    if platform.machine().lower() in ("arm64", "aarch64"):
        return "arm64"
    flags = next((line.split() for line in cpuinfo() if line.startswith("flags")), [])
    return ("avx512" if "avx512f" in flags else "avx2") if flags else ""


def processor() -> str:
    """The model of the device's CPU."""
    names = [line.split(":", 1)[1].strip() for line in cpuinfo() if line.startswith(("model name", "Hardware"))]
    return names[0] if names else platform.processor() or platform.machine()


def begin(path: Path, job: str) -> tuple[TextIO, set[int]]:
    """Open the results for appending, cut off a torn last line, and tell which models are there already."""
    head = {"tightrope": "probe results", "version": VERSION, "job": job, "processor": processor(),
            "onnxruntime": onnxruntime.__version__, "system": platform.platform(), "threads": 1}  # fmt: skip
    data = path.read_bytes() if path.exists() else b""
    lines = data[: data.rfind(b"\n") + 1].decode().splitlines()
    if len(lines) < 2:
        if data and not data.startswith(b"#"):
            sys.exit(f"{path} is there and has no results of this runner; give another file")
        file = path.open("w", newline="\n")
        file.write("#" + json.dumps(head) + "\n" + COLUMNS + "\n")
        return file, set()
    found = json.loads(lines[0][1:])
    other = [key for key in head if found.get(key) != head[key]]
    if other:
        sys.exit(f"{path} has results of another {', '.join(other)}; give another file")
    with path.open("rb+") as whole:
        whole.truncate(data.rfind(b"\n") + 1)
    return path.open("a", newline="\n"), {int(line.split(",")[0]) for line in lines[2:]}


def main() -> None:
    """Time what is not timed yet."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("job", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    job, wanted_isa, entries = read_job(given.job)
    if isa() not in (wanted_isa, ""):
        sys.exit(
            f"{given.job} is for {wanted_isa}, this device has {isa()}: write it again with `tightrope devices probe --isa {isa()}`"
        )
    steady = [Model(e) for role in STEADY for e in entries if e["role"] == role]
    wanted = [e for e in entries if e["role"] not in STEADY]
    file, done = begin(given.results, job)
    waiting = [e for e in wanted if e["id"] not in done][::-1]
    rng = np.random.default_rng([given.seed, len(done)])
    first = np.delete(time_rounds(steady, 40, rng), -2, axis=1)  # an empty call takes next to no time
    floor = float(np.mean(np.abs(low(first[::2]) / low(first[1::2]) - 1)))
    tell(f"noise floor {100 * floor:.1f} %; {len(wanted)} models, {len(done)} done")
    if floor > MOST_NOISE:
        sys.exit(f"the noise floor must be at most {100 * MOST_NOISE:.0f} %: stop what else runs on the device and start again")
    while waiting:
        chosen: list[dict[str, Any]] = []
        models: list[Model] = []
        while waiting and len(chosen) < CHUNK and sum(m.size for m in models) < CHUNK_BYTES:
            chosen.append(waiting.pop())
            try:
                models.append(Model(chosen[-1]))
            except Exception as error:  # onnxruntime's errors share no base class of their own
                sys.exit(f"onnxruntime {onnxruntime.__version__} cannot load model {chosen[-1]['id']} of the job: {error}")
        once = float(time_rounds([*models, *steady], 1, rng).sum()) / 1e3
        rounds = max(LEAST_ROUNDS, min(given.rounds, int(CHUNK_SECONDS / (2 * once))))
        samples = time_rounds([*models, *steady], rounds, rng)
        *reference, empty, dense = low(samples[:, len(models) :]).tolist()
        scale = sum(reference) - len(reference) * empty
        for entry, column in zip(chosen, samples.T.tolist()):  # noqa: B905
            times = " ".join(f"{x:.6f}" for x in column)
            file.write(f"{entry['id']},{scale:.6f},{empty:.6f},{dense:.6f},{times}\n")
        file.flush()
        os.fsync(file.fileno())
        tell(f"{len(wanted) - len(waiting)} of {len(wanted)}")
    file.close()


def tell(text: str) -> None:
    """Say how far it is."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()

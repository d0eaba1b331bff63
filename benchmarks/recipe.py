"""Our search against the hand recipe by others' tools, at equal measured latency and equal fine-tuning; and the demo's figures.

    python -m benchmarks.recipe [--json FILE] [--quick] [--seeds N] [--out DIR] [--demo RUN] [--skip-demo]

The harder task's residual net is compressed under three latency budgets, as ratios to dense fp32 in ONNX Runtime: 0.40, 0.25 and
1.15 times the lowest that the recipe reaches. The recipe is benchmarks/hand_recipe.py: Torch-Pruning at the largest even share that
meets the budget as measured, the same fine-tuning as ours, then int8 by the better of ONNX Runtime and NNCF, with up to three
layers left in fp32 where that helps. Both sides fine-tune the same number of candidates and choose among them by the search split;
the test split is used once, on the exported file of each. Gains are paired by image and seed; intervals are bootstrapped over seeds
and source digits. Every finished cell is a file in DIR: run it again to go on. Others' tools: see benchmarks/requirements.txt.
"""

import argparse
import hashlib
import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from safetensors import safe_open
from torch import Tensor, nn

import tightrope as tr
from benchmarks.tasks import NETS, splits, trained
from tightrope.compressors.finetune import Tuning, finetune
from tightrope.estimators.measured.clock import measure
from tightrope.spaces.policy import write_atomically

if TYPE_CHECKING:
    from benchmarks.hand_recipe import Shape

Bools = npt.NDArray[np.bool_]
Images = npt.NDArray[np.float32]
SIDES = ("recipe", "ours")
SLACK = 1.02  # what the recipe's finished file may miss its budget by: the clock's own noise
TIGHT = 1.15
DRAWS = 4000
log = logging.getLogger("recipe")


@dataclass(frozen=True)
class Plan:
    """What the figures depend on, besides the seeds.

    `tries` nets are fine-tuned by each side for each budget, `epochs` over the first `images` of the train split. The recipe's
    even shares are multiples of 1 / `steps`; its int8 is calibrated on `calibration` images. `dense` is for how many epochs, and on
    how many images, the dense net is trained; the task's own schedule unless given.
    """

    trials: int = 150
    tries: int = 1
    epochs: int = 2
    images: int = 12_000
    lr: float = 3e-3
    distil: float = 0.7
    steps: int = 32
    calibration: int = 200
    rounds: int = 100
    dense: tuple[int, int] | None = None

    @property
    def tag(self) -> str:
        """What names the folder of its cells."""
        from benchmarks.hand_recipe import VERSION

        return hashlib.sha256(json.dumps([VERSION, asdict(self)], sort_keys=True).encode()).hexdigest()[:8]


QUICK = Plan(trials=30, tries=1, epochs=1, images=3_000, steps=8, calibration=64, rounds=40, dense=(2, 6_000))


class Cells:
    """Finished cells as JSON files, and the models that go with them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The cell of this name: read, or made and kept."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            start, wall = time.process_time(), time.time()
            made = make()
            made["cpu_seconds"], made["wall_seconds"] = time.process_time() - start, time.time() - wall
            write_atomically(path, json.dumps(made) + "\n")
            log.info("%s: %.0f CPU s, %.0f s", name, made["cpu_seconds"], made["wall_seconds"])
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found

    def model(self, name: str) -> Path:
        return self.folder / f"{name}.onnx"


# --- the task -------------------------------------------------------------------------------------------------------


@cache
def whole(split: str) -> tuple[Images, npt.NDArray[np.int64]]:
    """One split of the task: images [n, 3, 40, 40] and classes [n]."""
    batches = list(splits()[split])
    return np.concatenate([x.numpy() for x, _ in batches]), np.concatenate([y.numpy() for _, y in batches])


@cache
def train_batches(images: int) -> list[tuple[Tensor, Tensor]]:
    data = splits()["train"]
    return data[: images // data.batch_size]


@cache
def net(seed: int, plan: Plan) -> nn.Module:
    """The dense net of a seed, trained at first use."""
    log.info("the residual net of seed %d: read, or trained for some CPU minutes", seed)
    if plan.dense is None:
        return trained("residual", seed)
    epochs, images = plan.dense
    return trained("residual", seed, schedule=replace(NETS["residual"].schedule, epochs=epochs), images=images)


@cache
def dense_file(seed: int, plan: Plan) -> onnx.ModelProto:
    """The dense net as torch exports it: the reference of every ratio."""
    from benchmarks.hand_recipe import exported

    return exported(net(seed, plan), example())


def example() -> Tensor:
    return train_batches(100)[0][0][:1]


def task(seed: int, plan: Plan) -> tr.Task:
    """Without its test split, so that a search cannot touch it."""
    data = splits()
    return tr.Task(net(seed, plan), example(), data["calibration"], data["search"], train=train_batches(plan.images))


def tested(model: onnx.ModelProto | bytes) -> dict[str, Any]:
    """Which test images the file gets right, as a text of 0 and 1."""
    from benchmarks.hand_recipe import correct

    return {"test": "".join("01"[int(c)] for c in correct(model, *whole("test")))}


# --- the recipe -----------------------------------------------------------------------------------------------------


def shapes(plan: Plan) -> dict[str, Any]:
    """What each even share takes, with the tools' plain int8 and with the layers reverted that cost time."""
    from benchmarks.hand_recipe import curve

    found = curve(net(0, plan), example(), dense_file(0, plan), plan.steps, plan.rounds)
    return {"shapes": [asdict(s) for s in found], "lowest": min(s.best() for s in found)}


def shares(cell: dict[str, Any], budget: float, tries: int) -> "list[tuple[Shape, str]]":
    """Shapes and channel orders to fine-tune: the largest share within the budget by each way of quantising, then more orders."""
    from benchmarks.hand_recipe import ORDERS, Shape

    known = [Shape(s["share"], tuple(s["widths"]), tuple(s["fastest"]), s["ratios"]) for s in cell["shapes"]]
    kinds = sorted({kind for s in known for kind in s.ratios})
    largest = {}
    for kind in kinds:
        fitting = [s for s in known if kind in s.ratios and s.ratios[kind][0] <= budget]
        if fitting:
            top = max(fitting, key=lambda s: s.share)
            largest[top.share] = top
    if not largest:
        raise SystemExit(f"recipe: no even share meets {budget:.3f}x; the lowest is {cell['lowest']:.3f}x")
    ordered = [largest[share] for share in sorted(largest, reverse=True)]
    return [(shape, order) for order in ORDERS for shape in ordered][:tries]


def by_recipe(seed: int, budget: float, plan: Plan, cell: dict[str, Any], file: Path) -> dict[str, Any]:
    """The hand recipe under one budget; the file it ends with is kept."""
    from benchmarks import hand_recipe as hand

    calibration, inputs = whole("calibration")[0][: plan.calibration], whole("search")
    tuning = Tuning(plan.epochs, plan.lr, batch=None, distil=plan.distil, seed=seed)
    tries: list[dict[str, Any]] = []
    made: list[onnx.ModelProto] = []
    for shape, order in shares(cell, budget, plan.tries):
        small = hand.pruned(net(seed, plan), example(), shape.share, order, train_batches(plan.images)[:10])
        finetune(small.train(), net(seed, plan), train_batches(plan.images), tuning)  # type: ignore[arg-type]
        fp32 = hand.exported(small.eval(), example())
        ranked = hand.worst(fp32, calibration[:50])
        reverted = dict.fromkeys([(), shape.fastest, *(tuple(ranked[:n]) for n in range(1, hand.MOST_REVERTED + 1))])
        variants = [hand.Variant(tool, names) for tool in hand.TOOLS for names in reverted]
        files = [hand.quantised(fp32, variant, calibration) for variant in variants]
        ratios = measure(
            {"dense": dense_file(seed, plan), **{str(i): f for i, f in enumerate(files)}}, "dense", rounds=plan.rounds, seed=seed
        )
        for i, (variant, model) in enumerate(zip(variants, files, strict=True)):
            fits = ratios[str(i)][0] <= SLACK * budget
            score = 100 * float(hand.correct(model, *inputs).mean()) if fits else None
            tries.append({
                "share": shape.share, "widths": hand.widths(small), "order": order, "tool": variant.tool,
                "reverted": variant.reverted, "ratio": ratios[str(i)], "search": score,
            })  # fmt: skip
            made.append(model)
    fitting = [i for i, t in enumerate(tries) if t["search"] is not None]
    if not fitting:
        raise SystemExit(f"recipe: no finished file meets {budget:.3f}x: {[round(t['ratio'][0], 3) for t in tries]}")
    best = max(fitting, key=lambda i: (tries[i]["search"], -tries[i]["ratio"][0]))
    write_atomically(file, made[best].SerializeToString())
    return {**tries[best], "tries": tries, **tested(made[best])}


# --- ours -----------------------------------------------------------------------------------------------------------


def by_search(seed: int, budget: float, plan: Plan, folder: Path, file: Path) -> dict[str, Any]:
    """Our search under one budget; a search that was stopped goes on."""
    given = task(seed, plan)
    if (folder / "trials.jsonl").exists():
        tr.resume(folder, given)
    else:
        tr.search(
            given, budget=f"latency<={budget:.4f}x", device="ort-cpu", agent="auto", trials=plan.trials, workers=0, seed=seed,
            out=str(folder), controls=False,
            finetune={"epochs": plan.epochs, "candidates": plan.tries, "lr": plan.lr, "batch": None, "distil": plan.distil},
        )  # fmt: skip
    report = json.loads((folder / "best" / "report.json").read_text(encoding="utf-8"))
    row = next((r for r in report["rows"] if r["name"] == "best"), None)
    if row is None:
        raise SystemExit(f"recipe: our search found nothing under {budget:.3f}x; see {folder}")
    data = (folder / "best" / "model.onnx").read_bytes()
    write_atomically(file, data)
    return {
        "search": row["score_search"]["value"], "ratio": list((row["latency_ratio_measured"] or {}).values()),
        "predicted": row["latency_ratio_predicted"], "within": row["within_budget"], "policy": row["policy"], **tested(data),
    }  # fmt: skip


# --- figures --------------------------------------------------------------------------------------------------------


def bits(cell: dict[str, Any]) -> npt.NDArray[np.float64]:
    return np.array([c == "1" for c in cell["test"]], np.float64)


def bootstrap(values: npt.NDArray[np.float64], rng: np.random.Generator) -> tuple[float, float, float, float]:
    """Mean in points, its standard error and the ends of its 95 % interval; `values` [seeds, images] in 0..1 or differences.

    Seeds and source digits are drawn anew, all canvases of a digit together.
    """
    sources = splits()["test"].part.sources
    digits = np.stack([values[:, sources == s].mean(1) for s in np.unique(sources)], 1)
    seeds, count = digits.shape
    drawn = np.empty(DRAWS)
    for i in range(DRAWS):
        drawn[i] = digits[rng.integers(0, seeds, seeds)][:, rng.integers(0, count, count)].mean()
    low, high = np.percentile(drawn, [2.5, 97.5])
    return 100 * float(digits.mean()), 100 * float(drawn.std()), 100 * float(low), 100 * float(high)


def compare(cells: Cells, plan: Plan, seeds: int) -> list[dict[str, Any]]:
    """All cells of the comparison, its table, and its figures."""
    known = cells.get("shapes", lambda: shapes(plan))
    budgets = {"040": 0.40, "025": 0.25, "tight": TIGHT * known["lowest"]}
    log.info("the recipe reaches %.3fx; budgets %s", known["lowest"], {k: round(v, 4) for k, v in budgets.items()})
    found: dict[tuple[str, str], list[Any]] = {}
    for seed in range(seeds):
        found.setdefault(("", "dense"), []).append(cells.get(f"dense-{seed}", lambda seed=seed: tested(dense_file(seed, plan))))  # type: ignore[misc]
        for name, budget in budgets.items():
            keys = {side: f"{side}-{seed}-{name}" for side in SIDES}
            recipe, ours = keys["recipe"], keys["ours"]
            folder = cells.folder / "runs" / ours

            def one_recipe(seed: int = seed, budget: float = budget, key: str = recipe) -> dict[str, Any]:
                return by_recipe(seed, budget, plan, known, cells.model(key))

            def one_search(seed: int = seed, budget: float = budget, folder: Path = folder, key: str = ours) -> dict[str, Any]:
                return by_search(seed, budget, plan, folder, cells.model(key))

            def timed(seed: int = seed, keys: dict[str, str] = keys) -> dict[str, Any]:
                files = {side: cells.model(key).read_bytes() for side, key in keys.items()}
                return dict(measure({"dense": dense_file(seed, plan), **files}, "dense", rounds=2 * plan.rounds, seed=seed))

            found.setdefault((name, "recipe"), []).append(cells.get(recipe, one_recipe))
            found.setdefault((name, "ours"), []).append(cells.get(ours, one_search))
            found.setdefault((name, "timed"), []).append(cells.get(f"timed-{seed}-{name}", timed))
    return figures(found, budgets, known["lowest"], seeds)


def figures(found: dict[tuple[str, str], list[Any]], budgets: dict[str, float], lowest: float, seeds: int) -> list[dict[str, Any]]:
    """Print the table; returns the figures."""
    rng, rows = np.random.default_rng(0), []

    def add(name: str, value: float, unit: str) -> None:
        rows.append({"name": name, "value": round(value, 5), "unit": unit})

    mean, error, _, _ = bootstrap(np.stack([bits(c) for c in found["", "dense"]]), rng)
    add("seeds", seeds, "1")
    add("recipe_lowest_ratio", lowest, "x")
    add("accuracy_dense", mean, "%")
    print(f"\n{'budget':14} {'':7} {'accuracy on test':>18}   measured ratio, 90 % interval")
    print(f"{'':14} {'dense':7} {mean:10.2f} ± {error:4.2f} %   1")
    for name, budget in budgets.items():
        values = {side: np.stack([bits(c) for c in found[name, side]]) for side in SIDES}
        for side in SIDES:
            mean, error, _, _ = bootstrap(values[side], rng)
            ratio, low, high = np.mean([c[side] for c in found[name, "timed"]], 0)
            add(f"accuracy_{side}_{name}", mean, "%")
            add(f"latency_{side}_{name}", ratio, "x")
            missed = sum(c["ratio"][0] > (SLACK if side == "recipe" else 1) * budget for c in found[name, side])
            add(f"missed_{side}_{name}", missed, "seeds")
            missing = f", {missed} of {seeds} over the budget" if missed else ""
            accuracy, latency = f"{mean:10.2f} ± {error:4.2f} %", f"{ratio:.3f} ({low:.3f}-{high:.3f})"
            print(f"{f'{name}: {budget:.3f}x':14} {side:7} {accuracy}   {latency}{missing}")
        gain, error, low, high = bootstrap(values["ours"] - values["recipe"], rng)
        add(f"accuracy_gain_{name}", gain, "points")
        add(f"accuracy_gain_{name}_lo", low, "points")
        add(f"accuracy_gain_{name}_hi", high, "points")
        print(f"{'':14} {'gain':7} {gain:+10.2f} ± {error:4.2f} points, 95 % {low:+.2f} to {high:+.2f}")
    return rows


# --- the demo -------------------------------------------------------------------------------------------------------


def demo(run: Path) -> dict[str, Any]:
    """The demo's measured latency ratio, and how far the exported file's accuracy is from the torch model's."""
    from benchmarks.hand_recipe import correct, exported
    from tightrope.search import demo_task

    if not (run / "best" / "model.onnx").exists():
        log.info("%s is missing: `tightrope demo` runs, some minutes", run)
        subprocess.run([sys.executable, "-m", "tightrope.search.cli", "demo", "--out", str(run.parent)], check=True)
    seed = json.loads((run / "demo.json").read_text(encoding="utf-8"))["seed"]
    dense = demo_task.build(seed)
    model = (run / "best" / "model.onnx").read_bytes()
    images, targets = demo_task.arrays("test")
    ratio, low, high = measure({"dense": exported(dense, images[:1]), "best": model}, "dense", rounds=200)["best"]
    onnx_right = correct(model, images.numpy(), targets.numpy())
    calibration = demo_task.splits()["calibration"]
    with torch.inference_mode():
        torch_right = (restored(run, dense, images[:1], calibration, seed)(images).argmax(1) == targets).numpy()
    return {
        "demo_latency_ratio": ratio, "demo_latency_ratio_lo": low, "demo_latency_ratio_hi": high,
        "demo_onnx_gap": 100 * float(onnx_right.mean() - torch_right.mean()),
        "demo_torch_accuracy": 100 * float(torch_right.mean()), "demo_onnx_accuracy": 100 * float(onnx_right.mean()),
        "demo_dense_accuracy": 100 * demo_task.accuracy(dense, [(images, targets)])[0],
    }  # fmt: skip


def restored(run: Path, dense: nn.Module, example: Tensor, calibration: Sequence[Any], seed: int) -> nn.Module:
    """The fine-tuned torch model of a run, from `best/model.safetensors`."""
    from tightrope.compressors.compress import compress
    from tightrope.compressors.export.packed import read_packed
    from tightrope.compressors.prepare import prepare
    from tightrope.compressors.quantize.fake import Part

    file = run / "best" / "model.safetensors"
    policy, tensors = read_packed(file)
    small = compress(dense, policy, prepare(dense, example, calibration, seed=seed))
    with torch.no_grad(), safe_open(file, "pt") as packed:
        scaled = {key for key in packed.keys() if key.endswith(".scales")}  # noqa: SIM118
        for key, array in tensors.items():
            part, _, kind = key.rpartition(".")
            layer, _, number = part.rpartition(".")
            if kind not in ("weight", "bias") or not number.isdigit():
                continue
            found: Any = small.get_submodule(layer)
            piece: Any = found[int(number)] if isinstance(found, nn.Sequential) else found
            inner: Any = piece.inner if isinstance(piece, Part) else piece
            getattr(inner, kind).copy_(torch.from_numpy(array.copy()))
            if kind == "weight" and f"{part}.scales" in scaled:
                piece.scales.copy_(packed.get_tensor(f"{part}.scales"))
    return small


UNITS = {"ratio": "x", "gap": "points", "accuracy": "%"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help='write [{"name", "value", "unit"}] here')
    parser.add_argument("--quick", action="store_true", help="one seed, few trials, short fine-tuning: that it runs, no more")
    parser.add_argument("--seeds", type=int, help="8 unless given")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/cache/recipe"), help="folder of the cells")
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"), help="a finished demo; run if it is missing")
    parser.add_argument("--skip-demo", action="store_true")
    for field, kind in (("trials", int), ("tries", int), ("epochs", int), ("images", int)):
        parser.add_argument(f"--{field}", type=kind, help=f"{field} of the plan, other than {getattr(Plan(), field)}")
    given = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    log.setLevel(logging.INFO)
    torch.set_num_threads(1)
    changed = {f: v for f in ("trials", "tries", "epochs", "images") if (v := getattr(given, f)) is not None}
    plan = Plan(**{**asdict(QUICK if given.quick else Plan()), **changed})
    rows = []
    if not given.skip_demo:
        for name, value in demo(given.demo).items():
            unit = next(u for word, u in UNITS.items() if word in name)
            rows.append({"name": name, "value": round(value, 5), "unit": unit})
            print(f"{name:28} {value:9.3f} {unit}", flush=True)
    rows += compare(Cells(given.out / plan.tag), plan, given.seeds or (1 if given.quick else 8))
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

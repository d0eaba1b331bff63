"""What makes trials cheap must not make them wrong, nor large: figures that `benchmarks.trial_cost` prints beside the times.

- `refit_gap`: weights by nested least squares against the normal equations of the same covariance, solved afresh; the largest
  difference over the largest weight, 40 layers at random widths;
- `score_gap`: the score that a trial gives against that of the file that the policy exports to, read back from disk and run
  at batch 1 on the same images; the largest of 30 random policies, in points;
- `prepared_over_weights`: bytes of all that is prepared but for Gram matrices (their Cholesky factors), over those of the weights;
- `worker_growth`: private memory that a worker gains over 60 trials, after the first one, in MiB.
"""

import multiprocessing
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tightrope.compressors.compress import compress
from tightrope.compressors.export import export
from tightrope.compressors.prepare import Prepared
from tightrope.search.evaluate import OrtEvaluator, open_session, pack, unpack
from tightrope.spaces import Policy, Space

Figure = tuple[str, float, str]
LAYERS, POLICIES, TRIALS = 40, 30, 60


def checks(space: Space, evaluator: OrtEvaluator, policies: int = POLICIES) -> list[Figure]:
    """All figures, as name, value and unit."""
    rng = np.random.default_rng(0)
    prepared = evaluator.source.prepared
    drawn = [space.sample(rng) for _ in range(max(policies, TRIALS))]
    return [
        ("refit_gap", refit_gap(prepared, rng), "1"),
        ("score_gap", max(score_gap(evaluator, policy) for policy in drawn[:policies]), "points"),
        ("prepared_over_weights", *prepared_over_weights(evaluator)),
        ("worker_growth", worker_growth(evaluator, drawn[:TRIALS]), "MiB"),
    ]


def refit_gap(prepared: Prepared, rng: np.random.Generator) -> float:
    """The largest relative difference of nested weights to those of `numpy.linalg.solve`."""
    worst = 0.0
    for name in rng.choice(sorted(prepared.nested), LAYERS):
        nested = prepared.nested[str(name)]
        features = len(nested.order)
        count = int(rng.integers(1, features))
        covariance = nested.lower @ nested.lower.T  # damped, inputs in the order in which they are kept
        rows = np.arange(nested.projected.shape[1])
        weight = prepared.weights[str(name)][0].astype(np.float64)
        by_feature = weight.reshape(len(weight), features, -1).swapaxes(1, 2).reshape(-1, features)
        dense = by_feature[:, nested.order].T  # `f x rows`
        fresh = np.linalg.solve(covariance[:count, :count], covariance[:count] @ dense)
        found = nested.at(count, rows).T[np.argsort(np.argsort(nested.order[:count]))]
        worst = max(worst, float(np.abs(found - fresh).max() / np.abs(dense).max()))
    return worst


def score_gap(evaluator: OrtEvaluator, policy: Policy) -> float:
    """Points between a trial's score and that of the exported file."""
    with TemporaryDirectory() as folder:
        path = export(compress(None, policy, evaluator.source.prepared), Path(folder) / "model.onnx")
        session = open_session(path.read_bytes())
    name, examples = session.get_inputs()[0].name, evaluator.examples
    images, target = examples.inputs[0], examples.targets[0]
    right = [session.run(None, {name: images[i : i + 1]})[0].argmax(-1)[0] == target[i] for i in range(len(images))]
    return abs(100 * float(np.mean(right)) - evaluator.evaluate(policy).value)


def prepared_over_weights(evaluator: OrtEvaluator) -> tuple[float, str]:
    prepared = evaluator.source.prepared
    weights = sum(a.nbytes for pair in prepared.weights.values() for a in pair if a is not None)
    grams = sum(n.lower.nbytes for n in prepared.nested.values())
    grams += sum(s.covariance.nbytes for s in prepared.statistics.layers.values() if s.covariance is not None)
    images = sum(x.nbytes for x in (*evaluator.examples.inputs, *evaluator.examples.targets))
    every = sum(a.nbytes for a in pack(evaluator).values())
    return (every - grams - images) / weights, "1"


def worker_growth(evaluator: OrtEvaluator, policies: list[Policy]) -> float:
    """MiB of private memory that a process of its own gains between its first trial and its last."""
    context = multiprocessing.get_context("spawn")
    queue: Any = context.SimpleQueue()
    worker = context.Process(target=_work, args=(queue, pack(evaluator), policies))
    worker.start()
    growth = float(queue.get())
    worker.join()
    return growth


def _work(queue: Any, arrays: Mapping[str, NDArray[Any]], policies: list[Policy]) -> None:
    import torch

    torch.set_num_threads(1)
    scorer = unpack(arrays)
    scorer.evaluate(Policy.make(scorer.source.prepared.network))  # the largest activations
    before = _private()
    for policy in policies:
        scorer.evaluate(policy)
    queue.put((_private() - before) / 2**20)


def _private() -> int:
    """Bytes of this process that no other one shares."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Private_"))

"""The search as a walk: one decision a step, in the order in which a forward pass meets the layers.

After He et al. 2018, "AMC: AutoML for model compression and acceleration on mobile devices" (sections 3.1 to 3.3), and Wang
et al. 2019, "HAQ: hardware-aware automated quantization with mixed precision" (section 3): layer features are the state, one
continuous action in [0, 1] decides, and the end of the walk is rewarded. Unlike theirs, the budget is held by construction.
"""

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import ArrayLike, NDArray

from tightrope.search.agent import Problem
from tightrope.search.agents.repair import fit
from tightrope.spaces.budget import Limits
from tightrope.spaces.cost import Cost, Score
from tightrope.spaces.network import Layer
from tightrope.spaces.policy import Policy
from tightrope.spaces.space import Variable
from tightrope.spaces.unit import lower

Point = NDArray[np.float64]
Observations = NDArray[np.float32]
_KINDS = ("channels", "rank", "weight_bits", "act_bits")
_LAYERS = ("conv", "depthwise", "linear")
_RECENT = 4


class CompressionEnv(gym.Env[Observations, NDArray[np.float32]]):
    """Walks the variables of a space.

    An action is a coordinate of [0, 1] and is rounded by the space's rule. **The wall**: an option is taken only if the policy
    of what was decided so far, this option and the cheapest rest fits; otherwise the nearest option that does. So the walk ends
    within the budget whether costs add up or not.

    Each observation is a float32 vector in [0, 1] (names in `features`): where the walk is, what is decided, the layer's shape
    (logarithms, scaled over the layers), the share of MACs here and still to come, the budget already committed, and the last
    actions. The reward is 0 but for the last step, where it is `reward` of the policy: the score (under an accuracy to be
    kept, `Problem.value`) less the dense one, as a share of the dense one.

    Args:
        evaluate: scores a finished policy; without it the last reward is 0 too, for agents that are told later.
        fill: whether the finished policy is grown until the budget is used.

    The last step's `info` has `policy`, `cost`, `score` and `point`, the actions as executed.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012

    def __init__(self, problem: Problem, evaluate: Callable[[Policy], Score] | None = None, *, fill: bool = True) -> None:
        self.problem, self._evaluate, self._fill = problem, evaluate, fill
        space = problem.space
        self.features, self._static = _features(problem)
        self._low = space.encode(problem.cheapest)
        self._limits = problem.limits
        self._point = self._low.copy()
        self._at = 0
        self.observation_space = gym.spaces.Box(0.0, 1.0, (len(self.features),), np.float32)
        self.action_space = gym.spaces.Box(0.0, 1.0, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Observations, dict[str, Any]]:
        """Begin a walk; `options["limits"]` may hold other limits than the problem's (if its cheapest policy meets them)."""
        super().reset(seed=seed)
        wanted: Limits = (options or {}).get("limits", self.problem.limits)
        fits = wanted.met(self.problem.cost(self.problem.cheapest))
        self._limits = wanted if fits else self.problem.limits
        self._point, self._at = self._low.copy(), 0
        return self._observe(), {}

    def step(self, action: ArrayLike) -> tuple[Observations, float, bool, bool, dict[str, Any]]:
        """Take one decision; `info["executed"]` is the coordinate that it came to."""
        wanted = float(np.clip(np.asarray(action, dtype=np.float64).reshape(-1)[0], 0.0, 1.0))
        self._point[self._at] = executed = self._wall(wanted)
        self._at += 1
        if self._at < len(self._point):
            return self._observe(), 0.0, False, False, {"executed": executed}
        space = self.problem.space
        policy = fit(self.problem, self._point, self._limits, fill=self._fill)
        cost = self.problem.cost(policy)
        score = None if self._evaluate is None else self._evaluate(policy)
        info = {"executed": executed, "policy": policy, "cost": cost, "score": score, "point": space.encode(policy)}
        return self._observe(), 0.0 if score is None else reward(self.problem, score, cost), True, False, info

    def _wall(self, wanted: float) -> float:
        """The option nearest to `wanted` that leaves room for the cheapest rest, as `Space.encode` writes it."""
        space, n = self.problem.space, len(self.problem.space.variables[self._at].options)
        others = sorted((np.arange(n) + 0.5) / n, key=lambda x: (abs(x - wanted), x))
        for candidate in (wanted, *others):
            point = self._point.copy()
            point[self._at] = candidate
            policy = space.decode(point)
            if self._limits.met(self.problem.cost(policy)):
                return float(space.encode(policy)[self._at])
        return float(self._low[self._at])

    def _observe(self) -> Observations:
        at = min(self._at, len(self._point) - 1)
        return self._at_step(at, self._point[: self._at], self._committed([self._point])[0])

    def observe_walk(self, point: ArrayLike) -> Observations:
        """The `d x f` observations of a whole walk whose executed actions are `point`, a `d`-dim vector."""
        done = np.asarray(point, dtype=np.float64)
        steps = np.arange(len(done))
        partial = np.where(steps[None] < steps[:, None], done, self._low)
        committed = self._committed(list(partial))
        return np.stack([self._at_step(i, done[:i], committed[i]) for i in range(len(done))])

    def _committed(self, points: list[Point]) -> list[float]:
        """The share of the budget (of the dense cost where there is no limit) that each point uses, at most 1."""
        problem = self.problem
        share = problem.limits.use if problem.limits.top else problem.price
        return [min(1.0, share(cost)) for cost in problem.costs([problem.space.decode(p) for p in points])]

    def _at_step(self, at: int, done: Point, committed: float) -> Observations:
        recent = np.zeros(_RECENT)
        recent[: min(len(done), _RECENT)] = done[::-1][:_RECENT]
        mean = float(done.mean()) if len(done) else 0.0
        return np.concatenate([self._static[at], [committed, mean], recent]).astype(np.float32)


def reward(problem: Problem, score: Score, cost: Cost) -> float:
    """What a finished policy is worth to a learner: 0 for one as good as dense, and about -1 for a useless one."""
    scale = abs(problem.dense.value) or 1.0
    return (score.value - problem.dense.value) / scale if problem.floor is None else problem.value(score, cost) / 100


def _features(problem: Problem) -> tuple[tuple[str, ...], NDArray[np.float64]]:
    """Names of all features, and the `d x s` array of those that do not change during a walk."""
    space, network = problem.space, problem.network
    layers = [_layer_of(problem, v) for v in space.variables]
    macs = dict.fromkeys(network.by_name, 0)
    for unit in lower(network, space.dense):
        macs[unit.layer] += unit.macs
    widths = network.widths
    shape = np.log1p(
        [
            [x.inputs.at(widths), x.outputs.at(widths), x.kernel[0] * x.kernel[1], x.stride[0], x.out_size[0] * x.out_size[1],
             macs[x.name], len(v.options)]
            for x, v in zip(layers, space.variables, strict=True)
        ]
    )  # fmt: skip
    shape = (shape - shape.min(0)) / np.where(np.ptp(shape, axis=0) > 0, np.ptp(shape, axis=0), 1)
    order = {layer.name: i for i, layer in enumerate(network.layers)}
    running = np.cumsum([macs[x.name] for x in network.layers]) / max(1, sum(macs.values()))
    rows = [
        [i / max(1, len(layers) - 1), *(v.kind == k for k in _KINDS), *(x.kind == k for k in _LAYERS), *shape[i],
         macs[x.name] / max(1, sum(macs.values())), 1 - running[order[x.name]]]
        for i, (x, v) in enumerate(zip(layers, space.variables, strict=True))
    ]  # fmt: skip
    names = ("position", *_KINDS, *_LAYERS, "inputs", "outputs", "kernel", "stride", "pixels", "macs", "options", "share", "rest")
    return (*names, "committed", "mean", *(f"action-{i + 1}" for i in range(_RECENT))), np.array(rows, dtype=np.float64)


def _layer_of(problem: Problem, variable: Variable) -> Layer:
    """The layer that a variable decides about; for channels the first that writes the group."""
    network = problem.network
    return network.writers(variable.target)[0] if variable.kind == "channels" else network.layer(variable.target)

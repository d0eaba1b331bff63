"""The search as a walk: one decision a step, in the order in which a forward pass meets the layers.

After He et al. 2018, "AMC: AutoML for model compression and acceleration on mobile devices" (sections 3.1 to 3.3), and Wang
et al. 2019, "HAQ: hardware-aware automated quantization with mixed precision" (section 3): layer features are the state, one
continuous action in [0, 1] decides, and the end of the walk is rewarded. Unlike theirs, the budget is held by construction.
"""

import math
from collections.abc import Callable
from functools import cached_property
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import ArrayLike, NDArray

from tightrope.search.agent import Problem
from tightrope.search.agents.repair import fit
from tightrope.spaces.budget import Limits
from tightrope.spaces.cost import Cost, Score
from tightrope.spaces.errors import ConfigError
from tightrope.spaces.fields import nearest
from tightrope.spaces.network import Layer
from tightrope.spaces.policy import Policy
from tightrope.spaces.space import Variable
from tightrope.spaces.unit import lower

Point = NDArray[np.float64]
Observations = NDArray[np.float32]
_KINDS = ("channels", "rank", "weight_bits", "act_bits")
_LAYERS = ("conv", "depthwise", "linear")
_RECENT = {"joint": 4, "amc": 1, "haq": 1}  # last actions that are seen
STATES = tuple(_RECENT)
REWARDS = ("score", "err", "flops", "param", "haq")


class CompressionEnv(gym.Env[Observations, NDArray[np.float32]]):
    """Walks the variables of a space.

    An action is a coordinate of [0, 1] and is rounded by the space's rule. **The wall**: an option is taken only if the policy
    of what was decided so far, this option and the cheapest rest fits; otherwise the nearest option that does. So the walk ends
    within the budget whether costs add up or not.

    Each observation is a float32 vector in [0, 1] (names in `features`). With `joint` states it is where the walk is, what is
    decided, the layer's shape (logarithms, scaled over the layers), the share of MACs here and still to come, the budget already
    committed, and the last actions. `amc` has the eleven numbers of AMC's section 3.1 (layer, n, c, h, w, stride, k, FLOPs,
    reduced, rest, last action) and `haq` the ten of HAQ's section 3.1, in its two steps a layer; both scaled over the layers.
    The reward is 0 but for the last step, where it is `reward` of the policy.

    Args:
        evaluate: scores a finished policy; without it the last reward is 0 too, for agents that are told later.
        fill: whether the finished policy is grown until the budget is used.
        states: `joint`, `amc` or `haq`.
        reward: the kind of `reward`.

    The last step's `info` has `policy`, `cost`, `score` and `point`, the actions as executed.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012

    def __init__(
        self, problem: Problem, evaluate: Callable[[Policy], Score] | None = None, *, fill: bool = True, states: str = "joint",
        reward: str = "score",
    ) -> None:  # fmt: skip
        for what, given, known in (("states", states, STATES), ("reward", reward, REWARDS)):
            if given not in known:
                raise ConfigError(f"{what} must be {', '.join(known[:-1])} or {known[-1]}, got {given!r}{nearest(given, known)}")
        self.problem, self._evaluate, self._fill, self._states, self._reward = problem, evaluate, fill, states, reward
        space = problem.space
        self.features, self._static = _features(problem) if states == "joint" else _published(problem, states)
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
        worth = 0.0 if score is None else reward(self.problem, score, cost, self._reward)
        return self._observe(), worth, True, False, info

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
        done = self._point[: self._at]
        return self._at_step(at, done, self._shares([np.concatenate([done, self._rest[self._at :]])])[0])

    def observe_walk(self, point: ArrayLike) -> Observations:
        """The `d x f` observations of a whole walk whose executed actions are `point`, a `d`-dim vector."""
        done = np.asarray(point, dtype=np.float64)
        steps = np.arange(len(done))
        shares = self._shares(list(np.where(steps[None] < steps[:, None], done, self._rest)))
        return np.stack([self._at_step(i, done[:i], shares[i]) for i in range(len(done))])

    @cached_property
    def _rest(self) -> Point:
        """What stands for the decisions to come: their cheapest options; for AMC, which counts what is reduced, the dearest."""
        return np.ones(len(self._low)) if self._states == "amc" else self._low

    def _shares(self, points: list[Point]) -> list[float]:
        """For AMC's states the share of MACs that each point saves; else the share of the budget that it uses, at most 1."""
        problem = self.problem
        if self._states == "haq":
            return [0.0] * len(points)
        costs = problem.costs(problem.space.decode_many(points))
        if self._states == "amc":
            return [max(0.0, 1 - cost.macs / problem.dense_cost.macs) for cost in costs]
        share = problem.limits.use if problem.limits.top else problem.price
        return [min(1.0, share(cost)) for cost in costs]

    def _at_step(self, at: int, done: Point, share: float) -> Observations:
        recent = np.zeros(_RECENT[self._states])
        recent[: min(len(done), len(recent))] = done[::-1][: len(recent)]
        mean = float(done.mean()) if len(done) else 0.0
        seen = {"joint": [share, mean], "amc": [share], "haq": []}[self._states]
        return np.concatenate([self._static[at], seen, recent]).astype(np.float32)


def reward(problem: Problem, score: Score, cost: Cost, kind: str = "score") -> float:
    """What a finished policy is worth to a learner.

    `score`: 0 for one as good as dense, and about -1 for a useless one. `err`, `flops` and `param` are AMC's R_err, R_FLOPs and
    R_param: the share of the dense score that is missing, negative, by itself or times the logarithm of MACs or of parameters
    (in words of 32 bits). `haq` is HAQ's, a tenth of the points gained. Under an accuracy to be kept it is `Problem.value` in
    every case.
    """
    if problem.floor is not None:
        return problem.value(score, cost) / 100
    gained = score.value - problem.dense.value
    if kind == "haq":
        return 0.1 * gained
    lost = gained / (abs(problem.dense.value) or 1.0)
    return lost * {"flops": math.log(max(2, cost.macs)), "param": math.log(max(2.0, cost.size_bytes / 4))}.get(kind, 1.0)


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
    return (*names, "committed", "mean", *(f"action-{i + 1}" for i in range(_RECENT["joint"]))), np.array(rows, dtype=np.float64)


def _published(problem: Problem, states: str) -> tuple[tuple[str, ...], NDArray[np.float64]]:
    """The same for the states of AMC and of HAQ, in their order but that what changes stands last."""
    space, network, widths = problem.space, problem.network, problem.network.widths
    layers = [_layer_of(problem, v) for v in space.variables]
    macs = dict.fromkeys(network.by_name, 0)
    for unit in lower(network, space.dense):
        macs[unit.layer] += unit.macs
    order = {layer.name: i for i, layer in enumerate(network.layers)}
    behind = np.cumsum([macs[x.name] for x in network.layers])
    rows: list[list[float]] = []
    for x, v in zip(layers, space.variables, strict=True):
        inputs, outputs, kernel = x.inputs.at(widths), x.outputs.at(widths), math.prod(x.kernel)
        if states == "amc":
            rest = behind[-1] - behind[order[x.name]]
            rows.append([order[x.name], outputs, inputs, *x.in_size, x.stride[0], x.kernel[0], macs[x.name], rest])
        else:
            pixels, weights = math.prod(x.in_size), inputs * outputs * kernel // x.groups
            rows.append([
                order[x.name], inputs, outputs, x.kernel[0], x.stride[0], pixels, weights, x.kind == "depthwise",
                v.kind == "weight_bits",
            ])  # fmt: skip
    table = np.array(rows, dtype=np.float64)
    table = (table - table.min(0)) / np.where(np.ptp(table, axis=0) > 0, np.ptp(table, axis=0), 1)
    if states == "amc":
        return ("layer", "n", "c", "h", "w", "stride", "k", "flops", "rest", "reduced", "last"), table
    return ("layer", "c_in", "c_out", "kernel", "stride", "pixels", "weights", "depthwise", "weight_step", "last"), table


def _layer_of(problem: Problem, variable: Variable) -> Layer:
    """The layer that a variable decides about; for channels the first that writes the group."""
    network = problem.network
    return network.writers(variable.target)[0] if variable.kind == "channels" else network.layer(variable.target)

"""The search as a walk: one decision a step, in the order in which a forward pass meets the layers.

After He et al. 2018, "AMC: AutoML for model compression and acceleration on mobile devices" (sections 3.1 to 3.3), and Wang
et al. 2019, "HAQ: hardware-aware automated quantization with mixed precision" (section 3): layer features are the state, one
continuous action in [0, 1] decides, and the end of the walk is rewarded. Unlike theirs, the budget is held by construction.
"""

import math
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import ArrayLike, NDArray

from tightrope.search.agent import Problem
from tightrope.search.agents.repair import fit
from tightrope.search.agents.response import given_up
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
    decided, the layer's shape (logarithms, scaled over the layers), the share of MACs here and still to come, what the decision
    may cost and lose, what the decisions so far cost and lost, and the last actions. Losses are those of calibration
    (`Space.losses`); costs are told by the device once, for each option alone in the dense policy made to fit, and added up: twice
    `committed` is the share of the budget that they come to with the rest as it is there. `amc` has the eleven numbers of
    AMC's section 3.1 (layer, n, c, h, w, stride, k, FLOPs, reduced, rest, last action) and `haq` the ten of HAQ's section 3.1, in
    its two steps a layer; both scaled over the layers.
    The reward is 0 but for the last step, where it is `reward` of the policy.

    Args:
        evaluate: scores a finished policy; without it the last reward is 0 too, for agents that are told later.
        fill: whether the finished policy is grown until the budget is used.
        wall: without it no step is held back, and the finished policy gives in evenly (`repair.fit`), the early decisions as much
            as the late ones.
        states: `joint`, `amc` or `haq`.
        reward: the kind of `reward`.

    The last step's `info` has `policy`, `cost`, `score` and `point`, the actions as executed.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012

    def __init__(
        self, problem: Problem, evaluate: Callable[[Policy], Score] | None = None, *, fill: bool = True, states: str = "joint",
        reward: str = "score", wall: bool = True,
    ) -> None:  # fmt: skip
        for what, given, known in (("states", states, STATES), ("reward", reward, REWARDS)):
            if given not in known:
                raise ConfigError(f"{what} must be {', '.join(known[:-1])} or {known[-1]}, got {given!r}{nearest(given, known)}")
        self.problem, self._evaluate, self._fill, self._states, self._reward = problem, evaluate, fill, states, reward
        self._walled = wall
        space = problem.space
        self._told = _told(problem) if states == "joint" else None
        self.features, self._static = _published(problem, states) if self._told is None else _features(problem, *self._told[:2])
        self._options = np.array([len(v.options) for v in space.variables])
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
        self._point[self._at] = executed = self._wall(wanted) if self._walled else wanted
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
        space, n = self.problem.space, self._options[self._at]
        others = sorted((np.arange(n) + 0.5) / n, key=lambda x: (abs(x - wanted), x))
        for candidates in ([wanted], others):  # the one that is wanted mostly fits
            tried = np.repeat(self._point[None], len(candidates), axis=0)
            tried[:, self._at] = candidates
            policies = space.decode_many(tried)
            for policy, cost in zip(policies, self.problem.costs(policies), strict=True):
                if self._limits.met(cost):
                    return float(space.encode(policy)[self._at])
        return float(self._low[self._at])

    def _observe(self) -> Observations:
        row: Observations = self._rows(self._point, np.array([min(self._at, len(self._point) - 1)]))[0]
        return row

    def observe_walk(self, point: ArrayLike) -> Observations:
        """The `d x f` observations of a whole walk whose executed actions are `point`, a `d`-dim vector."""
        return self._rows(np.asarray(point, dtype=np.float64), np.arange(len(self._low)))

    def _rows(self, point: Point, steps: NDArray[np.int64]) -> Observations:
        """What is seen at these steps of a walk; of `point`, each row depends on the coordinates before its step."""
        ago = steps[:, None] - 1 - np.arange(_RECENT[self._states])
        recent = np.where(ago >= 0, point[np.maximum(ago, 0)], 0.0)
        seen = list[Point]()
        if self._states == "amc":
            tried = np.where(np.arange(len(point)) < steps[:, None], point, 1.0)
            macs = [cost.macs for cost in self.problem.costs(self.problem.space.decode_many(tried))]
            seen = [np.maximum(0.0, 1 - np.array(macs) / self.problem.dense_cost.macs)]
        elif self._told is not None:
            rises, lost, spent = self._told
            at = np.arange(len(point)), np.minimum((point * self._options).astype(np.int64), self._options - 1)
            before = [np.concatenate([[0.0], np.cumsum(x)[:-1]])[steps] for x in (rises[at], lost[at], point)]
            whole = max(1e-9, float(lost.max(1).sum()))
            seen = [np.clip((spent + before[0]) / 2, 0, 1), np.minimum(1.0, before[1] / whole), before[2] / np.maximum(1, steps)]
        return np.concatenate([self._static[steps], *(x[:, None] for x in seen), recent], axis=1).astype(np.float32)


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


def _told(problem: Problem) -> tuple[Point, Point, float]:
    """What each option adds to the share of the budget used and to the losses, `d x options` each, and the share used before.

    The costs are around the dense policy made to fit, each option alone.
    """
    space = problem.space
    centre, most = space.encode(fit(problem, np.ones(space.dimension))), max(len(v.options) for v in space.variables)
    rows = np.repeat(np.repeat(centre[None], most, axis=0)[None], len(centre), axis=0)  # d x options x d
    for i, variable in enumerate(space.variables):
        n = len(variable.options)
        rows[i, :, i] = (np.minimum(np.arange(most), n - 1) + 0.5) / n
    share = problem.limits.use if problem.limits.top else problem.price
    used = np.array([share(c) for c in problem.costs(space.decode_many(rows.reshape(-1, len(centre))))]).reshape(len(centre), most)
    spent = share(problem.cost(space.decode(centre)))
    lost = np.array([np.pad(given_up(space, v), (0, most - len(v.options))) for v in space.variables])
    return used - spent, lost, spent


def _features(problem: Problem, rises: Point, lost: Point) -> tuple[tuple[str, ...], NDArray[np.float64]]:
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
    table, middle = np.array(rows, dtype=np.float64), [len(v.options) // 2 for v in space.variables]
    worth = np.stack([np.ptp(rises, axis=1), lost[:, 0], lost[np.arange(len(layers)), middle]], axis=1)
    table = np.concatenate([table, np.sqrt(worth / np.maximum(1e-9, worth.max(0)))], axis=1)
    names = ("position", *_KINDS, *_LAYERS, "inputs", "outputs", "kernel", "stride", "pixels", "macs", "options", "share", "rest",
             "price", "loss", "loss-middle", "committed", "lost", "mean")  # fmt: skip
    return (*names, *(f"action-{i + 1}" for i in range(_RECENT["joint"]))), table


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

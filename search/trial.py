"""A trial: one policy, its cost and its score."""

from base64 import b64decode, b64encode
from dataclasses import dataclass
from typing import Any

from tightrope.spaces.cost import Cost, Score
from tightrope.spaces.errors import FormatError
from tightrope.spaces.fields import Fields
from tightrope.spaces.policy import Policy


@dataclass(frozen=True, slots=True)
class Trial:
    """One policy, what it costs and how good it was.

    `score` is None where the trial failed, and `failed` says why. `feasible` tells whether the budget is met, the accuracy
    to be kept included. `cpu_seconds` is what scoring took, 0 for a policy that was scored before; `time` is Unix time.

    A trial that was given up early (`search/stopping.py`) has a score of fewer examples than the dense model's. `right` tells
    which examples a complete one has right, in a search that gives trials up: one bit each, in the evaluator's order.
    """

    number: int
    agent: str
    policy: Policy
    cost: Cost
    score: Score | None
    feasible: bool
    failed: str | None = None
    cpu_seconds: float = 0.0
    time: float = 0.0
    right: bytes | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": "trial", "number": self.number, "agent": self.agent, "policy": self.policy.to_json(),
            "cost": self.cost.to_json(), "score": None if self.score is None else self.score.to_json(),
            "feasible": self.feasible, "failed": self.failed, "cpu_seconds": self.cpu_seconds, "time": self.time,
            **({} if self.right is None else {"right": b64encode(self.right).decode()}),
        }  # fmt: skip

    @staticmethod
    def from_json(f: Fields) -> "Trial":
        none = type(None)
        score = f.take("score", (dict, none))
        return Trial(
            f.take("number", int), f.take("agent", str), Policy.from_json(f.take("policy", dict), f"{f.where}.policy"),
            Cost.from_json(f.take("cost", dict), f"{f.where}.cost"),
            None if score is None else Score.from_json(score, f"{f.where}.score"),
            f.take("feasible", bool), f.take("failed", (str, none)), f.take("cpu_seconds", float), f.take("time", float),
            bits(f),
        )  # fmt: skip


def bits(f: Fields) -> bytes | None:
    """The field `right` of a line, base64."""
    text = f.take("right", (str, type(None)), None)
    try:
        return None if text is None else b64decode(text, validate=True)
    except ValueError:
        raise FormatError(f"{f.where}.right must be base64") from None

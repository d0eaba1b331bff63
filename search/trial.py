"""A trial: one policy, its cost and its score."""

from dataclasses import dataclass
from typing import Any

from tightrope.spaces.cost import Cost, Score
from tightrope.spaces.fields import Fields
from tightrope.spaces.policy import Policy


@dataclass(frozen=True, slots=True)
class Trial:
    """One policy, what it costs and how good it was.

    `score` is None where the trial failed, and `failed` says why. `feasible` tells whether the budget is met, the accuracy
    to be kept included. `cpu_seconds` is what scoring took, 0 for a policy that was scored before; `time` is Unix time.
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

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": "trial", "number": self.number, "agent": self.agent, "policy": self.policy.to_json(),
            "cost": self.cost.to_json(), "score": None if self.score is None else self.score.to_json(),
            "feasible": self.feasible, "failed": self.failed, "cpu_seconds": self.cpu_seconds, "time": self.time,
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
        )  # fmt: skip

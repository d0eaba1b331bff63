"""Policies and networks as plain data. Needs numpy and the standard library only."""

from tightrope.spaces.budget import Budget, Limit, Limits
from tightrope.spaces.cost import Cost, Score, UnitCost
from tightrope.spaces.network import Extent, Group, Layer, Network, Op, Parameter
from tightrope.spaces.policy import Choice, Policy
from tightrope.spaces.space import Space, Variable
from tightrope.spaces.unit import Unit, lower

__all__ = [
    "Budget", "Choice", "Cost", "Extent", "Group", "Layer", "Limit", "Limits", "Network", "Op", "Parameter", "Policy", "Score",
    "Space", "Unit", "UnitCost", "Variable", "lower",
]  # fmt: skip

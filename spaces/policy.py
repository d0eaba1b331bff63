"""A policy: what is done to every layer and group of one network, after all rounding."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tightrope.spaces.errors import PolicyError
from tightrope.spaces.fields import Fields, nearest, read
from tightrope.spaces.network import Network, forms, full_rank

VERSION = 1
BITS = (2, 3, 4, 5, 6, 7, 8, 32)  # 32: left in floating point


@dataclass(frozen=True, slots=True)
class Choice:
    """What is done to one layer; a field left at its default changes nothing.

    `weight_bits` and `act_bits` (of the layer's input) are 2..8, or 32 for floating point. `rank` is the rank of the
    factors that replace the layer, in the form that `form` names: `svd` (linear, 1x1), `spatial` (k x 1 then 1 x k) or
    `tucker` (1x1, k x k, 1x1; both inner widths are `rank`, at most the layer's own).
    """

    weight_bits: int = 32
    act_bits: int = 32
    rank: int | None = None
    form: str = ""

    def __post_init__(self) -> None:
        for what, bits in (("weight_bits", self.weight_bits), ("act_bits", self.act_bits)):
            if bits not in BITS:
                raise PolicyError(f"{what} must be one of {BITS}, got {bits!r}")
        if (self.rank is None) != (self.form == ""):
            raise PolicyError(f"rank and form go together, got rank={self.rank!r} and form={self.form!r}")


DENSE = Choice()


@dataclass(frozen=True)
class Policy:
    """One point of a space, hashable, for the network with this fingerprint.

    `widths` has the width that every group keeps and `choices` what is done to every layer; a group or layer that is
    left out stays whole. Policies that mean the same are equal: entries that change nothing are dropped by `make`.
    """

    network: str
    widths: tuple[tuple[str, int], ...] = ()
    choices: tuple[tuple[str, Choice], ...] = ()

    @staticmethod
    def make(network: Network, widths: Mapping[str, int] | None = None, choices: Mapping[str, Choice] | None = None) -> "Policy":
        """Build the policy in its one normal form and check it against the network."""
        widths, choices = widths or {}, choices or {}
        policy = Policy(
            network.fingerprint,
            tuple((g.name, widths[g.name]) for g in network.groups if widths.get(g.name, g.width) != g.width),
            tuple((x.name, choices[x.name]) for x in network.layers if choices.get(x.name, DENSE) != DENSE),
        )
        for group in widths:
            if group not in network.widths:
                raise PolicyError(f"the network has no group {group!r}{nearest(group, network.widths)}")
        for layer in choices:
            if layer not in network.by_name:
                raise PolicyError(f"the network has no layer {layer!r}{nearest(layer, network.by_name)}")
        policy.check(network)
        return policy

    @cached_property
    def _widths(self) -> dict[str, int]:
        return dict(self.widths)

    @cached_property
    def _choices(self) -> dict[str, Choice]:
        return dict(self.choices)

    def choice(self, layer: str) -> Choice:
        """What is done to a layer."""
        return self._choices.get(layer, DENSE)

    def all_widths(self, network: Network) -> dict[str, int]:
        """The width of every group of the network under this policy."""
        return {**network.widths, **self._widths}

    def check(self, network: Network) -> None:
        """Raise `PolicyError` unless a model with this network can satisfy the policy."""
        if self.network != network.fingerprint:
            raise PolicyError(
                f"the policy is for network {self.network}, but this network is {network.fingerprint}; "
                "a policy belongs to the model that it was found for"
            )
        for group, width in self.widths:
            if group not in network.widths:
                raise PolicyError(f"the network has no group {group!r}{nearest(group, network.widths)}")
            if not 1 <= width <= network.widths[group]:
                raise PolicyError(f"width of group {group!r} must lie in [1, {network.widths[group]}], got {width}")
        widths = self.all_widths(network)
        for name, choice in self.choices:
            if name not in network.by_name:
                raise PolicyError(f"the network has no layer {name!r}{nearest(name, network.by_name)}")
            if choice.rank is None:
                continue
            layer = network.by_name[name]
            if choice.form not in forms(layer):
                raise PolicyError(f"form of layer {name!r} must be one of {forms(layer)}, got {choice.form!r}")
            full = full_rank(layer, choice.form, widths)
            if not 1 <= choice.rank <= full:
                raise PolicyError(
                    f"rank of layer {name!r} must lie in [1, {full}], got {choice.rank}; leave it out to keep the layer whole"
                )

    def to_json(self) -> dict[str, Any]:
        layers = {}
        for name, choice in self.choices:
            layers[name] = {"weight_bits": choice.weight_bits, "act_bits": choice.act_bits}
            if choice.rank is not None:
                layers[name] |= {"rank": choice.rank, "form": choice.form}  # type: ignore[dict-item]
        return {"version": VERSION, "network": self.network, "channels": self._widths, "layers": layers}

    @staticmethod
    def from_json(value: object, where: str = "policy") -> "Policy":
        top = value if isinstance(value, Fields) else Fields(value, where)
        top.only("version", "network", "channels", "layers")
        top.version(VERSION)
        widths = []
        for group, width in top.items("channels"):
            if isinstance(width, bool) or not isinstance(width, int):
                raise PolicyError(f"{top.where}.channels.{group} must be a whole number, got {width!r}")
            widths.append((group, width))
        choices = []
        for name, fields in ((n, Fields(v, f"{top.where}.layers.{n}")) for n, v in top.items("layers")):
            fields.only("weight_bits", "act_bits", "rank", "form")
            try:
                choice = Choice(
                    fields.take("weight_bits", int, 32), fields.take("act_bits", int, 32),
                    fields.take("rank", (int, type(None)), None), fields.take("form", str, ""),
                )  # fmt: skip
            except PolicyError as error:
                raise PolicyError(f"{fields.where}: {error}") from None
            choices.append((name, choice))
        return Policy(top.take("network", str), tuple(widths), tuple(choices))

    def save(self, path: Path) -> None:
        """Write the policy as JSON, beside the target first and moved over it then."""
        write_atomically(path, json.dumps(self.to_json(), indent=1) + "\n")

    @staticmethod
    def load(path: Path, network: Network | None = None) -> "Policy":
        """Read a policy; with a network, put it in normal form and check that it fits."""
        policy = Policy.from_json(read(path))
        return policy if network is None else policy.normal(network)

    def normal(self, network: Network) -> "Policy":
        """The same policy in normal form, checked against the network."""
        self.check(network)
        return Policy.make(network, self._widths, self._choices)


def write_atomically(path: Path, data: str | bytes) -> None:
    """Write a file so that a reader sees the old one or the new one, never half of either."""
    beside = path.with_name(path.name + ".new")
    beside.write_bytes(data.encode() if isinstance(data, str) else data)
    beside.replace(path)


def unique(policies: Iterable[Policy]) -> list[Policy]:
    """The policies without repeats, in the order of their first appearance."""
    return list(dict.fromkeys(policies))

"""What is timed, and beside what: the nodes and nets that a space calls for, on the scale of the same few nodes everywhere."""

from collections.abc import Sequence

import numpy as np

from tightrope.estimators.measured import nodes as one_node
from tightrope.estimators.measured.clock import Float, Runner, Timed, low_quartile, noise_floor, time_rounds
from tightrope.spaces.policy import Policy
from tightrope.spaces.space import Space

LEAST_ROUNDS = 6
CHUNK_SECONDS = 2.0  # about what a chunk may take; longer nodes are timed in fewer rounds
REFERENCE = (
    ("com.microsoft.nchwc:Conv{kernel_shape=[3,3];pads=[1,1,1,1]}(f:1,32,28,28;=f:32,32,3,3;=f:32)->f:1,32,28,28", ()),
    ("com.microsoft:QLinearConv{channels_last=1;kernel_shape=[3,3];pads=[1,1,1,1]}"
     "(u:1,14,14,64;=f:;=u:;=s:64,64,3,3;=f:64;=s:64;=f:;=u:;=i:64)->u:1,14,14,64", ()),
    ("Gemm{transB=1}(f:64,256;=f:256,256;=f:256)->f:64,256", ()),
    ("QuantizeLinear{}(f:1,32,28,28;=f:;=u:)->u:1,32,28,28", ()),
    ("Transpose{perm=[0,2,3,1]}(u:1,64,28,28)->u:1,28,28,64", ()),
)  # fmt: skip
"""Nodes whose times tell how fast the machine is while others are timed; the same for every table."""
EMPTY = ("Identity{}(f:1)->f:1", ())


def steady_nodes() -> list[Timed]:
    """The reference nodes of ONNX Runtime, and an empty call at the end."""
    return [Runner(one_node.model(*k), optimise=False) for k in (*REFERENCE, EMPTY)]


def rounds_of(
    runners: Sequence[Timed], rounds: int, rng: np.random.Generator, steady: Sequence[Timed]
) -> tuple[Float, float, float]:
    """Samples, `rounds x runners`, and the times of the reference (all of `steady` but its last) and of an empty call (its last).

    All fall in the same rounds: as many as `rounds`, but fewer where one of them takes long, and at least six.
    """
    first = time_rounds([*runners, *steady], 1, rng)
    rounds = max(LEAST_ROUNDS, min(rounds, int(CHUNK_SECONDS * 1e3 / (2 * first.sum()))))
    samples = time_rounds([*runners, *steady], rounds, rng)
    *reference, empty = low_quartile(samples[:, len(runners) :]).tolist()
    return samples[:, : len(runners)], sum(reference) - len(reference) * empty, empty


def floor(rounds: int = 40) -> float:
    """The noise floor of this machine now, by the reference nodes."""
    return noise_floor(time_rounds(steady_nodes()[:-1], rounds, np.random.default_rng(0)))


def probes(space: Space, rng: np.random.Generator, count: int) -> list[Policy]:
    """Policies that show what nodes a space comes to: its corners, random ones, and random ones of extreme widths and ranks."""
    variables, found = space.variables, []
    wide = np.array([v.kind in ("channels", "rank") for v in variables])
    for width in (0.0, 1.0):
        for rank in (0.0, 0.999 - 1 / 5, 1.0):
            for bits in (0.0, 0.5, 1.0):
                kinds = {"channels": width, "rank": rank}
                found.append(space.decode([kinds.get(v.kind, bits) for v in variables]))
    for index in range(count):
        point = rng.random(len(variables))
        if index % 4:
            point[wide] = np.where(rng.random(int(wide.sum())) < 0.5, 0.0, 1.0)
        found.append(space.decode(point))
    return found


def mixed(space: Space, rng: np.random.Generator, count: int) -> list[Policy]:
    """Policies as searches meet them, a third each: random, with most layers whole, and even ones of one precision.

    Even ones keep one share of every group; every other one leaves the first and last layer at their dearest bits.
    """
    found, kinds = [], np.array([v.kind for v in space.variables])
    ends = {space.network.layers[0].name, space.network.layers[-1].name}
    outer = np.array([v.target in ends for v in space.variables])
    for index in range(count):
        point = rng.random(space.dimension)
        if index % 3:
            point[(kinds == "rank") & (rng.random(len(point)) < 0.75)] = 1.0
        if index % 3 == 2:
            point[kinds == "channels"] = rng.random()
            bits = (kinds == "weight_bits") | (kinds == "act_bits")
            point[bits] = rng.random()
            if index % 2:
                point[bits & outer] = 1.0
        found.append(space.decode(point))
    return found

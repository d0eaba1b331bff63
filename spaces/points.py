"""Where an integer network holds 8-bit tensors.

One rule, used by the compressor that simulates them, the exporter that writes them and the devices that cost them:

- a layer is an *integer layer* where both its weights and activations have 8 bits or less;
- the tensor that an integer layer reads, and the one that it writes (behind its fused ReLU, where there is one), are
  *points*: held as unsigned 8-bit codes with one static scale and zero point;
- an integer layer below 8 activation bits reads its point coarser, with its own step; the point itself stays at 8 bits;
- operators that only move values (pooling by maximum, reshapes, transposes) keep the range of what they read.

Every other operator computes in floating point on what its points decode to.
"""

from tightrope.spaces.network import Network, Op
from tightrope.spaces.policy import Choice, Policy

MOVERS = frozenset(
    "view reshape flatten unflatten permute transpose t squeeze unsqueeze max_pool2d contiguous clone dropout slice select "
    "expand identity getitem split chunk unbind channel_shuffle pixel_shuffle pixel_unshuffle roll flip detach alias".split()
)
FUSED = frozenset({"relu", "relu6"})


def is_integer(choice: Choice) -> bool:
    """Whether a layer under this choice multiplies integers."""
    return choice.weight_bits <= 8 and choice.act_bits <= 8


def consumers(network: Network) -> dict[str, list[Op]]:
    """The operators that read each operator's tensor."""
    found: dict[str, list[Op]] = {}
    for op in network.ops:
        for name in dict.fromkeys(op.inputs):
            found.setdefault(name, []).append(op)
    return found


def written(network: Network) -> dict[str, str]:
    """For each layer operator, the operator whose tensor it hands on: its fused activation, or itself."""
    readers = consumers(network)
    found = {}
    for op in network.ops:
        if op.kind == "layer":
            after = readers.get(op.name, [])
            found[op.name] = after[0].name if len(after) == 1 and after[0].kind in FUSED else op.name
    return found


def points(network: Network, policy: Policy) -> frozenset[str]:
    """Names of the operators (`input` for a model's input) whose tensors are held as 8-bit codes."""
    behind = written(network)
    found = set()
    for op in network.ops:
        if op.kind == "layer" and is_integer(policy.choice(op.layer)):
            found |= {op.inputs[0], behind[op.name]}
    return frozenset(found)

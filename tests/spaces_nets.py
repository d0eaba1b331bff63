"""Small networks written by hand, and hypothesis strategies for policies and networks."""

from hypothesis import strategies as st

from tightrope.spaces import Choice, Extent, Group, Layer, Network, Op, Parameter, Policy
from tightrope.spaces.network import forms, full_rank


def chain() -> Network:
    """conv 3x3 -> relu -> depthwise 3x3 -> 1x1 -> flatten (4x4 map) -> linear; groups a of 8 and b of 16."""
    one, a, b, size = Extent(1), Extent(0, (("a", 1),)), Extent(0, (("b", 1),)), (4, 4)
    conv = Layer("conv", "conv", Extent(3), a, (3, 3), padding=(1, 1), in_size=size, out_size=size, activation="relu")
    depth = Layer("depth", "depthwise", a, a, (3, 3), padding=(1, 1), groups=8, in_size=size, out_size=size, bias=False)
    point = Layer("point", "conv", a, b, in_size=size, out_size=size)
    flat = Extent(0, (("b", 16),))
    head = Layer("head", "linear", flat, Extent(10))
    four = (Extent(4), Extent(4))
    ops = (
        Op("input", "input", (), (one, Extent(3), *four)),
        Op("conv", "layer", ("input",), (one, a, *four), "conv"),
        Op("relu", "relu", ("conv",), (one, a, *four)),
        Op("depth", "layer", ("relu",), (one, a, *four), "depth"),
        Op("point", "layer", ("depth",), (one, b, *four), "point"),
        Op("gelu", "gelu", ("point",), (one, b, *four)),
        Op("flat", "flatten", ("gelu",), (one, flat)),
        Op("head", "layer", ("flat",), (one, Extent(10)), "head"),
    )
    return Network((conv, depth, point, head), (Group("a", 8), Group("b", 16)), ops, (Parameter("scale", (b,)),))


BITS = st.sampled_from((2, 3, 4, 5, 6, 7, 8, 32))


@st.composite
def policies(draw: st.DrawFn, network: Network) -> Policy:
    """Any policy that a model with this network can satisfy."""
    widths = {g.name: draw(st.integers(1, g.width)) for g in network.groups if draw(st.booleans())}
    choices = {}
    for layer in network.layers:
        able = forms(layer)
        form = draw(st.sampled_from(("", *able)))
        rank = draw(st.integers(1, full_rank(layer, form, {**network.widths, **widths}))) if form else None
        choices[layer.name] = Choice(draw(BITS), draw(BITS), rank, form)
    return Policy.make(network, widths, choices)


@st.composite
def networks(draw: st.DrawFn) -> Network:
    """A chain of layers of any kind and width, each reading what the one before writes."""
    names = st.text("abcxyz._#0123456789éß", min_size=1, max_size=12)
    count = draw(st.integers(1, 5))
    layer_names = draw(st.lists(names, min_size=count, max_size=count, unique=True))
    groups = tuple(Group(f"{name}+", draw(st.integers(1, 64))) for name in layer_names)
    before, layers = Extent(draw(st.integers(1, 4))), []
    pair = st.tuples(st.integers(1, 3), st.integers(1, 3))
    for name, group in zip(layer_names, groups, strict=True):
        after = Extent(draw(st.integers(0, 2)), ((group.name, draw(st.integers(1, 3))),))
        kind = draw(st.sampled_from(("conv", "linear")))
        kernel = draw(pair) if kind == "conv" else (1, 1)
        layers.append(
            Layer(name, kind, before, after, kernel, draw(pair), draw(pair), draw(pair), 1, draw(pair), draw(pair),
                  draw(st.booleans()),
                  draw(st.integers(1, 3)), draw(st.sampled_from(("", "relu", "relu6"))), draw(st.text(max_size=9)))
        )  # fmt: skip
        before = after
    ops = tuple(Op(x.name, "layer", ("input",), (Extent(1), x.outputs), x.name, draw(st.sampled_from((1, 4, 8)))) for x in layers)
    return Network(tuple(layers), groups, ops, (Parameter("p", (before, Extent(3))),) if draw(st.booleans()) else ())

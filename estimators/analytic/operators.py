"""What the operators between the layers are: free, cheap, or products that an array must compute; an unknown one is an error."""

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from tightrope.spaces.errors import DeviceError
from tightrope.spaces.fields import nearest
from tightrope.spaces.network import Extent, Network, Op

Sort = Literal["layer", "view", "unary", "elementwise", "reduce", "matmul"]

_KINDS: dict[Sort, str] = {
    "view": """input placeholder parameter buffer constant get_attr output view reshape _unsafe_view view_as reshape_as flatten
        unflatten squeeze unsqueeze expand expand_as contiguous clone alias detach lift_fresh lift_fresh_copy getitem identity
        dropout alpha_dropout feature_dropout stochastic_depth to _to_copy type_as float half double bfloat16 sym_size sym_numel
        numel sym_constrain_range_for_size size arange zeros ones full zeros_like ones_like full_like empty new_zeros new_ones
        scalar_tensor tensor linspace select slice narrow split split_with_sizes chunk unbind assert_tensor_metadata
        _assert_tensor_metadata new_full unsafe_split unsafe_chunk diagonal sym_min sym_max sym_float sym_sum sym_not sym_ite
        truediv permute transpose t numpy_T mT movedim swapaxes floordiv mod""",
    "unary": """relu relu6 relu_ leaky_relu prelu elu celu selu gelu silu swish mish softplus softsign hardtanh hardswish
        hardsigmoid sigmoid logsigmoid log_sigmoid tanh tanhshrink clamp clamp_min clamp_max abs neg exp log sqrt rsqrt square
        reciprocal erf sin cos sign round floor ceil pow batch_norm _native_batch_norm_legit_no_training logical_not bitwise_not
        masked_fill log1p expm1 log2 log10 rrelu hardshrink softshrink threshold isnan isinf isfinite nan_to_num trunc frac""",
    "elementwise": """add sub rsub mul div true_divide floor_divide remainder maximum minimum where addcmul addcdiv lerp atan2 eq
        ne lt le gt ge logical_and logical_or logical_xor bitwise_and bitwise_or bitwise_xor __and__ __or__ __xor__ fmod outer ger
        bucketize scatter_add index_add slice_scatter select_scatter fold col2im cat concat stack pad constant_pad_nd
        reflection_pad1d reflection_pad2d replication_pad2d repeat repeat_interleave tile roll flip pixel_shuffle
        pixel_unshuffle channel_shuffle native_channel_shuffle index index_select gather embedding scatter index_put copy
        upsample_nearest1d upsample_nearest2d upsample_bilinear2d upsample_linear1d upsample_bicubic2d interpolate tril triu
        unfold im2col one_hot masked_select fill glu""",
    "reduce": """max_pool1d max_pool2d max_pool2d_with_indices avg_pool1d avg_pool2d adaptive_avg_pool1d adaptive_avg_pool2d
        adaptive_max_pool1d adaptive_max_pool2d lp_pool2d mean sum amax amin max min any all argmax argmin var std var_mean
        logsumexp norm linalg_vector_norm prod cumsum cummax softmax _softmax _safe_softmax softmin log_softmax _log_softmax
        layer_norm native_layer_norm group_norm native_group_norm instance_norm rms_norm local_response_norm topk sort""",
    "matmul": "matmul bmm mm addmm baddbmm scaled_dot_product_attention",
}  # fmt: skip
_SORTS: dict[str, Sort] = {name: sort for sort, names in _KINDS.items() for name in names.split()} | {"layer": "layer"}


def sort_of(op: Op) -> Sort:
    """The sort of an operator.

    Raises:
        DeviceError: no analytic model knows the operator, so that its cost would silently be nothing.
    """
    found = _SORTS.get(op.kind)
    if found is None:
        raise DeviceError(
            f"operator {op.name!r} is a {op.kind!r}, which the analytic models cannot cost{nearest(op.kind, _SORTS)}; "
            "take a measured device, or leave the operator out of the model"
        )
    return found


@dataclass(frozen=True, slots=True)
class Product:
    """A product of two activations, `calls` times `m x k` by `k x n`, at 8 bits each side: half an attention block, say."""

    op: str
    calls: tuple[Extent, ...]
    m: Extent
    k: Extent
    n: Extent


def products(network: Network) -> list[Product]:
    """The products of activations in a network, in the order of its operators."""
    shapes = {op.name: op.shape for op in network.ops}
    found: list[Product] = []
    for op in network.ops:
        if sort_of(op) != "matmul":
            continue
        inputs = op.inputs[1:] if op.kind in ("addmm", "baddbmm") else op.inputs
        sides = [shapes.get(name, ()) for name in inputs]
        whole = 3 if op.kind == "scaled_dot_product_attention" else 1
        if len(sides) < whole or any(len(side) < 2 for side in (*sides[:whole], op.shape)):
            raise DeviceError(f"operator {op.name!r} ({op.kind}) needs the shapes of its inputs to be costed, got {sides}")
        left = sides[0]
        if whole == 3:  # softmax(q k^T) v
            found.append(Product(op.name, left[:-2], left[-2], left[-1], sides[1][-2]))
            found.append(Product(op.name, left[:-2], left[-2], sides[1][-2], sides[2][-1]))
        else:
            found.append(Product(op.name, op.shape[:-2], op.shape[-2], left[-1], op.shape[-1]))
    return found


def readers(network: Network) -> dict[str, list[Op]]:
    """Which operators read each tensor."""
    found: dict[str, list[Op]] = {}
    for op in network.ops:
        for name in dict.fromkeys(op.inputs):
            found.setdefault(name, []).append(op)
    return found


def fused(network: Network) -> frozenset[str]:
    """Operators that change values in place behind a layer that nobody else reads: an activation, a folded norm."""
    by_name, found = {op.name: op for op in network.ops}, set()
    reading = readers(network)
    for op in network.ops:
        if sort_of(op) == "unary" and op.inputs:
            source = by_name.get(op.inputs[0])
            if source is not None and (source.kind == "layer" or source.name in found) and len(reading[source.name]) == 1:
                found.add(op.name)
    return frozenset(found)


def uncosted(network: Network) -> str:
    """The operators that a model of layers alone leaves out, in words; empty where there are none."""
    inside = fused(network)
    counts = Counter(op.kind for op in network.ops if op.name not in inside and sort_of(op) in ("unary", "elementwise", "reduce"))
    return ", ".join(f"{kind} x{count}" for kind, count in sorted(counts.items()))

"""A model as a graph of plain operators, with every compressible layer as a module of its own.

`torch.export` gives the graph of ATen operators. Here convolutions and linear layers of it become calls of `nn.Conv2d` and
`nn.Linear` modules that stand at the paths of the original model, batch norms behind them are folded in, and what does
nothing in evaluation is taken out. The result is an ordinary, trainable `fx.GraphModule`: the skeleton.
"""

import contextlib
import copy
import hashlib
import io
import logging
import operator
import sysconfig
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from tightrope.spaces.errors import TraceError

log = logging.getLogger(__name__)
aten = torch.ops.aten
Inputs = Any  # a tensor, a tuple of positional arguments or a dict of keyword arguments


def arguments(example_inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a model: from a tensor, a tuple or list of positional ones, or a dict."""
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    raise TraceError(f"example_inputs must be a tensor, a tuple or a dict of them, got {type(example_inputs).__name__}")


def at_least_two(value: Any) -> Any:
    """The same inputs with a batch of two or more, so that export keeps the batch free."""
    if isinstance(value, Tensor) and value.dim() and value.shape[0] == 1:
        return value.repeat(2, *[1] * (value.dim() - 1))
    return value


def capture(model: nn.Module, example_inputs: Inputs) -> fx.GraphModule:
    """Return the skeleton of a model in evaluation mode; the model and its weights are left as they were.

    The skeleton takes the model's own arguments and returns what it returns, at any batch size where the model allows
    that. `skeleton.meta["batch"]` is None then, and the one batch size that it runs at otherwise; `skeleton.meta["model"]` is
    the model's checksum.

    Raises:
        TraceError: the model cannot be exported; the message names the operator or line that stopped it.
    """
    args, kwargs = arguments(example_inputs)
    digest, original = checksum(model), model
    model = copy.deepcopy(model).eval().requires_grad_(False)
    wide_args, wide_kwargs = tuple(map(at_least_two, args)), {k: at_least_two(v) for k, v in kwargs.items()}
    program, batch = _export(model, wide_args, wide_kwargs, dynamic=True), None
    if program is not None:
        free = _free_batch(program) and _runs_at_another_batch(program.module(check_guards=False), wide_args, wide_kwargs)
        program = program if free else None
    if program is None:
        model = copy.deepcopy(original).eval().requires_grad_(False)  # an export that fails leaves its traces
        program = _export(model, args, kwargs, dynamic=False)
        batch = next((int(v.shape[0]) for v in [*args, *kwargs.values()] if isinstance(v, Tensor) and v.dim()), 1)
        log.warning("the model fixes its batch size: it is traced at %d and must be run at that", batch)
    assert program is not None
    graph: fx.GraphModule = program.module(check_guards=False)
    inline(graph)
    functional(graph)
    tidy(graph)
    layerise(graph)
    fold_batch_norms(graph)
    graph.graph.eliminate_dead_code()
    graph.delete_all_unused_submodules()
    _drop_unused_tensors(graph)
    graph.graph.lint()
    graph.recompile()
    graph.meta["batch"], graph.meta["model"] = batch, digest
    graph.requires_grad_(True)
    return graph


def checksum(model: nn.Module) -> str:
    """Sixteen hexadecimal digits over all parameters and buffers of a model."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, dynamic: bool) -> Any:
    def free(value: Any) -> Any:
        return {0: torch.export.Dim.AUTO} if isinstance(value, Tensor) and value.dim() else None

    shapes = (*map(free, args), *map(free, kwargs.values())) if dynamic else None
    if dynamic and kwargs:
        shapes = ({k: free(v) for k, v in kwargs.items()}) if not args else shapes  # type: ignore[assignment]
    fast = torch.backends.mha.get_fastpath_enabled()
    level = logging.root.manager.disable
    try:
        logging.disable(logging.CRITICAL)  # torch logs whole graphs on the way to an error
        torch.backends.mha.set_fastpath_enabled(False)
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()), torch.enable_grad():
            warnings.simplefilter("ignore")
            return torch.export.export(model, args, kwargs or None, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        if dynamic:
            return None
        where = _line_of(error)
        raise TraceError(
            f"the model cannot be traced{where}: {str(error).strip().splitlines()[0][:300]}; "
            "make its control flow independent of the values of tensors, or pass other example_inputs"
        ) from error
    finally:
        logging.disable(level)
        torch.backends.mha.set_fastpath_enabled(fast)


def _line_of(error: BaseException) -> str:
    """The innermost line outside of torch that an error passed through."""
    place, trace, library = "", error.__traceback__, sysconfig.get_path("stdlib")
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        inside = "torch" in file.split("/") or file == __file__ or file.startswith("<")
        if not inside and ("site-packages" in file or not file.startswith(library)):
            place = f" at {file}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place


def _runs_at_another_batch(graph: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether one example more goes through: the exporter does not see every size that a model spells out."""

    def more(value: Any) -> Any:
        return torch.cat([value, value[:1]]) if isinstance(value, Tensor) and value.dim() else value

    try:
        with torch.no_grad():
            graph(*map(more, args), **{k: more(v) for k, v in kwargs.items()})
    except (RuntimeError, ValueError, IndexError, AssertionError) as error:
        log.debug("the graph does not run at another batch: %s", error)
        return False
    return True


def _free_batch(program: Any) -> bool:
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and node.name in program.graph_signature.user_inputs and isinstance(value, Tensor):
            return value.dim() == 0 or isinstance(value.shape[0], torch.SymInt)
    return False


def base(node: fx.Node) -> str:
    """The plain name of an operator: `conv2d` of `aten.conv2d.default`, `layer` of a layer's module; else ``."""
    if node.op == "call_module":
        return "layer"
    if node.op != "call_function":
        return ""
    packet = getattr(node.target, "_schema", None)
    return str(packet.name).split("::")[1] if packet is not None else str(getattr(node.target, "__name__", ""))


WRAPPERS = frozenset({"wrap_with_set_grad_enabled", "wrap_with_autocast"})


def inline(graph: fx.GraphModule) -> None:
    """Put the operators of a region without gradients or with autocast, which is a graph of its own, in its place."""
    while wrapped := [n for n in graph.graph.nodes if n.op == "call_function" and base(n) in WRAPPERS]:
        for node in wrapped:
            at, holder = next((i, a) for i, a in enumerate(node.args) if isinstance(a, fx.Node) and a.op == "get_attr")
            inner, given = tensor_of(graph, str(holder.target)), iter(node.args[at + 1 :])
            known: dict[fx.Node, Any] = {}
            with graph.graph.inserting_before(node):
                for each in inner.graph.nodes:
                    if each.op == "placeholder":
                        known[each] = next(given)
                    elif each.op != "output":
                        known[each] = graph.graph.node_copy(each, known.__getitem__)
                        if each.op == "get_attr":
                            known[each].target = f"{holder.target}.{each.target}"
            made = fx.map_arg(inner.graph.output_node().args[0], known.__getitem__)
            for user in list(node.users):
                user.replace_all_uses_with(made[user.args[1]])
                graph.graph.erase_node(user)
            graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()


def functional(graph: fx.GraphModule) -> None:
    """Replace operators that write in place by those that return, and hand what they return to later readers."""
    nodes = list(graph.graph.nodes)
    for index, node in enumerate(nodes):
        name = base(node)
        if not name.endswith("_") or name.startswith("_") or not hasattr(aten, name[:-1]):
            continue
        packet = getattr(aten, name[:-1])
        overload = node.target._schema.overload_name or "default"
        if not hasattr(packet, overload):
            continue
        node.target = getattr(packet, overload)
        changed, later = node.args[0], set(nodes[index + 1 :])
        changed.replace_all_uses_with(node, delete_user_cb=lambda user, later=later: user in later)


def tidy(graph: fx.GraphModule) -> None:
    """Take out what does nothing in evaluation: dropout, assertions, guards."""
    for node in list(graph.graph.nodes):
        name = base(node)
        if name in ("dropout", "feature_dropout", "alpha_dropout", "detach", "alias", "lift_fresh_copy", "detach_"):
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
        elif name == "scaled_dot_product_attention" and node.kwargs.get("scale") is None and len(node.args) < 7:
            node.kwargs = {**node.kwargs, "scale": float(node.args[0].meta["val"].shape[-1]) ** -0.5}
        elif name in ("split", "chunk") and isinstance(node.meta.get("val"), (list, tuple)):
            _spell_out(graph, node)
        elif name.startswith("_assert") or (node.op == "call_module" and "_guards" in str(node.target)):
            graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()


def _spell_out(graph: fx.GraphModule, node: fx.Node) -> None:
    """Give a split its sizes, so that parts of unequal size can follow."""
    dim = _argument(node, 2, "dim", 0)
    sizes = [part.shape[dim] for part in node.meta["val"]]
    if all(isinstance(size, int) for size in sizes):
        node.target, node.args, node.kwargs = aten.split_with_sizes.default, (node.args[0], sizes, dim), {}


def tensor_of(graph: fx.GraphModule, target: str) -> Any:
    """The parameter or buffer at a dotted path."""
    found: Any = graph
    for name in target.split("."):
        found = getattr(found, name)
    return found


def is_tensor(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "get_attr"


def _argument(node: fx.Node, index: int, name: str, default: Any) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def layerise(graph: fx.GraphModule) -> None:
    """Turn convolutions and linear layers whose weights are parameters into calls of modules at the parameters' paths."""
    users: dict[str, int] = {}
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            users[node.target] = users.get(node.target, 0) + len(node.users)
    made: dict[tuple[Any, ...], str] = {}
    for node in list(graph.graph.nodes):
        parts = _layer_parts(graph, node)
        if parts is None:
            continue
        source, weight, bias, build, lift = parts
        name = weight.target.removesuffix(".weight").removesuffix("_weight")
        key = (weight.target, None if bias is None else bias.target, str(node.target), str(node.args[3:]))
        if key in made:
            name = made[key]
        elif weight.target in made.values() or any(k[0] == weight.target for k in made):
            continue  # one weight used in two ways (a tied embedding): left as an operator, not compressed
        else:
            if users[weight.target] > sum(base(u) == base(node) for u in weight.users):
                continue
            made[key] = name
            place(graph, name, build())
        with graph.graph.inserting_before(node):
            if lift:
                source = _with_value(graph.graph.call_function(aten.unsqueeze.default, (source, 2)), source, lift)
            call = _with_value(graph.graph.call_module(name, (source,)), node, lift)
            if lift:
                call = _with_value(graph.graph.call_function(aten.squeeze.dim, (call, 2)), node)
        node.replace_all_uses_with(call)
        graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()


def _with_value(made: fx.Node, like: fx.Node, lift: bool = False) -> fx.Node:
    """Give a new node the fake value of another, which tells which of its sizes follow the batch."""
    value = like.meta.get("val")
    if isinstance(value, Tensor):
        made.meta["val"] = value.unsqueeze(2) if lift else value
    return made


def _layer_parts(graph: fx.GraphModule, node: fx.Node) -> Any:
    """`(input, weight, bias, build, lift)` of an operator that is a layer, else None; `lift` marks one-dimensional ones."""
    name = base(node)
    source: Any
    weight: Any
    bias: Any
    if name in ("conv2d", "conv1d", "linear"):
        source, weight, bias = node.args[0], node.args[1], _argument(node, 2, "bias", None)
    elif name == "addmm":
        bias, source, weight = node.args[:3]
    else:
        return None
    if not is_tensor(weight) or (bias is not None and not is_tensor(bias)):
        return None
    w = tensor_of(graph, weight.target).detach()
    b = None if bias is None else tensor_of(graph, bias.target).detach()
    if not w.is_floating_point() or (b is not None and b.dim() != 1):
        return None
    if name in ("linear", "addmm"):
        matrix = w if name == "linear" else w.t()
        if matrix.dim() != 2:
            return None

        def linear() -> nn.Module:
            layer = nn.Linear(matrix.shape[1], matrix.shape[0], b is not None, device="meta")
            return _fill(layer, matrix, b)

        return source, weight, bias, linear, False
    stride, padding, dilation = (
        _argument(node, 3, "stride", 1),
        _argument(node, 4, "padding", 0),
        _argument(node, 5, "dilation", 1),
    )
    groups = _argument(node, 6, "groups", 1)
    one = name == "conv1d"
    kernel = (1, w.shape[2]) if one else tuple(w.shape[2:])

    def pair(value: Any, fill: int) -> tuple[int, int]:
        values = [value] if isinstance(value, int) else list(value)
        if one:
            return fill, values[0]
        return (values[0], values[0]) if len(values) == 1 else (values[0], values[1])

    dilations = pair(dilation, 1)
    if isinstance(padding, str):
        spans = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
        if padding == "same" and any(s % 2 for s in spans):
            return None
        pads = (0, 0) if padding == "valid" else (spans[0] // 2, spans[1] // 2)
    else:
        pads = pair(padding, 0)
    strides = pair(stride, 1)

    def conv() -> nn.Module:
        shaped = w.unsqueeze(2) if one else w
        layer = nn.Conv2d(
            shaped.shape[1] * groups, shaped.shape[0], kernel, strides, pads, dilations, groups, b is not None, device="meta"
        )
        return _fill(layer, shaped, b)

    return source, weight, bias, conv, one


def _fill(layer: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
    layer.weight = nn.Parameter(weight.clone().contiguous())
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone())
    made: nn.Module = layer.eval()
    return made


def place(root: nn.Module, path: str, module: nn.Module) -> None:
    """Set a module at a dotted path, making what is missing on the way."""
    *parents, last = path.split(".")
    for name in parents:
        if not isinstance(getattr(root, name, None), nn.Module):
            root.add_module(name, nn.Module())
        root = getattr(root, name)
    if hasattr(root, last) and not isinstance(getattr(root, last), nn.Module):
        delattr(root, last)
    root.add_module(last, module)


def fold_batch_norms(graph: fx.GraphModule) -> None:
    """Fold each batch norm into the layer before it, where it is that layer's only reader.

    y = (Wx + b - mean) * gamma / sqrt(var + eps) + beta, so W *= gamma / sqrt(var + eps) per output channel. The names of
    the layers that held one are kept in `graph.meta["normed"]`.
    """
    graph.meta["normed"] = []
    calls: dict[str, int] = {}
    for node in graph.graph.nodes:
        if node.op == "call_module":
            calls[node.target] = calls.get(node.target, 0) + 1
    for node in list(graph.graph.nodes):
        if base(node) not in ("batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm"):
            continue
        before = node.args[0]
        if before.op != "call_module" or len(before.users) != 1 or calls[before.target] > 1:
            continue
        tensors = [None if a is None else tensor_of(graph, a.target).detach().double() for a in node.args[1:5]]
        gamma, beta, mean, var = tensors
        eps = float(node.args[6] if base(node) != "batch_norm" else node.args[7])
        layer: Any = graph.get_submodule(before.target)
        if mean is None or var is None:
            continue
        scale = (var + eps).rsqrt() * (1 if gamma is None else gamma)
        old = 0 if layer.bias is None else layer.bias.detach().double()
        weight = layer.weight.detach().double() * scale.reshape(-1, *[1] * (layer.weight.dim() - 1))
        graph.meta["normed"].append(str(before.target))
        layer.weight = nn.Parameter(weight.float())
        layer.bias = nn.Parameter(((old - mean) * scale + (0 if beta is None else beta)).float())
        users = list(node.users)
        if base(node) != "batch_norm":
            for user in users:
                if user.target is operator.getitem and user.args[1] == 0:
                    user.replace_all_uses_with(before)
                    graph.graph.erase_node(user)
        else:
            node.replace_all_uses_with(before)
        graph.graph.erase_node(node)


def _drop_unused_tensors(graph: fx.GraphModule) -> None:
    """Remove parameters and buffers that no operator reads any more."""
    used = {node.target for node in graph.graph.nodes if node.op == "get_attr"}
    layers = {node.target for node in graph.graph.nodes if node.op == "call_module"}
    for path, module in list(graph.named_modules()):
        if path in layers:
            continue
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, _ in own:
            if (f"{path}.{name}" if path else name) not in used:
                delattr(module, name)
    for path, module in sorted(graph.named_modules(), key=lambda item: -item[0].count(".")):
        empty = not list(module.children()) and not list(module.parameters()) and not list(module.buffers())
        if path and path not in layers and empty:
            graph.delete_submodule(path)

"""Writing a compressed model down: ONNX for ONNX Runtime, packed safetensors for everything else."""

from pathlib import Path
from typing import TYPE_CHECKING

from tightrope.spaces.errors import ExportError

if TYPE_CHECKING:
    from torch import fx


def export(small: "fx.GraphModule", path: str | Path, *, device: str = "ort-cpu", batch: int = 1) -> Path:
    """Write a module that `compress` made, fine-tuned or not; returns the path.

    `.onnx` files are for ONNX Runtime: every layer that the policy makes an integer layer is asserted to run as one. What it
    cannot run is refused: such policies go to `.safetensors`, packed at their true bits (`packed.py`). For `torch-cpu` that file
    holds the graph too, and `load` makes a module of it that runs on the compiled kernels.

    Args:
        batch: static batch size of an ONNX file.

    Raises:
        ExportError: the suffix is neither, the device does not take ONNX files, or an integer layer would run in floating point.
    """
    from tightrope.compressors.compress import origin, payload_of

    path = Path(path)
    payload = payload_of(small)
    if path.suffix == ".safetensors":
        if device == "torch-cpu":
            from tightrope.compressors.runtime.load import save

            save(origin(small).prepared, payload, path)
        else:
            from tightrope.compressors.export.packed import write_packed

            write_packed(payload, path)
        return path
    if path.suffix != ".onnx":
        raise ExportError(f"an exported file ends in .onnx or .safetensors, got {path.name!r}")
    if device != "ort-cpu":
        raise ExportError(f"device {device!r} takes no ONNX file that runs as the policy says; export .safetensors for it")
    from tightrope.compressors.export.onnx import check, write
    from tightrope.compressors.export.skeleton import skeleton_of
    from tightrope.spaces.policy import write_atomically

    prepared = origin(small).prepared
    network = prepared.network
    model = write(skeleton_of(prepared).at(payload.policy.all_widths(network), batch), network, payload)
    check(model, network, payload.policy)
    write_atomically(path, model.SerializeToString())
    return path

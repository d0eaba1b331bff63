"""Devices by name: our own, simulated ones by their profiles, and those of plug-ins."""

import importlib
from importlib.metadata import entry_points
from pathlib import Path

from tightrope.estimators.analytic import load_profile, profiles
from tightrope.estimators.cache import store
from tightrope.estimators.device import Device
from tightrope.spaces.errors import DeviceError
from tightrope.spaces.fields import nearest

_MEASURED = {
    "ort-cpu": "tightrope.estimators.measured.ort:OrtCpu", "torch-cpu": "tightrope.estimators.measured.torch_cpu:TorchCpu",
}  # fmt: skip


def _plugged() -> dict[str, str]:
    return {entry.name: entry.value for entry in entry_points(group="tightrope.estimators")}


def _imported() -> list[str]:
    return sorted({path.parent.name for path in store().glob("*/*.jsonl")})


def names() -> list[str]:
    """All devices: measured ones, those elsewhere whose tables were imported, plug-ins' (entry points of group
    `tightrope.estimators`), simulated ones."""
    return [*_MEASURED, *_imported(), *_plugged(), *profiles()]


def summary(name: str) -> tuple[str, str]:
    """`measured`, `imported`, `plug-in` or `simulated`, and what the device tells."""
    kind = (
        "measured" if name in _MEASURED else "imported" if name in _imported() else "plug-in" if name in _plugged() else "simulated"
    )
    return kind, ", ".join(sorted(make(name).metrics))


def make(name: str, *, batch: int = 1) -> Device:
    """The device of this name, or of the path of a profile that ends in `.yaml`.

    Raises:
        DeviceError: there is none; the message names the nearest.
    """
    where = _MEASURED.get(name) or _plugged().get(name)
    if where is not None:
        module, _, attribute = where.partition(":")
        made: Device = getattr(importlib.import_module(module), attribute)(batch=batch)
        return made
    if name in _imported():
        from tightrope.estimators.measured.imported import Imported

        return Imported(name, batch)
    if name not in profiles() and not (name.endswith((".yaml", ".yml")) and Path(name).exists()):
        raise DeviceError(f"there is no device {name!r}{nearest(name, names())}; there are {', '.join(names())}")
    return load_profile(name, batch=batch)

"""Simulated devices: one model a file, one YAML profile a device (`estimators/profiles`)."""

from importlib import import_module
from pathlib import Path

from tightrope.estimators.analytic.profile import FOLDER, read
from tightrope.estimators.analytic.simulated import Simulated
from tightrope.spaces.errors import DeviceError
from tightrope.spaces.fields import nearest

_MODELS = {
    "bitfusion": "tightrope.estimators.analytic.bitfusion:BitFusion",
    "bitserial": "tightrope.estimators.analytic.bitserial:BitSerial",
    "systolic": "tightrope.estimators.analytic.systolic:Systolic",
    "spatial": "tightrope.estimators.analytic.spatial:Spatial",
    "roofline": "tightrope.estimators.analytic.roofline:Roofline",
    "microcontroller": "tightrope.estimators.analytic.mcu:Microcontroller",
}


def profiles() -> list[str]:
    """Names of the simulated devices that come with Tightrope."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_profile(name: str | Path, *, batch: int = 1) -> Simulated:
    """The simulated device of a profile: one of `profiles()`, or the path of a `.yaml` file of your own.

    Raises:
        DeviceError: no such profile, or one that cannot be believed; the message names the field.
    """
    own = str(name).endswith((".yaml", ".yml"))
    if not own and name not in profiles():
        raise DeviceError(f"there is no profile {str(name)!r}{nearest(str(name), profiles())}; there are {', '.join(profiles())}")
    profile = read(Path(name) if own else FOLDER / f"{name}.yaml")
    if profile.model not in _MODELS:
        raise DeviceError(f"{profile.where}: model must be one of {', '.join(_MODELS)}, got {profile.model!r}")
    module, kind = _MODELS[profile.model].split(":")
    return Simulated(profile, profile.build(getattr(import_module(module), kind)), batch)

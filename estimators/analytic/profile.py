"""Profiles: the numbers of a simulated device as a YAML file, every constant with its unit and its source."""

import dataclasses
import math
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from tightrope.spaces.errors import DeviceError, FormatError
from tightrope.spaces.fields import Fields, nearest

VERSION = 1
FOLDER = Path(__file__).parents[1] / "profiles"
M = TypeVar("M")


@dataclass(frozen=True, slots=True)
class Constant:
    """One number of a profile, or a table of names to numbers, with its unit and where it comes from."""

    value: int | float | str | dict[str, float]
    unit: str
    source: str


@dataclass(frozen=True)
class Profile:
    """One file, checked. `calibrated` says that its figures were compared with a device or a public simulator."""

    name: str
    model: str
    title: str
    calibrated: bool
    notes: tuple[str, ...]
    constants: dict[str, Constant]
    where: str

    def build(self, model: type[M]) -> M:
        """The model with these constants, which must be the fields of `model`, no more and no fewer."""
        fields = {f.name: f for f in dataclasses.fields(model)}  # type: ignore[arg-type]
        hints = typing.get_type_hints(model)
        for name in self.constants:
            if name not in fields:
                raise DeviceError(f"{self.where}: constants.{name} is not known{nearest(name, fields)}")
        values = {}
        for name, field in fields.items():
            if name in self.constants:
                values[name] = _value(self.constants[name].value, hints[name], f"{self.where}: constants.{name}.value")
            elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                raise DeviceError(f"{self.where}: constants.{name} is missing")
        try:
            return model(**values)
        except DeviceError as error:
            raise DeviceError(f"{self.where}: {error}") from None


def read(path: Path) -> Profile:
    """Read a profile.

    Raises:
        DeviceError: the file is missing or not YAML, or a field is missing, unknown or out of range; the message names it.
    """
    try:
        top = Fields(yaml.safe_load(path.read_text(encoding="utf-8")), path.name)
        top.only("version", "name", "model", "title", "calibrated", "notes", "constants")
        top.version(VERSION)
        constants = {}
        for name, value in top.items("constants"):
            entry = Fields(value, f"{path.name}: constants.{name}")
            entry.only("value", "unit", "source")
            source = entry.take("source", str)
            if not source.strip():
                raise DeviceError(f"{path.name}: constants.{name}.source must say where the number comes from, got nothing")
            constants[name] = Constant(entry.take("value", (int, float, str, dict)), entry.take("unit", str), source)
        notes = top.take("notes", list, [])
        if not all(isinstance(note, str) for note in notes):
            raise DeviceError(f"{path.name}: notes must be a list of sentences, got {notes!r}")
        return Profile(
            top.take("name", str), top.take("model", str), top.take("title", str), top.take("calibrated", bool),
            tuple(notes), constants, path.name,
        )  # fmt: skip
    except OSError as error:
        raise DeviceError(f"profile {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise DeviceError(f"profile {path} is not UTF-8 text") from None
    except yaml.YAMLError as error:
        raise DeviceError(f"profile {path} is not YAML: {' '.join(str(error).split())}") from None
    except FormatError as error:
        raise DeviceError(str(error)) from None


def _value(value: Any, kind: Any, where: str) -> Any:
    """Check one constant against the type of its field: numbers are finite and greater than 0."""
    if typing.get_origin(kind) is dict:
        inner = typing.get_args(kind)[1]
        if not isinstance(value, dict) or not value:
            raise DeviceError(f"{where} must be a table of names to numbers, got {value!r}")
        return {str(k): _value(v, inner, f"{where}.{k}") for k, v in value.items()}
    if kind is str:
        if not isinstance(value, str):
            raise DeviceError(f"{where} must be text, got {value!r}")
        return value
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0
    if not number or (kind is int and value != int(value)):
        what = "a whole number of at least 1" if kind is int else "a number greater than 0"
        raise DeviceError(f"{where} must be {what}, got {value!r}")
    return kind(value)

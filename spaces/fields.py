"""Reading JSON with care: every value is checked before it is believed, and an error names the field."""

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from tightrope.spaces.errors import FormatError

T = TypeVar("T")


class Fields:
    """One JSON object that knows where it stands, for errors such as `policy.json: layers.conv1.rank must be ...`."""

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, Mapping):
            raise FormatError(f"{where} must be a JSON object, got {type(value).__name__}")
        self._value: Mapping[str, Any] = value
        self.where = where

    def __iter__(self) -> Iterator[str]:
        return iter(self._value)

    def take(self, key: str, kind: type[T] | tuple[type, ...], default: object = ...) -> Any:
        """Return the value of `key`, which must be of `kind`; without it, `default`, or an error if there is none."""
        if key not in self._value:
            if default is ...:
                raise FormatError(f"{self.where}.{key} is missing")
            return default
        value = self._value[key]
        if type(value) is kind:
            return value
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if (isinstance(value, bool) and bool not in kinds) or not isinstance(value, kinds):
            if float in kinds and isinstance(value, int) and not isinstance(value, bool):
                return float(value)
            names = " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
            raise FormatError(f"{self.where}.{key} must be {names}, got {value!r}")
        return value

    def ints(self, key: str, length: int | None = None) -> tuple[int, ...]:
        values = self.take(key, list)
        if not {*map(type, values)} <= {int} or length not in (None, len(values)):
            size = "" if length is None else f"{length} "
            raise FormatError(f"{self.where}.{key} must be a list of {size}whole numbers, got {values!r}")
        return tuple(values)

    def each(self, key: str) -> Iterable["Fields"]:
        return [Fields(v, f"{self.where}.{key}[{i}]") for i, v in enumerate(self.take(key, list))]

    def items(self, key: str) -> Iterable[tuple[str, Any]]:
        value = self.take(key, dict)
        return list(value.items())

    def only(self, *keys: str) -> None:
        """Refuse any key but these, naming the nearest."""
        for key in self._value:
            if key not in keys:
                raise FormatError(f"{self.where}.{key} is not known{nearest(key, keys)}")

    def version(self, newest: int) -> int:
        """Return the version of the object, which must be one that this code can read."""
        found = self.take("version", int)
        if not 1 <= found <= newest:
            raise FormatError(
                f"{self.where}.version must lie in [1, {newest}], got {found}; a newer Tightrope wrote it, update this one"
            )
        return int(found)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the known name nearest to `name`, or the empty string."""
    match = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {match[0]!r}?" if match else ""


def parse(text: str, where: str) -> Fields:
    """Read one JSON object."""
    try:
        return Fields(json.loads(text), where)
    except json.JSONDecodeError as error:
        raise FormatError(f"{where} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        raise FormatError(f"{where} is nested too deeply to be read") from None


def read(path: Path) -> Fields:
    """Read a file that holds one JSON object."""
    try:
        return parse(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError:
        raise FormatError(f"{path} is not UTF-8 text") from None

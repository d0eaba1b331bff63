"""A search's configuration: YAML or keyword arguments, checked before anything starts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from tightrope.search.distribute import PATIENCE_SECONDS
from tightrope.spaces.budget import Budget
from tightrope.spaces.errors import ConfigError
from tightrope.spaces.fields import nearest
from tightrope.spaces.policy import write_atomically


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True)


class SpaceConfig(_Strict):
    """What may be chosen. `bits` false leaves every layer in floating point (or at the most bits the device has)."""

    channels: bool = True
    ranks: bool = True
    bits: bool = True
    least_width: float = Field(default=0.125, gt=0, le=1)
    width_step: int = Field(default=8, ge=1)
    rank_shares: list[float] = [0.125, 0.25, 0.375, 0.5]
    form: Literal["spatial", "tucker"] = "spatial"


class CompressConfig(_Strict):
    """How a policy is carried out; see `compressors.prepare.Settings`."""

    order: Literal["l1", "l2", "taylor"] = "taylor"
    ranges: Literal["mse", "percentile", "minmax"] = "mse"
    reconstruct: bool = True
    bias_correction: bool = True
    clip: Literal["mse", "max"] = "mse"
    rounding: Literal["nearest", "gptq", "adaround"] = "gptq"
    equalise: bool = True


class TuneConfig(_Strict):
    """Fine-tuning of the `candidates` best of the front and of the controls; see `compressors.finetune.Tuning`.

    `epochs` 0 leaves it out.
    """

    epochs: int = Field(default=3, ge=0)
    candidates: int = Field(default=3, ge=1)
    lr: float = Field(default=3e-3, gt=0)
    warm: float = Field(default=0.1, ge=0, lt=1)
    batch: int | None = Field(default=50, ge=1)
    distil: float = Field(default=0.7, ge=0, le=1)
    norms: bool = True
    weight_steps: Literal["fixed", "lsq"] = "fixed"
    ranges: Literal["fixed", "lsq", "pact"] = "fixed"


class Config(_Strict):
    """Everything that a search depends on, but for the data and the model themselves.

    `address` is that of a running Ray cluster (`host:port`, or `auto`); None starts Ray here. `patience_seconds` is how long a
    search waits for its workers to be ready, and for another where none is left.

    `stopping` is the probability with which a trial that is no worse than the best so far may be given up early
    (`docs/stopping.md`); 0 scores every trial on the whole split.
    """

    model: str = ""
    data: str = ""
    metric: str = "top1"
    device: str = "ort-cpu"
    batch: int = Field(default=1, ge=1)
    budget: list[str] = ["latency<=0.5x"]
    agent: str = "auto"
    agent_settings: dict[str, Any] = {}
    trials: int = Field(default=100, ge=1)
    workers: int = Field(default=2, ge=0)
    address: str | None = None
    patience_seconds: float = Field(default=PATIENCE_SECONDS, gt=0)
    seed: int = Field(default=0, ge=0)
    out: str = "runs/search"
    controls: bool = True
    stopping: float = Field(default=0.0, ge=0, lt=1)
    space: SpaceConfig = SpaceConfig()
    compress: CompressConfig = CompressConfig()
    finetune: TuneConfig = TuneConfig()

    @field_validator("budget", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("budget")
    @classmethod
    def _readable(cls, value: list[str]) -> list[str]:
        Budget.parse(value)
        return value

    def save(self, path: Path) -> None:
        """Write the resolved configuration as YAML."""
        write_atomically(path, yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True))


def make(values: Mapping[str, Any], where: str = "config") -> Config:
    """A configuration of these values.

    Raises:
        ConfigError: an unknown key (named with the nearest known one) or a value of the wrong type or size.
        BudgetError: a budget that cannot be read.
    """
    try:
        return Config(**values)
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(e, where) for e in error.errors()[:3])) from None
    except TypeError as error:
        raise ConfigError(f"{where}: {error}") from None


def _explain(error: Any, where: str) -> str:
    path = [str(part) for part in error["loc"]]
    name = ".".join(path)
    if error["type"] == "extra_forbidden":
        model: Any = Config
        for part in path[:-1]:
            model = model.model_fields[part].annotation
        return f"{where}: unknown key {name!r}{nearest(path[-1], model.model_fields)}"
    return f"{where}: {name}: {error['msg'][0].lower()}{error['msg'][1:]}, got {error['input']!r}"


def load(path: Path, sets: Sequence[str] = (), **flags: Any) -> Config:
    """Read a YAML file; `sets` are `a.b=value` overrides (values in YAML), then `flags` that are not None."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"there is no configuration {str(path)!r}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{path} is not YAML{at}: {getattr(error, 'problem', error)}") from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold keys and values, got {type(values).__name__}")
    for text in sets:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set takes a.b=value, got {text!r}")
        target = values
        *parents, last = name.strip().split(".")
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise ConfigError(f"--set {text!r}: {parent!r} holds no keys")
        try:
            target[last] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ConfigError(f"--set {text!r}: the value is not YAML") from None
    values.update({key: value for key, value in flags.items() if value is not None})
    return make(values, str(path))

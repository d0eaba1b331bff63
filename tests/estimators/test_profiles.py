"""Profiles are checked before they are believed; an error names the file and the field."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from tightrope.estimators.analytic import load_profile, profiles
from tightrope.estimators.analytic.profile import FOLDER
from tightrope.spaces.errors import DeviceError


def good(name: str = "bitfusion") -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    return loaded


def write(folder: Path, profile: object) -> Path:
    path = folder / "mine.yaml"
    path.write_text(profile if isinstance(profile, str) else yaml.safe_dump(profile))
    return path


@pytest.mark.parametrize("name", profiles())
def test_every_constant_has_a_source_and_every_file_its_name(name: str) -> None:
    device = load_profile(name)
    assert device.name == name
    assert all(len(constant.source) > 10 for constant in device.profile.constants.values())


def test_a_profile_of_ones_own_is_a_device(tmp_path: Path) -> None:
    device = load_profile(write(tmp_path, good() | {"name": "mine", "calibrated": False}), batch=2)
    assert device.name == "mine" and device.batch == 2
    assert any("uncalibrated" in note for note in device.notes)


def changed(key: str, value: object, name: str = "bitfusion") -> dict[str, Any]:
    profile = good(name)
    constant, _, field = key.partition(".")
    if field:
        profile["constants"][constant][field] = value
    elif value is None:
        del profile["constants"][key]
    else:
        profile["constants"][key] = value
    return profile


BAD: list[tuple[object, str]] = [
    (good() | {"version": 2}, "version"),
    (good() | {"modle": "x"}, "modle is not known; did you mean 'model'"),
    (good() | {"model": "warp"}, "model must be one of"),
    (good() | {"notes": [1]}, "notes"),
    ({k: v for k, v in good().items() if k != "calibrated"}, "calibrated is missing"),
    (changed("rows", None), "constants.rows is missing"),
    (changed("rwos", {"value": 1, "unit": "", "source": "x"}), "constants.rwos is not known; did you mean 'rows'"),
    (changed("rows.value", 0), "constants.rows.value must be a whole number"),
    (changed("rows.value", 1.5), "constants.rows.value"),
    (changed("rows.value", True), "constants.rows.value"),
    (changed("clock_mhz.value", -500), "constants.clock_mhz.value must be a number greater than 0"),
    (changed("clock_mhz.value", float("nan")), "constants.clock_mhz.value"),
    (changed("clock_mhz.value", float("inf")), "constants.clock_mhz.value"),
    (changed("clock_mhz.value", "fast"), "constants.clock_mhz.value"),
    (changed("clock_mhz.source", " "), "constants.clock_mhz.source"),
    (changed("clock_mhz", 500), "constants.clock_mhz"),
    (changed("clock_mhz.sorce", "x"), "sorce"),
    (changed("unroll.value", {}, "tpu-like"), "constants.unroll.value"),
    (changed("unroll.value", {"k": 0}, "tpu-like"), "constants.unroll.value.k"),
    (changed("unroll.value", {"z": 2}, "tpu-like"), "unroll must name"),
    (changed("stream_gb_s", None, "edge-tpu"), "must be given together"),
    (changed("dataflow.value", "row", "systolic-ws"), "dataflow"),
    (changed("dataflow.value", 3, "systolic-ws"), "constants.dataflow.value must be text"),
    ("rows: [", "not YAML"),
    ("- a list", "must be a JSON object"),
    ("!!python/object/apply:os.system [exit]", "not YAML"),
]  # fmt: skip


@pytest.mark.parametrize(("profile", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_a_bad_profile_names_the_field(tmp_path: Path, profile: object, message: str) -> None:
    with pytest.raises(DeviceError) as error:
        load_profile(write(tmp_path, profile))
    assert message in str(error.value) and "mine.yaml" in str(error.value)


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(DeviceError, match="did you mean 'bitfusion'"):
        load_profile("bitfushion")
    with pytest.raises(DeviceError, match="cannot be read"):
        load_profile("missing.yaml")


def test_the_profile_of_the_docs_is_a_device(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "devices.md").read_text(encoding="utf-8")
    (tmp_path / "mine.yaml").write_text(text.partition("```yaml\n")[2].partition("```")[0])
    device = load_profile(tmp_path / "mine.yaml")
    assert device.name == "mine" and any("uncalibrated" in note for note in device.notes)

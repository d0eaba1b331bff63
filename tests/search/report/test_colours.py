"""The colours of runs can be told apart without red, green or blue cones, and seen on their background."""

import itertools
import re

import numpy as np
import pytest
from numpy.typing import NDArray

from tightrope.search.report.module import style

Float = NDArray[np.float64]
# Full dichromacy in linear RGB: Machado, Oliveira and Fernandes, IEEE TVCG 15 (2009), severity 1.0.
EYES = {
    "normal": np.eye(3),
    "protan": np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]),
    "deutan": np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]),
    "tritan": np.array([[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]),
}


def linear(text: str) -> Float:
    values = np.array([int(text[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.asarray(np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4))


def lab(rgb: Float) -> Float:
    matrix = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = matrix @ np.clip(rgb, 0, 1) / (0.9505, 1.0, 1.089)
    fx, fy, fz = (np.cbrt(v) if v > 0.008856 else 7.787 * v + 16 / 116 for v in (x, y, z))
    return np.array([116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)])


def themes() -> list[dict[str, str]]:
    blocks = re.findall(r":root[^{]*\{(.*?)\}", style(), re.S)
    return [dict(re.findall(r"--([a-z-]+\d?): (#[0-9a-f]{6})", block)) for block in blocks]


@pytest.mark.parametrize("theme", themes(), ids=["light", "dark"])
@pytest.mark.parametrize("eye", EYES)
def test_runs_can_be_told_apart(theme: dict[str, str], eye: str) -> None:
    seen = [lab(EYES[eye] @ linear(theme[f"c{i}"])) for i in range(6)]
    assert min(float(np.linalg.norm(a - b)) for a, b in itertools.combinations(seen, 2)) > 20


def contrast(a: str, b: str) -> float:
    low, high = sorted(float(np.array([0.2126, 0.7152, 0.0722]) @ linear(colour)) for colour in (a, b))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", themes(), ids=["light", "dark"])
def test_text_and_marks_stand_out(theme: dict[str, str]) -> None:
    for text in ("text", "muted", "accent", "budget"):
        assert contrast(theme[text], theme["card"]) >= 4.5  # WCAG AA for text
    assert contrast(theme["warn-text"], theme["warn"]) >= 4.5
    for i in range(6):
        assert contrast(theme[f"c{i}"], theme["card"]) >= 2.1

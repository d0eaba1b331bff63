"""What some tests need of the processor."""

from pathlib import Path

import pytest

_CPUINFO = Path("/proc/cpuinfo")
exact_int8 = pytest.mark.skipif(
    _CPUINFO.exists() and "vnni" not in _CPUINFO.read_text() and "avx" in _CPUINFO.read_text(),
    reason="without VNNI, ONNX Runtime and oneDNN add pairs of 8-bit products in 16 bits, which saturate",
)
"""Where 8-bit products of others' kernels add up without loss."""

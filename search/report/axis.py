"""One axis of a plot: from values to positions, and where its ticks stand."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """Values from `low` to `high` on positions from `start` to `end`; logarithmic where `log`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    @staticmethod
    def around(values: Sequence[float], start: float, end: float, *, log: bool = False, pad: float = 0.05) -> "Axis":
        """An axis with all finite values on it, and a little room at both ends."""
        shown = [v for v in values if math.isfinite(v) and (v > 0 or not log)]
        low, high = (min(shown), max(shown)) if shown else (0.0, 1.0)
        if log:
            ratio = (high / low) ** pad if high > low else 1.5
            return Axis(low / ratio, high * ratio, start, end, True)
        room = (high - low) * pad or abs(high) * pad or 1.0
        return Axis(low - room, high + room, start, end)

    def at(self, value: float) -> float:
        """The position of a value."""
        low, high, value = (math.log(v) for v in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self, wanted: int) -> list[float]:
        """About so many round values."""
        if self.log:
            for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
                exponents = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
                found = [s * 10.0**e for e in exponents for s in steps if self.low <= s * 10.0**e <= self.high]
                if len(found) >= min(wanted, 4):
                    return found
            return found
        raw = (self.high - self.low) / max(1, wanted)
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(s for s in (1, 2, 2.5, 5, 10) if s * power >= raw * 0.999) * power
        first = math.ceil(self.low / step)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]

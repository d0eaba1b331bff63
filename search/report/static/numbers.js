// Numbers as text, the metrics and their units, ticks of axes, and colours as numbers.

const bytes = [["B", 1], ["kB", 1e3], ["MB", 1e6], ["GB", 1e9]];

export const METRICS = {
  score: { name: "score", better: 1 },
  latency_ms: { name: "latency", budget: "latency", better: -1, units: [["ns", 1e-6], ["µs", 1e-3], ["ms", 1], ["s", 1e3]] },
  energy_mj: { name: "energy", budget: "energy", better: -1, units: [["nJ", 1e-6], ["µJ", 1e-3], ["mJ", 1], ["J", 1e3]] },
  size_bytes: { name: "size", budget: "size", better: -1, units: bytes },
  peak_ram_bytes: { name: "peak RAM", budget: "ram", better: -1, units: bytes },
  macs: { name: "MACs", budget: "macs", better: -1, units: [["", 1], ["k", 1e3], ["M", 1e6], ["G", 1e9]] },
};

const plain = new Intl.NumberFormat("en-GB", { maximumFractionDigits: 6 });

export function digits(value, count = 4) {
  if (!Number.isFinite(value)) return "–";
  const short = Number(value.toPrecision(count));
  const long = Math.abs(short) >= 1e6 || (short !== 0 && Math.abs(short) < 1e-4);
  return long ? short.toExponential(2) : plain.format(short);
}

/** A count of things. */
export function counted(value) {
  return plain.format(value);
}

/** A share of the dense model's, with three digits that count. */
export function times(value) {
  if (!Number.isFinite(value)) return "–";
  return `${Math.abs(value) >= 1e-3 && Math.abs(value) < 1e3 ? value.toPrecision(3) : digits(value, 3)}×`;
}

/** [unit, size] in which a value reads best. */
export function unitFor(metric, value) {
  const units = METRICS[metric].units;
  if (!units) return ["", 1];
  return units.findLast(([, size]) => Math.abs(value) >= size * 0.9995) ?? units[0];
}

export function amount(metric, value) {
  if (!Number.isFinite(value)) return "–";
  const [unit, size] = unitFor(metric, value);
  return `${digits(value / size)}${unit ? ` ${unit}` : ""}`;
}

export function signed(value, count = 3) {
  return `${value > 0 ? "+" : value < 0 ? "−" : "±"}${digits(Math.abs(value), count)}`;
}

export function clamp(value, low, high) {
  return Math.min(high, Math.max(low, value));
}

/** Ticks of an axis: [value, text] for values between `low` and `high`, which are logarithms where `log`. */
export function ticks(low, high, log, wanted) {
  if (log && high - low > 0.7) return decades(low, high);
  const [from, to] = log ? [10 ** low, 10 ** high] : [low, high];
  const found = [];
  const step = roundStep((to - from) / wanted, (to - from) / 2.5);
  for (let i = Math.ceil(from / step); i * step <= to + step * 1e-9; i++) {
    const value = i * step;
    found.push([log ? Math.log10(value) : value, digits(Math.abs(value) < step * 1e-6 ? 0 : value, 6)]);
  }
  return found;
}

function decades(low, high) {
  const steps = high - low > 3 ? [1] : high - low > 1.5 ? [1, 3] : [1, 2, 5];
  const found = [];
  for (let decade = Math.floor(low); decade <= high; decade++)
    for (const step of steps) {
      const at = decade + Math.log10(step);
      if (at >= low && at <= high) found.push([at, digits(step * 10 ** decade)]);
    }
  return found;
}

/** The least round step that is not below `least`, or the last one that does not exceed `most`. */
function roundStep(least, most) {
  const power = 10 ** Math.floor(Math.log10(least));
  const steps = [1, 2, 2.5, 5, 10].map((s) => s * power);
  const step = steps.find((s) => s >= least * 0.999);
  return step <= most ? step : (steps.findLast((s) => s <= most) ?? step);
}

export function parseColour(text) {
  if (text.startsWith("#")) return [1, 3, 5].map((i) => parseInt(text.slice(i, i + 2), 16));
  return text.match(/[\d.]+/g).slice(0, 3).map(Number);
}

/** Bits on a scale from 0 to 1: 2 bits near 0, 8 at two thirds, floating point at 1. */
export function bitShare(bits) {
  return bits >= 32 ? 1 : clamp((bits - 1) / 10.5, 0, 1);
}

export function bitText(bits) {
  return bits === 32 ? "fp" : String(bits);
}

// What a search has reached, over its trials or its CPU seconds.

import { KIND } from "./data.js";
import { shape } from "./dom.js";
import { aimsAtCost, area, nonDominated } from "./fronts.js";
import { clamp, digits, METRICS } from "./numbers.js";
import { Plot } from "./plot.js";

const MOST_TOLD = 12; // runs in the tip

/** The best under the budget ("best") or the hypervolume ("volume") of each run, in steps. */
export class TimeLine extends Plot {
  constructor(app, host, kind) {
    super(app, host);
    this.kind = kind;
    this.cache = new Map();
    this.svg.removeAttribute("aria-hidden");
    this.svg.setAttribute("role", "img");
    host.addEventListener("pointermove", (e) => this.hover(e));
    host.addEventListener("pointerleave", () => {
      this.tip.hidden = true;
      this.cursor?.remove();
    });
  }

  /** {steps: [clock, value], end, least}; `least` where the aim is the least latency. Kept until something changes. */
  series(run) {
    const { state } = this.app;
    const key = [run.version, state.clock, JSON.stringify(this.reference), state.relative, state.x, state.y].join("|");
    const known = this.cache.get(run.id);
    if (known?.key === key) return known;
    const least = this.kind === "best" && aimsAtCost(run);
    const next = this.kind === "best" ? this.bestSoFar(run, least) : this.volumeSoFar(run);
    const { kind, cpu_seconds: cpu } = run.columns;
    const steps = [];
    let [end, value] = [0, NaN];
    for (let i = 0; i < run.count; i++) {
      if (kind[i] !== KIND.trial) continue;
      end += state.clock === "cpu" ? cpu[i] || 0 : 1;
      const now = next(i);
      if (Number.isFinite(now) && now !== value) steps.push([end, (value = now)]);
    }
    const found = { key, steps, end, least };
    this.cache.set(run.id, found);
    return found;
  }

  bestSoFar(run, least) {
    const { feasible, score, latency_ms: latency } = run.columns;
    let best = NaN;
    return (i) => {
      const now = least ? latency[i] : score[i];
      if (feasible[i] === 1 && run.isScored(i) && !(least ? best <= now : best >= now)) best = now;
      return best;
    };
  }

  volumeSoFar(run) {
    const { app, reference } = this;
    let [front, volume] = [[], NaN];
    return (i) => {
      const [x, y] = ["x", "y"].map((axis) => -METRICS[app.state[axis]].better * app.coordinate(run, app.state[axis], i));
      const counts = reference && Number.isFinite(x) && Number.isFinite(y) && run.isScored(i);
      if (counts && !front.some((p) => p.x <= x && p.y <= y)) {
        front = nonDominated([...front, { x, y, order: i }]);
        volume = area(front, reference) / reference.span;
      }
      return volume;
    };
  }

  get clock() {
    return this.app.state.clock === "cpu" ? "CPU seconds" : "trials";
  }

  draw() {
    const { app } = this;
    this.measure();
    this.reference = app.reference();
    this.lines = app.shown.map((run) => [run, this.series(run)]);
    this.view = { x: [0, Math.max(1, ...this.lines.map(([, { end }]) => end))], y: this.range() };
    const least = this.lines.some(([, series]) => series.least);
    const title = this.kind === "volume" ? "hypervolume" : least ? "least latency (ms)" : `best ${app.metricName("score")}`;
    const id = `clip-${this.kind}`;
    this.svg.replaceChildren(this.clip(id), ...this.axes({ title: this.clock }, { title }), ...this.paths(`url(#${id})`));
    const reached = this.lines.map(([run, { steps }]) => `${run.name} ${digits(steps.at(-1)?.[1] ?? NaN, 5)}`);
    this.svg.setAttribute("aria-label", `${title} over ${this.clock}; at the end: ${reached.join(", ")}`);
  }

  /** From all but the lowest first steps to the highest. */
  range() {
    const values = this.lines.flatMap(([, { steps }]) => steps.map(([, value]) => value)).sort((a, b) => a - b);
    let [low, high] = [values[Math.floor(values.length * 0.05)] ?? 0, values.at(-1) ?? 1];
    if (!(high > low)) [low, high] = [low - Math.abs(low || 1) * 0.02, high + Math.abs(high || 1) * 0.02];
    const pad = (high - low) * 0.08;
    return [low - pad, high + pad];
  }

  paths(clip) {
    return this.lines.filter(([, { steps }]) => steps.length).map(([run, { steps, end }]) => {
      const { colour, dash } = this.app.lineStyle(run);
      const [first, ...rest] = steps.map(([x, y]) => [this.px(x).toFixed(1), this.py(y).toFixed(1)]);
      const d = `M${first[0]},${first[1]}${rest.map(([x, y]) => `H${x}V${y}`).join("")}H${this.px(end).toFixed(1)}`;
      return shape("path", { class: "front", d, stroke: colour, "stroke-dasharray": dash || null, "clip-path": clip });
    });
  }

  hover(event) {
    if (!this.lines) return;
    const { left, right, top, bottom } = this.box;
    const host = this.host.getBoundingClientRect();
    const x = clamp(event.clientX - host.left, left, right);
    const at = ((x - left) / (right - left)) * this.view.x[1];
    const value = ([, { steps }]) => steps.findLast(([clock]) => clock <= at)?.[1] ?? NaN;
    const told = this.lines.slice(0, MOST_TOLD).map((line) => `${line[0].name}: ${digits(value(line), 5)}`);
    this.cursor?.remove();
    this.cursor = shape("line", { class: "axis", x1: x, x2: x, y1: top, y2: bottom });
    this.svg.append(this.cursor);
    this.showTip(x, event.clientY - host.top, [`${digits(at, 4)} ${this.clock}`, ...told]);
  }
}

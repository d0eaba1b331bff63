// The scatter of all trials: points, fronts in steps, budgets, controls and error bars. What is done with it: `gestures.js`.

import { Cloud } from "./cloud.js";
import { KIND } from "./data.js";
import { CONTROL_SHAPES, CROSS, SHAPES, shape } from "./dom.js";
import { Gestures } from "./gestures.js";
import { counted, METRICS, parseColour, unitFor } from "./numbers.js";
import { Plot } from "./plot.js";

const MOST_ELEMENTS = 1500; // more trials than this are drawn on a canvas
const REACH = 14; // pixels from a point within which the pointer means it
const CLIP = { "clip-path": "url(#scatter-clip)" };

export class Scatter extends Plot {
  constructor(app, host) {
    super(app, host);
    this.cloud = new Cloud();
    host.insertBefore(this.cloud.canvas, this.svg);
    this.view = null; // {x, y}: the ends of each axis, as logarithms where it is one
    this.follow = "most"; // what the view goes on to show as trials come: "most", "all", or null for nothing
    for (const name of ["under", "points", "over", "marked"]) this.svg.append((this[name] = shape("g")));
    this.gestures = new Gestures(this);
  }

  // View

  /** Show these points; all of them, and what is to come, for null. */
  fit(points = null) {
    this.follow = points === null ? "all" : null;
    this.view = this.around(points ?? this.app.points);
    this.draw();
  }

  /** A view of these points. With `most`, scores far below all others may lie outside, and controls of far higher cost. */
  around(points, most = false) {
    const view = {};
    for (const [axis, at] of [["x", "ax"], ["y", "ay"]]) {
      const isScore = this.app.state[axis] === "score";
      const floor = most && isScore ? lowest(points, at) : -Infinity;
      const ceiling = most && !isScore ? highest(points, at, this.app.log[axis]) : Infinity;
      let [low, high] = [Infinity, -Infinity];
      for (const point of points) {
        const v = point[at];
        if (!Number.isFinite(v) || (point.kind === KIND.trial ? v < floor : v > ceiling)) continue;
        if (v < low) low = v;
        if (v > high) high = v;
      }
      if (low > high) [low, high] = [0, 1];
      const pad = (high - low || Math.abs(high) * 0.1 || 1) * 0.06;
      view[axis] = [low - pad, high + pad];
    }
    return view;
  }

  /** Show more or less, about a place on the plot. */
  zoom(factor, x = (this.box.left + this.box.right) / 2, y = (this.box.top + this.box.bottom) / 2) {
    const { left, right, top, bottom } = this.box;
    const shares = { x: (x - left) / (right - left), y: (bottom - y) / (bottom - top) };
    for (const axis of ["x", "y"]) {
      const [low, high] = this.view[axis];
      const at = low + (high - low) * shares[axis];
      this.view[axis] = [at - (at - low) * factor, at + (high - at) * factor];
    }
    this.moved();
  }

  /** Shift by shares of the plot's width and height, from the view as it was. */
  pan(dx, dy, from = this.view) {
    for (const [axis, by] of [["x", dx], ["y", dy]]) {
      const [low, high] = from[axis];
      this.view[axis] = [low + by * (high - low), high + by * (high - low)];
    }
    this.moved();
  }

  /** Draw at the next frame, and once more, with the error bars, when it comes to rest. */
  moved() {
    this.follow = null;
    this.queued ??= requestAnimationFrame(() => {
      this.queued = undefined;
      this.draw(true);
    });
    clearTimeout(this.rest);
    this.rest = setTimeout(() => this.draw(), 150);
  }

  // Drawing

  draw(moving = false) {
    const { app } = this;
    if (!app.points) return;
    this.measure();
    if (!this.view || this.follow) this.view = this.around(app.points, this.follow !== "all");
    if (this.built !== app.version) this.build();
    for (const point of app.points) {
      point.sx = this.px(point.ax);
      point.sy = this.py(point.ay);
    }
    const axes = this.axes(this.axis("x"), this.axis("y"));
    this.under.replaceChildren(this.clip("scatter-clip"), ...axes, ...this.limits(), ...this.fronts(), ...this.outside());
    for (const group of [this.points, this.over, this.marked]) group.setAttribute("clip-path", CLIP["clip-path"]);
    this.drawPoints();
    this.over.replaceChildren(...(moving ? [] : this.errorBars()), ...this.controls(), ...this.bests());
    this.marks();
    this.host.dataset.drawn = String(this.nodes.length + this.crowd.length);
  }

  /** Title and unit of an axis. */
  axis(axis) {
    const { app } = this;
    const metric = app.state[axis];
    const name = app.metricName(metric);
    const log = app.log[axis];
    if (metric === "score") return { title: `${name}${app.percent ? " (%)" : ""}`, log };
    const modelled = app.shown.length > 0 && app.shown.every((run) => run.study.simulated);
    const said = modelled && ["latency_ms", "energy_mj"].includes(metric) ? ", simulated" : "";
    if (app.state.relative) return { title: `${name}${said} (× dense)`, log };
    const [low, high] = this.view[axis];
    const [unit, size] = unitFor(metric, log ? 10 ** ((low + high) / 2) : Math.max(Math.abs(low), Math.abs(high)));
    return { title: `${name}${said}${unit ? ` (${unit})` : ""}`, log, unit: size };
  }

  /** Work out how each trial looks. Of many the front alone is drawn as elements, the crowd on a canvas. */
  build() {
    const { app } = this;
    const trials = app.points.filter((p) => p.kind === KIND.trial);
    const order = (p) => (p.front ? 2 : p.feasible ? 1 : 0);
    trials.sort((a, b) => order(a) - order(b));
    const kept = app.brushed && new Set(app.brushed);
    const crowded = trials.length > MOST_ELEMENTS;
    const looks = new Map();
    this.nodes = [];
    this.crowd = [];
    for (const point of trials) {
      const look = this.look(point, Boolean(kept) && !kept.has(point), looks);
      if (crowded && !point.front) this.crowd.push({ point, look });
      else this.nodes.push([point, this.node(point, look), ` scale(${look.size})`]);
    }
    this.points.replaceChildren(...this.nodes.map(([, node]) => node));
    this.built = app.version;
  }

  /** Shape, colour, opacity and size of a trial's mark; one object for all that look alike. */
  look(point, dimmed, known) {
    const { app } = this;
    const { run, index, front, feasible } = point;
    const style = app.state.colour === "agent" ? app.agentStyle(run.text("label", index)) : app.style(run);
    let { colour } = style;
    if (!feasible) colour = app.theme("infeasible");
    else if (app.state.colour === "number") {
      const share = run.columns.number[index] / (run.lastNumber || 1);
      colour = app.ramp("n", Math.round(share * 24) / 24);
    }
    const alpha = (front ? 1 : feasible ? 0.5 : 0.45) * (dimmed ? 0.25 : 1);
    const size = front ? (feasible ? 1.15 : 1.1) : feasible ? 0.8 : 0.75;
    const hollow = run.part(index) > 0;
    const key = `${style.shape}|${colour}|${alpha}|${size}|${hollow}`;
    if (!known.has(key)) known.set(key, { d: style.shape, colour, rgb: parseColour(colour), alpha, size, hollow });
    return known.get(key);
  }

  node({ run, index, front, feasible }, { d, colour, alpha, hollow }) {
    const card = this.app.theme("card");
    const paint = hollow
      ? { fill: front ? card : "none", stroke: colour, "stroke-opacity": alpha, "stroke-width": 1.5 }
      : { fill: colour, "fill-opacity": alpha, stroke: front ? card : "none", "stroke-width": 1 };
    const kinds = ["trial", front && "on-front", !feasible && "infeasible", hollow && "part"].filter(Boolean);
    return shape("path", { class: kinds.join(" "), d, ...paint, "data-number": run.columns.number[index] });
  }

  drawPoints() {
    for (const [{ sx, sy }, node, scale] of this.nodes)
      node.setAttribute("transform", `translate(${sx.toFixed(1)},${sy.toFixed(1)})${scale}`);
    const ratio = window.devicePixelRatio || 1;
    if (ratio !== this.ratio) for (const { look } of this.crowd) look.mask = null;
    this.ratio = ratio;
    this.cloud.draw(this.crowd, this.box, this.width, this.height, ratio, this.app.theme("card"));
  }

  /** Path of a stepped front, drawn out to the edges of the plot where it is dominated from. */
  stepped(front) {
    const { state } = this.app;
    const { left, right, top, bottom } = this.box;
    const worseX = METRICS[state.x].better < 0 ? right : left;
    const worseY = METRICS[state.y].better < 0 ? top : bottom;
    const [first, ...rest] = front;
    const steps = rest.map(({ sx, sy }) => `H${sx.toFixed(1)}V${sy.toFixed(1)}`).join("");
    return `M${first.sx.toFixed(1)},${worseY}V${first.sy.toFixed(1)}${steps}H${worseX}`;
  }

  fronts() {
    const { app } = this;
    const nodes = [];
    const several = app.shown.length > 1 && app.joint.length;
    if (several) nodes.push(shape("path", { class: "joint", d: this.stepped(app.joint), ...CLIP }));
    for (const run of app.shown) {
      if (!run.front.length) continue;
      const { colour, dash } = app.lineStyle(run);
      const d = this.stepped(run.front);
      nodes.push(shape("path", { class: "front", d, stroke: colour, "stroke-dasharray": dash || null, ...CLIP }));
    }
    return nodes;
  }

  /** Lines of the budgets, each once. */
  limits() {
    const { app } = this;
    const { left, right, top, bottom } = this.box;
    const nodes = new Map();
    for (const run of app.shown)
      for (const axis of ["x", "y"]) {
        const value = app.limit(run, app.state[axis]);
        const at = this[`p${axis}`](app.log[axis] ? Math.log10(value) : value);
        if (!(axis === "x" ? at >= left && at <= right : at >= top && at <= bottom)) continue;
        const flip = at > right - 110;
        const line = axis === "x" ? { x1: at, x2: at, y1: top, y2: bottom } : { x1: left, x2: right, y1: at, y2: at };
        const place = axis === "x"
          ? { x: flip ? at - 5 : at + 5, y: bottom - 8, "text-anchor": flip ? "end" : "start" }
          : { x: right - 6, y: at - 5, "text-anchor": "end" };
        const text = app.limitText(run, app.state[axis]);
        nodes.set(`${axis}${at.toFixed(0)}`, shape("line", { class: "budget", ...line }));
        nodes.set(`${axis}${text}`, shape("text", { class: "budget-text halo", ...place }, text)); // once, of several close by
      }
    return [...nodes.values()];
  }

  /** How many trials the first view leaves out. */
  outside() {
    if (this.follow !== "most") return [];
    const { left, right, top, bottom } = this.box;
    let out = 0;
    for (const { kind, sx, sy } of this.app.points)
      if (kind === KIND.trial && (sx < left || sx > right || sy < top || sy > bottom)) out++;
    if (!out) return [];
    const text = `${counted(out)} far below ${out === 1 ? "is" : "are"} not in view: “All” shows ${out === 1 ? "it" : "them"}`;
    return [shape("text", { class: "outside halo", x: right - 6, y: bottom - 8, "text-anchor": "end" }, text)];
  }

  errorBars() {
    const { app } = this;
    if (!app.state.errors) return [];
    const few = app.points.length <= 60;
    const many = app.shown.length > 4;
    const bars = few ? app.points : app.points.filter((p) => (many ? p.joint : p.front || p.kind === KIND.control));
    return bars.flatMap((point) => this.errorBar(point));
  }

  errorBar(point) {
    const { app } = this;
    const plain = point.kind === KIND.trial && point.feasible && app.state.colour !== "number";
    const stroke = plain ? this.look(point, false, new Map()).colour : app.theme("muted");
    const bars = [];
    for (const axis of ["x", "y"]) {
      const ends = app.interval(point, app.state[axis])?.map((v) => (app.log[axis] ? Math.log10(v) : v));
      if (!ends?.every(Number.isFinite)) continue;
      const [a, b] = ends.map((v) => this[`p${axis}`](v).toFixed(1));
      const { sx, sy } = point;
      bars.push(axis === "x"
        ? `M${a},${sy}H${b}M${a},${sy - 3}v6M${b},${sy - 3}v6`
        : `M${sx},${a}V${b}M${sx - 3},${a}h6M${sx - 3},${b}h6`);
    }
    return bars.map((d) => shape("path", { class: "error", stroke, d }));
  }

  /** The controls, the first of each name with a label, and what became of trials after their fine-tuning. */
  controls() {
    const { app } = this;
    const [nodes, texts, taken, named] = [[], [], [], new Set()];
    for (const point of app.marked) {
      const { run, index, kind, sx, sy } = point;
      const colour = app.shown.length > 1 ? app.lineStyle(run).colour : app.theme("ink");
      const transform = `translate(${sx.toFixed(1)},${sy.toFixed(1)})`;
      if (kind === KIND.final) {
        const origin = app.where(run, run.byNumber.get(run.columns.number[index]));
        if (origin) {
          const d = `M${origin.sx},${origin.sy}L${sx},${sy}`;
          nodes.push(shape("path", { class: "error", d, stroke: colour, "stroke-dasharray": "2 2" }));
        }
        nodes.push(shape("path", { class: "final", d: CROSS, transform, stroke: colour, "stroke-width": 2 }));
        continue;
      }
      const name = run.text("label", index);
      const look = { d: CONTROL_SHAPES[name] ?? SHAPES[1], fill: colour, stroke: app.theme("card"), "stroke-width": 1.25 };
      nodes.push(shape("path", { class: "control", "data-name": name, transform, ...look }));
      if (!named.has(name)) texts.push(sx > this.box.right ? this.beyond(point, name) : this.label(point, name, taken));
      named.add(name);
    }
    return [...nodes, ...texts];
  }

  /** A name beside its mark, below others that stand there. */
  label({ sx, sy }, name, taken) {
    const width = 6.2 * name.length;
    const left = sx + 10 + width < this.box.right ? sx + 10 : sx - 10 - width;
    let y = sy + 4;
    while (taken.some((t) => Math.abs(t.y - y) < 13 && left < t.right && t.left < left + width)) y += 13;
    taken.push({ left, right: left + width, y });
    return shape("text", { class: "halo label", x: left, y }, name);
  }

  /** The name and value of a control that lies to the right of the plot. */
  beyond({ sy, vx }, name) {
    const text = `${name}, ${this.app.amount(this.app.state.x, vx)} →`;
    return shape("text", { class: "halo label", x: this.box.right - 4, y: sy + 4, "text-anchor": "end" }, text);
  }

  bests() {
    const { app } = this;
    const points = app.shown.map((run) => app.where(run, run.best)).filter(Boolean);
    return points.map(({ run, index, sx, sy }) => {
      const ring = { cx: sx, cy: sy, r: 8.5, fill: "none", stroke: app.lineStyle(run).colour, "stroke-width": 2 };
      return shape("circle", { class: "best", "data-number": run.columns.number[index], ...ring });
    });
  }

  /** Rings around what is hovered, selected and pinned, and the frame of a brush. */
  marks() {
    const { app } = this;
    if (!app.points) return;
    const nodes = [];
    for (const [record, kind] of [[app.pinned, "pin"], [app.selected, "chosen"], [this.hovered, "hovered"]]) {
      const point = record && app.where(record.run, record.index);
      if (!point) continue;
      if (app.state.errors) nodes.push(...this.errorBar(point));
      nodes.push(shape("circle", { class: `ring ${kind}`, cx: point.sx, cy: point.sy, r: kind === "hovered" ? 7 : 10 }));
    }
    const frame = this.gestures.frame;
    if (frame) nodes.push(shape("rect", { class: "brush", ...frame }));
    this.marked.replaceChildren(...nodes);
  }

  // Finding

  nearest(x, y) {
    let found = null;
    let least = REACH * REACH;
    const { left, right, top, bottom } = this.box;
    for (const p of this.app.points) {
      const gap = (p.sx - x) ** 2 + (p.sy - y) ** 2 - (p.front || p.kind !== KIND.trial ? 4 : 0);
      if (gap < least && p.sx >= left && p.sx <= right && p.sy >= top && p.sy <= bottom) [least, found] = [gap, p];
    }
    return found;
  }

  /** The trials inside a rectangle of pixels. */
  inside({ x, y, width, height }) {
    const { points } = this.app;
    const holds = (p) => p.sx >= x && p.sx <= x + width && p.sy >= y && p.sy <= y + height;
    return points.filter((p) => p.kind === KIND.trial && holds(p));
  }

  hover(point) {
    if (this.hovered?.run === point?.run && this.hovered?.index === point?.index) return;
    this.hovered = point;
    if (point) this.showTip(point.sx, point.sy, this.app.describe(point.run, point.index));
    else this.tip.hidden = true;
    this.host.style.cursor = point ? "pointer" : "";
    this.marks();
  }
}

/** A cost above which controls are far from all trials: three times that of the dearest. */
function highest(points, at, log) {
  let top = -Infinity;
  for (const point of points) if (point.kind === KIND.trial && point[at] > top) top = point[at];
  if (top === -Infinity) return Infinity;
  return log ? top + Math.log10(3) : 3 * top;
}

/** A score below which trials are far from all others: below the lowest tenth by 1.5 times what lies between the tenths. */
function lowest(points, at) {
  const stride = Math.ceil(points.length / 2000);
  const values = Float64Array.from(points.filter((p, i) => i % stride === 0 && p.kind === KIND.trial), (p) => p[at]).sort();
  if (!values.length) return -Infinity;
  const [low, high] = [0.1, 0.9].map((share) => values[Math.floor(share * (values.length - 1))]);
  return low - 1.5 * Math.max(high - low, 1e-9);
}

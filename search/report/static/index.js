// The tab "Pareto": every trial of the searches below the log folder, their fronts, and the policy of each point.
//
// Served by TensorBoard (`plugin.py`) it polls for new records; in a page of its own (`page.py`) it reads what the page
// holds. What comes from a run is only ever set as text or as a number, never as markup.

const SVG = "http://www.w3.org/2000/svg";
const POLL_MS = 3000;
const MOST_ELEMENTS = 1500; // more trials than this are drawn on a canvas
const MOST_MOVING = 3000; // points of the canvas that are drawn while it moves
const MOST_POLICIES = 60; // columns of the heat map
const REACH = 14; // pixels from a point within which the pointer means it
const MARGIN = { left: 72, right: 20, top: 14, bottom: 46 };
const KIND = { trial: 0, control: 1, final: 2, dense: 3 };

const METRICS = {
  score: { name: "score", better: 1 },
  latency_ms: { name: "latency", better: -1, units: [["ns", 1e-6], ["µs", 1e-3], ["ms", 1], ["s", 1e3]] },
  energy_mj: { name: "energy", better: -1, units: [["nJ", 1e-6], ["µJ", 1e-3], ["mJ", 1], ["J", 1e3]] },
  size_bytes: { name: "size", better: -1, units: [["B", 1], ["kB", 1e3], ["MB", 1e6], ["GB", 1e9]] },
  peak_ram_bytes: { name: "peak RAM", better: -1, units: [["B", 1], ["kB", 1e3], ["MB", 1e6], ["GB", 1e9]] },
  macs: { name: "MACs", better: -1, units: [["", 1], ["k", 1e3], ["M", 1e6], ["G", 1e9]] },
};
const SHAPES = [
  "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0z",
  "M0,-5L5,0L0,5L-5,0z",
  "M-3.6,-3.6H3.6V3.6H-3.6z",
  "M0,-4.6L4.6,3.6H-4.6z",
];
const CONTROL_SHAPES = {
  dense: "M-5,-5H5V5H-5z",
  uniform: "M0,-6.2L6,4.4H-6z",
  random: "M0,6.2L6,-4.4H-6z",
  recipe: "M0,-7L1.9,-2.4L6.8,-2.1L3,1L4.2,5.8L0,3.2L-4.2,5.8L-3,1L-6.8,-2.1L-1.9,-2.4z",
};
const DASHES = ["", "6 3", "2 3", "8 3 2 3"];

// --- small helpers --------------------------------------------------------------------------------------------------

function element(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function shape(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

/** Set attributes (functions as listeners) and append children; a text becomes a text node, null nothing. */
function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

function digits(value, count = 4) {
  if (!Number.isFinite(value)) return "–";
  const text = Number(value.toPrecision(count));
  return Math.abs(text) >= 1e6 || (text !== 0 && Math.abs(text) < 1e-4) ? text.toExponential(2) : text.toLocaleString("en-GB", { maximumFractionDigits: 6 });
}

function unitFor(metric, value) {
  const units = METRICS[metric].units;
  if (!units) return ["", 1];
  return units.findLast(([, size]) => Math.abs(value) >= size * 0.9995) ?? units[0];
}

function amount(metric, value) {
  if (!Number.isFinite(value)) return "–";
  const [unit, size] = unitFor(metric, value);
  return `${digits(value / size)}${unit ? ` ${unit}` : ""}`;
}

function signed(value, count = 3) {
  return `${value > 0 ? "+" : value < 0 ? "−" : "±"}${digits(Math.abs(value), count)}`;
}

function clamp(value, low, high) {
  return Math.min(high, Math.max(low, value));
}

/** Ticks of an axis: [value, text] for values between `low` and `high`, which are logarithms where `log`. */
function ticks(low, high, log, wanted) {
  const found = [];
  if (log && high - low > 0.7) {
    const steps = high - low > 3 ? [1] : high - low > 1.5 ? [1, 3] : [1, 2, 5];
    for (let decade = Math.floor(low); decade <= high; decade++)
      for (const step of steps) {
        const at = decade + Math.log10(step);
        if (at >= low && at <= high) found.push([at, digits(step * 10 ** decade)]);
      }
    return found;
  }
  const [from, to] = log ? [10 ** low, 10 ** high] : [low, high];
  const raw = (to - from) / wanted;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].find((s) => s * power >= raw) * power;
  for (let i = Math.ceil(from / step); i * step <= to + step * 1e-9; i++) {
    const value = i * step;
    found.push([log ? Math.log10(value) : value, digits(Math.abs(value) < step * 1e-6 ? 0 : value, 6)]);
  }
  return found;
}

// --- where the data come from ---------------------------------------------------------------------------------------

/** Reads from the plug-in's routes. */
class Served {
  #tag = "";

  async runs() {
    const answer = await fetch(new URL(`./runs?tag=${this.#tag}`, import.meta.url), { cache: "no-store" });
    if (!answer.ok) throw new Error(`the list of runs: ${answer.status}`);
    const { tag, runs } = await answer.json();
    this.#tag = tag;
    return runs ?? null; // nothing is new
  }

  async trials(since) {
    const query = since.map(({ id, epoch, count }) => `${id}.${epoch}.${count}`).join(",");
    const answer = await fetch(new URL(`./trials?since=${query}`, import.meta.url), { cache: "no-store" });
    if (!answer.ok) throw new Error(`trials: ${answer.status}`);
    return answer.arrayBuffer();
  }

  async policies(run, indices) {
    const answer = await fetch(new URL(`./policies?run=${run.id}&index=${indices.join(",")}`, import.meta.url), { cache: "no-store" });
    const value = await answer.json();
    if (!answer.ok) throw new Error(value.error);
    return value.policies;
  }
}

function decode(base64) {
  return Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
}

/** Reads from what a page carries with it: JSON, compressed. */
class Embedded {
  static async read(text) {
    const stream = new Blob([decode(text.trim())]).stream().pipeThrough(new DecompressionStream("gzip"));
    const source = new Embedded();
    source.data = await new Response(stream).json();
    return source;
  }

  async runs() {
    return this.data.runs;
  }

  async trials() {
    return decode(this.data.trials).buffer;
  }

  async policies(run, indices) {
    return indices.map((index) => this.data.policies[run.id]?.[index] ?? { index, policy: null, layers: null, problem: "This page holds the policies of the fronts, the controls and the first trials; the run folder has all." });
  }
}

/** The parts of a binary answer: [header, {column: Float64Array}]. */
function unpack(buffer) {
  const length = new DataView(buffer).getUint32(0, true);
  const headers = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  let at = 4 + length;
  return headers.map((header) => {
    const columns = {};
    for (const name of header.columns) {
      columns[name] = new Float64Array(buffer, at, header.count);
      at += 8 * header.count;
    }
    return [header, columns];
  });
}

/** All that is known of one run. */
class Run {
  constructor(summary) {
    this.id = summary.id;
    this.visible = true;
    this.details = new Map();
    this.update(summary);
    this.clear(summary.epoch);
  }

  update(summary) {
    Object.assign(this, { name: summary.name, study: summary.study, known: summary.count, latest: summary.epoch, pending: summary.more, command: summary.command, bad: summary.bad_lines });
  }

  clear(epoch) {
    this.epoch = epoch;
    this.count = 0;
    this.columns = {};
    this.strings = [];
    this.details.clear();
    this.version = (this.version ?? 0) + 1;
  }

  get stale() {
    return this.epoch !== this.latest || this.count < this.known || this.pending;
  }

  append(header, columns) {
    if (header.epoch !== this.epoch || header.from !== this.count) this.clear(header.epoch);
    if (header.from !== this.count) return;
    const count = this.count + header.count;
    for (const [name, block] of Object.entries(columns)) {
      let column = this.columns[name];
      if (!column || column.length < count) {
        const grown = new Float64Array(Math.max(256, 2 * count));
        if (column) grown.set(column.subarray(0, this.count));
        column = this.columns[name] = grown;
      }
      column.set(block, this.count);
    }
    this.count = count;
    this.strings = header.strings;
    this.pending = header.more;
    this.version++;
    this.dense = this.find(KIND.dense);
    this.finals = new Map();
    this.byNumber = new Map();
    this.lastNumber = 0;
    for (let i = 0; i < count; i++) {
      const kind = this.columns.kind[i];
      if (kind === KIND.trial) {
        this.byNumber.set(this.columns.number[i], i);
        this.lastNumber = Math.max(this.lastNumber, this.columns.number[i]);
      } else if (kind === KIND.final) this.finals.set(this.columns.number[i], i);
    }
  }

  find(kind) {
    for (let i = 0; i < this.count; i++) if (this.columns.kind[i] === kind) return i;
    return -1;
  }

  value(metric, index) {
    return index < 0 ? NaN : this.columns[metric][index];
  }

  text(column, index) {
    return this.strings[this.columns[column][index]] ?? "";
  }

  /** The dense model's value of a metric. */
  whole(metric) {
    return this.value(metric, this.dense ?? -1);
  }

  title(index) {
    const kind = this.columns.kind[index];
    if (kind === KIND.trial) return `Trial ${this.columns.number[index]}`;
    if (kind === KIND.final) return `Trial ${this.columns.number[index]}, fine-tuned`;
    return `Control: ${this.text("label", index)}`;
  }
}

// --- fronts ---------------------------------------------------------------------------------------------------------

/** Of points {x, y}, both to be minimised, those that no other beats, by ascending x. */
function nonDominated(points) {
  const sorted = [...points].sort((a, b) => a.x - b.x || a.y - b.y || a.order - b.order);
  let least = Infinity;
  return sorted.filter((point) => point.y < least && ((least = point.y), true));
}

/** Area between a front (minimised, ascending x) and a reference point that is worse than the points that count. */
function area(front, reference) {
  let sum = 0;
  let last = reference.y;
  for (const { x, y } of front) {
    if (x >= reference.x || y >= last) continue;
    sum += (reference.x - x) * (last - y);
    last = y;
  }
  return sum;
}

// --- the page -------------------------------------------------------------------------------------------------------

class App {
  constructor(source, root) {
    this.source = source;
    this.root = root;
    this.runs = new Map();
    this.state = { x: "latency_ms", y: "score", logX: null, logY: null, relative: false, colour: "run", errors: true, mode: "pan", heat: "weight_bits", clock: "trials" };
    this.selected = null; // {run, index}
    this.pinned = null;
    this.brushed = null; // points of the scatter
    this.build();
    this.scatter = new Scatter(this, this.parts.scatter);
    this.heat = new Heat(this, this.parts.heat);
    this.times = [new TimeLine(this, this.parts.best, "best"), new TimeLine(this, this.parts.volume, "volume")];
    new ResizeObserver(() => this.draw()).observe(this.parts.main);
    this.watchTheme();
  }

  get shown() {
    return [...this.runs.values()].filter((run) => run.visible && run.count > 0);
  }

  // Data

  async poll() {
    try {
      const summaries = await this.source.runs();
      if (summaries) this.take(summaries);
      let stale = [...this.runs.values()].filter((run) => run.stale);
      while (stale.length) {
        const batch = stale.slice(0, 50);
        for (const [header, columns] of unpack(await this.source.trials(batch))) this.runs.get(header.run)?.append(header, columns);
        this.changed();
        const rest = batch.filter((run) => run.stale && !run.pending);
        stale = [...stale.slice(50), ...rest.filter((run) => run.count < run.known)];
      }
      this.status(this.runs.size ? "" : null);
      this.again = [...this.runs.values()].some((run) => run.pending);
    } catch (error) {
      this.status(`No answer from TensorBoard (${error.message}); trying again.`);
    }
    if (this.source instanceof Served) setTimeout(() => this.whenVisible(), this.again ? 50 : POLL_MS);
  }

  whenVisible() {
    if (!document.hidden) return void this.poll();
    document.addEventListener("visibilitychange", () => this.poll(), { once: true });
  }

  take(summaries) {
    const listed = new Set(summaries.map((summary) => summary.id));
    let changed = false;
    for (const id of [...this.runs.keys()])
      if (!listed.has(id)) {
        this.runs.delete(id);
        changed = true;
      }
    for (const summary of summaries) {
      if (this.runs.has(summary.id)) this.runs.get(summary.id).update(summary);
      else {
        this.runs.set(summary.id, new Run(summary));
        changed = true;
      }
    }
    this.runs = new Map([...this.runs.values()].sort((a, b) => a.name.localeCompare(b.name, "en", { numeric: true })).map((run) => [run.id, run]));
    [...this.runs.values()].forEach((run, i) => (run.place = i));
    this.parts.empty.hidden = this.runs.size > 0;
    for (const part of [this.parts.main, this.parts.side, this.parts.detail]) part.hidden = this.runs.size === 0;
    if (changed) this.changed();
  }

  /** Policies of records of one run, each fetched once. */
  async policies(run, indices) {
    const missing = indices.filter((index) => !run.details.has(index));
    if (missing.length) {
      const epoch = run.epoch;
      const found = await this.source.policies(run, missing);
      if (run.epoch === epoch) for (const detail of found) run.details.set(detail.index, detail);
    }
    return indices.map((index) => run.details.get(index)).filter(Boolean);
  }

  changed() {
    if (this.selected && !(this.selected.index < this.selected.run.count)) this.selected = null;
    this.metrics();
    this.gather();
    this.listRuns();
    const finals = this.selected?.run.finals.size;
    if (this.selected && finals !== this.finalsShown && this.detailOf === this.selected) this.showDetail();
    this.draw();
  }

  /** Offer the metrics that any run has. */
  metrics() {
    if (!this.shown.length) return;
    const has = (metric) => this.shown.some((run) => run.columns[metric].subarray(0, run.count).some(Number.isFinite));
    const names = Object.keys(METRICS).filter(has);
    const found = new Set(this.shown.map((run) => run.study.metric).filter(Boolean));
    this.scoreName = found.size === 1 ? ([...found][0] === "top1" ? "top-1 accuracy" : [...found][0]) : "score";
    this.percent = found.size === 1 && found.has("top1");
    const offered = `${names.join()}|${this.scoreName}`;
    if (offered === this.offered) return;
    this.offered = offered;
    for (const axis of ["x", "y"]) {
      const select = this.parts[axis];
      select.replaceChildren(...names.map((name) => element("option", { value: name }, this.metricName(name))));
      if (!names.includes(this.state[axis])) this.state[axis] = names.includes("score") && axis === "y" ? "score" : (names[0] ?? "score");
      select.value = this.state[axis];
    }
  }

  metricName(metric) {
    return metric === "score" ? (this.scoreName ?? "score") : METRICS[metric].name;
  }

  /** A metric's value on an axis: as it is, or as a share of the dense model's. */
  coordinate(run, metric, index) {
    const value = run.value(metric, index);
    return this.state.relative && metric !== "score" ? value / run.whole(metric) : value;
  }

  /** A score, or a standard error of one: percent with two decimals. */
  scoreText(value) {
    return this.percent && Number.isFinite(value) ? value.toFixed(2) : digits(value);
  }

  amount(metric, value, relative = this.state.relative && metric !== "score") {
    if (metric === "score") return `${this.scoreText(value)}${this.percent ? " %" : ""}`;
    return relative ? `${digits(value)}×` : amount(metric, value);
  }

  /** Whether an axis is logarithmic: as chosen, or where a cost spans more than a factor of four. */
  log(axis) {
    const chosen = this.state[axis === "x" ? "logX" : "logY"];
    if (chosen !== null) return chosen;
    if (this.state[axis] === "score") return false;
    let [low, high] = [Infinity, 0];
    for (const point of this.points) {
      const value = axis === "x" ? point.vx : point.vy;
      if (value > 0) [low, high] = [Math.min(low, value), Math.max(high, value)];
    }
    return high > 4 * low;
  }

  /** Points of the scatter, the front of each run, and the joint front. */
  gather() {
    const { x, y } = this.state;
    this.points = [];
    const [signX, signY] = [-METRICS[x].better, -METRICS[y].better];
    for (const run of this.shown) {
      const candidates = [];
      const named = new Set();
      for (let i = 0; i < run.count; i++) if (run.columns.kind[i] === KIND.control) named.add(run.text("label", i));
      for (let i = 0; i < run.count; i++) {
        const kind = run.columns.kind[i];
        if (kind === KIND.dense && named.has("dense")) continue;
        const point = { run, index: i, kind, vx: this.coordinate(run, x, i), vy: this.coordinate(run, y, i), feasible: run.columns.feasible[i] === 1, front: false, joint: false, order: i };
        if (!Number.isFinite(point.vx) || !Number.isFinite(point.vy)) continue;
        point.x = signX * point.vx;
        point.y = signY * point.vy;
        this.points.push(point);
        if (kind === KIND.trial && Number.isFinite(run.columns.score[i])) candidates.push(point);
      }
      run.front = nonDominated(candidates);
      for (const point of run.front) point.front = true;
    }
    this.joint = nonDominated(this.shown.flatMap((run) => run.front));
    for (const point of this.joint) point.joint = true;
    const reference = this.reference();
    for (const run of this.shown) run.volume = reference ? area(run.front, reference) / reference.span : NaN;
    this.volume = reference ? area(this.joint, reference) / reference.span : NaN;
    for (const axis of ["X", "Y"]) this.parts[`log${axis}`].checked = this[`log${axis}`] = this.log(axis.toLowerCase());
    this.places = new Map(this.shown.map((run) => [run, new Map()]));
    for (const point of this.points) this.places.get(point.run).set(point.index, point);
    this.best = new Map(this.shown.map((run) => [run, this.bestOf(run)]));
    this.brushed = this.brushed?.map((p) => this.where(p.run, p.index)).filter(Boolean) ?? null;
    if (this.brushed?.length === 0) this.brushed = null;
    this.version = (this.version ?? 0) + 1;
  }

  /** The point of a record, if it is on the scatter. */
  where(run, index) {
    return this.places.get(run)?.get(index);
  }

  /** The worst point that counts for the hypervolume: the budget's limit or the dense cost, and half of the dense score. */
  reference() {
    const ends = ["x", "y"].map((axis) => {
      const metric = this.state[axis];
      const values = this.shown.map((run) => {
        const whole = run.whole(metric);
        if (metric === "score") return whole;
        const limit = run.study.limits?.[metric] ?? whole;
        return this.state.relative ? limit / whole : limit;
      });
      const top = Math.max(...values.filter(Number.isFinite));
      return metric === "score" ? { at: -(top - (0.5 * Math.abs(top) || 1)), span: 0.5 * Math.abs(top) || 1 } : { at: top, span: top };
    });
    const span = ends[0].span * ends[1].span;
    return Number.isFinite(span) && span > 0 ? { x: ends[0].at, y: ends[1].at, span } : null;
  }

  /** The trial to take: of the feasible ones whose score ties with the highest, the cheapest in what the budget bounds first. */
  bestOf(run) {
    const free = run.study.floor === null || run.study.floor === undefined;
    const price = (free ? Object.keys(run.study.limits ?? {})[0] : null) ?? "latency_ms";
    const { kind, feasible, score, stderr } = run.columns;
    const able = [];
    for (let i = 0; i < run.count; i++) if (kind[i] === KIND.trial && feasible[i] === 1 && Number.isFinite(score[i])) able.push(i);
    if (!able.length) return -1;
    let floor = -Infinity;
    if (free) {
      const top = able.reduce((a, b) => (score[b] > score[a] ? b : a));
      floor = score[top] - (stderr[top] || 0);
    }
    return able.filter((i) => score[i] >= floor).reduce((a, b) => (run.value(price, b) < run.value(price, a) || (run.value(price, b) === run.value(price, a) && score[b] > score[a]) ? b : a));
  }

  // Colours

  watchTheme() {
    const outer = () => {
      try {
        return window.parent !== window ? window.parent.document.body : null;
      } catch {
        return null; // a parent of another origin
      }
    };
    const wish = window.matchMedia("(prefers-color-scheme: dark)");
    const apply = () => {
      const body = outer();
      document.documentElement.classList.toggle("dark", body ? body.classList.contains("dark-mode") : wish.matches);
      const style = getComputedStyle(document.documentElement);
      this.theme = (name) => style.getPropertyValue(`--${name}`).trim();
      this.palette = [0, 1, 2, 3, 4, 5].map((i) => this.theme(`c${i}`));
      this.scatter.sprites.clear();
      this.changed();
    };
    wish.addEventListener("change", apply);
    const body = outer();
    if (body) new MutationObserver(apply).observe(body, { attributes: true, attributeFilter: ["class"] });
    apply();
  }

  agents() {
    const names = new Set();
    for (const run of this.shown) for (let i = 0; i < run.count; i++) if (run.columns.kind[i] === KIND.trial) names.add(run.text("label", i));
    return [...names].sort();
  }

  /** Colour, shape and dash of a run: six colours, then the same again with another shape. */
  style(run) {
    const place = this.state.colour === "agent" ? this.agents_.indexOf(run.study.agent) : run.place;
    const i = Math.max(0, place);
    return { colour: this.palette[i % 6], shape: SHAPES[Math.floor(i / 6) % 4], dash: DASHES[Math.floor(i / 6) % 4] };
  }

  /** A colour between four stops, as CSS; `share` in [0, 1]. */
  ramp(prefix, share) {
    const at = clamp(Number.isFinite(share) ? share : 0, 0, 1) * 3;
    const low = Math.min(2, Math.floor(at));
    const [a, b] = [low, low + 1].map((i) => parseColour(this.theme(`${prefix}${i}`)));
    return `rgb(${a.map((v, i) => Math.round(v + (b[i] - v) * (at - low))).join(",")})`;
  }

  /** A text colour that can be read on `colour`. */
  textOn(colour) {
    const [r, g, b] = parseColour(colour).map((v) => (v / 255) ** 2.2);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.3 ? "#16202b" : "#ffffff";
  }

  // Doing

  select(run, index, announce = false) {
    if (run.columns.kind[index] === KIND.final) index = run.byNumber.get(run.columns.number[index]) ?? index;
    this.selected = { run, index };
    this.showDetail();
    this.scatter.marks();
    this.heat.mark();
    if (announce) this.say(this.describe(run, index).join(", "));
  }

  describe(run, index) {
    const lines = [`${run.title(index)} · ${run.name}`];
    for (const axis of ["y", "x"]) {
      const metric = this.state[axis];
      const error = metric === "score" ? run.value("stderr", index) : NaN;
      lines.push(`${this.metricName(metric)} ${this.amount(metric, this.coordinate(run, metric, index))}${Number.isFinite(error) && error > 0 ? ` ± ${this.scoreText(error)}` : ""}`);
    }
    for (const metric of ["score", "latency_ms", "size_bytes"]) if (metric !== this.state.x && metric !== this.state.y && Number.isFinite(run.value(metric, index))) lines.push(`${this.metricName(metric)} ${this.amount(metric, run.value(metric, index), false)}`);
    if (run.columns.kind[index] === KIND.trial) lines.push(`${run.text("label", index)}${run.columns.feasible[index] === 1 ? "" : " · not within the budget"}`);
    if (run.columns.simulated[index] === 1) lines.push("simulated");
    return lines;
  }

  say(text) {
    this.parts.live.textContent = text;
  }

  status(text) {
    this.parts.status.textContent = text ?? "";
    this.parts.status.hidden = !text;
  }

  set(key, value) {
    this.state[key] = value;
    if (["x", "y", "relative"].includes(key)) this.state.logX = this.state.logY = null;
    if (["x", "y", "logX", "logY", "relative"].includes(key)) this.scatter.view = null;
    this.changed();
  }

  draw() {
    if (this.drawing) return;
    this.drawing = requestAnimationFrame(() => {
      this.drawing = 0;
      if (!this.runs.size) return;
      this.scatter.draw();
      this.times.forEach((line) => line.draw());
      this.heat.update();
      this.listSelection();
    });
  }

  // Parts of the page

  build() {
    const parts = (this.parts = {});
    const select = (key, options, label) => element("label", { class: "field" }, label, element("select", { id: `choose-${key}`, change: (e) => this.set(key, e.target.value) }, options.map(([value, text]) => element("option", { value, selected: this.state[key] === value }, text))));
    const check = (key, label) => element("label", { class: "field" }, element("input", { type: "checkbox", id: `choose-${key}`, checked: this.state[key] === true, change: (e) => this.set(key, e.target.checked) }), label);
    const x = select("x", [], "x");
    const y = select("y", [], "y");
    const [logX, logY] = [check("logX", "log x"), check("logY", "log y")];
    [parts.x, parts.y, parts.logX, parts.logY] = [x, y, logX, logY].map((field) => field.querySelector("select, input"));
    const mode = ["pan", "select"].map((name) => element("button", { type: "button", "aria-pressed": String(name === this.state.mode), click: () => {
      this.state.mode = name;
      mode.forEach((button, i) => button.setAttribute("aria-pressed", String(["pan", "select"][i] === name)));
    } }, name === "pan" ? "Pan" : "Select"));
    const zoom = [["−", "Zoom out", () => this.scatter.zoom(1.4)], ["+", "Zoom in", () => this.scatter.zoom(1 / 1.4)], ["Front", "Zoom to the front", () => this.scatter.fit(true)], ["All", "Show all", () => this.scatter.fit(false)]];
    parts.scatter = element("div", { class: "plot scatter" });
    parts.legend = element("div", { class: "legend" });
    parts.notice = element("p", { class: "notice", hidden: true });
    parts.best = element("div", { class: "plot line" });
    parts.volume = element("div", { class: "plot line" });
    parts.heat = element("div");
    parts.selection = element("section", { class: "card", hidden: true, "aria-label": "Selected trials" });
    parts.main = element("main", { class: "main", hidden: true },
      element("section", { class: "card", "aria-label": "All trials and the front" },
        element("header", {}, element("h2", {}, "Trials and front"), x, y, logX, logY, check("relative", "× dense"), check("errors", "error bars"),
          select("colour", [["run", "run"], ["agent", "agent"], ["number", "trial number"]], "colour"),
          element("span", { class: "buttons", role: "group", "aria-label": "Dragging" }, mode),
          element("span", { class: "buttons", role: "group", "aria-label": "Zoom" }, zoom.map(([text, label, click]) => element("button", { type: "button", "aria-label": label, title: label, click }, text)))),
        parts.notice, parts.scatter, parts.legend,
        element("p", { class: "hint" }, "Click a point for its policy. Drag to pan, Shift + drag to select, Ctrl + wheel to zoom. With the plot focused: ← → walk the front, Home and End its ends, Enter opens, + − zoom, 0 shows all.")),
      parts.selection,
      element("section", { class: "card", "aria-label": "Policies from cheapest to best" }, parts.heat),
      element("section", { class: "card", "aria-label": "Over time" },
        element("header", {}, element("h2", {}, "Over time"), select("clock", [["trials", "trials"], ["cpu", "CPU seconds"]], "over")),
        parts.best, parts.volume));
    parts.list = element("ul");
    parts.total = element("p", { class: "hint" });
    parts.side = element("aside", { class: "card runs", hidden: true, "aria-label": "Runs" },
      element("header", {}, element("h2", {}, "Runs"), element("span", { class: "buttons" },
        element("button", { type: "button", click: () => this.showRuns(true) }, "All"), element("button", { type: "button", click: () => this.showRuns(false) }, "None"))),
      parts.list, parts.total);
    parts.detail = element("aside", { class: "card detail", hidden: true, "aria-label": "Policy", tabindex: "-1" });
    parts.empty = element("div", { class: "empty", hidden: true }, element("h2", {}, "No search here yet"), element("p", {}, "Run ", element("code", {}, "tightrope search net.yaml --budget \"latency<=0.5x\""), " with its run folder below this log folder. Trials appear here by themselves."));
    parts.status = element("p", { class: "notice", hidden: true, role: "status", style: "grid-column: 1 / -1; margin: 0" });
    parts.live = element("div", { class: "hidden", "aria-live": "polite" });
    this.root.append(element("div", { class: "page" }, parts.status, parts.empty, parts.side, parts.main, parts.detail, parts.live));
    this.showDetail();
  }

  showRuns(visible) {
    for (const run of this.runs.values()) run.visible = visible;
    this.changed();
  }

  mark(run, filled = true) {
    const { colour, shape: d } = this.style(run);
    return shape("svg", { class: "mark", viewBox: "-8 -8 16 16", "aria-hidden": "true" }, shape("path", { d, fill: filled ? colour : "none", stroke: colour }));
  }

  listRuns() {
    this.agents_ = this.agents();
    const focused = document.activeElement?.dataset?.run;
    this.parts.list.replaceChildren(...[...this.runs.values()].map((run) => {
      const share = run.visible && run.front ? run.front.filter((point) => point.joint).length : 0;
      const { kind, failed } = run.columns;
      let trials = 0, lost = 0;
      for (let i = 0; i < run.count; i++) if (kind[i] === KIND.trial) { trials++; if (Number.isFinite(failed[i])) lost++; }
      const of = this.shown.length > 1 ? ` · joint front ${share} of ${this.joint.length}` : "";
      const facts = [[run.study.agent, run.study.device].filter(Boolean).join(" on "), `${trials.toLocaleString("en-GB")} trials${lost ? `, ${lost} failed` : ""}`];
      if (run.visible && run.count) facts.push(`front ${run.front.length}${of}`, `hypervolume ${digits(run.volume, 4)}`);
      if (run.bad) facts.push(`${run.bad} unreadable lines`);
      if (this.runs.size > 6) facts.splice(0, 2, facts.slice(0, 2).join(" · ")); // many runs: fewer lines each
      const box = element("input", { type: "checkbox", checked: run.visible, "data-run": run.id, change: (e) => { run.visible = e.target.checked; this.changed(); } });
      return element("li", {}, element("label", {}, box, this.mark(run), element("span", { class: "name", title: run.name }, run.name),
        run.study.simulated ? element("span", { class: "facts" }, element("span", { class: "badge loud" }, "simulated")) : null,
        facts.map((fact) => element("span", { class: "facts" }, fact))));
    }));
    if (focused) this.parts.list.querySelector(`[data-run="${focused}"]`)?.focus();
    const several = this.shown.length > 1;
    this.parts.total.textContent = several ? `Joint front of ${this.joint.length}, hypervolume ${digits(this.volume, 4)}.` : "";
    const differ = ["device", "network"].filter((key) => new Set(this.shown.map((run) => run.study[key])).size > 1);
    this.parts.notice.hidden = differ.length === 0;
    this.parts.notice.textContent = differ.length ? `The runs shown are for different ${differ.map((key) => (key === "device" ? "devices" : "networks")).join(" and ")}: compare their costs with care.` : "";
    this.legend();
  }

  legend() {
    const entry = (d, attributes, text) => element("span", {}, shape("svg", { class: "mark", viewBox: "-8 -8 16 16", "aria-hidden": "true" }, shape("path", { d, ...attributes })), text);
    const parts = [];
    if (this.state.colour === "number") parts.push(element("span", {}, "first trial ", element("i", { class: "ramp", style: `background: linear-gradient(90deg, ${[0, 1, 2, 3].map((i) => this.theme(`n${i}`)).join(",")})` }), " last"));
    else if (this.state.colour === "agent") parts.push(...this.agents_.map((agent, i) => entry(SHAPES[Math.floor(i / 6) % 4], { fill: this.palette[i % 6] }, agent)));
    parts.push(entry(SHAPES[0], { fill: this.theme("infeasible"), opacity: 0.7 }, "not within the budget"));
    const controls = new Set(this.points.filter((p) => p.kind === KIND.control || p.kind === KIND.dense).map((p) => p.run.text("label", p.index)));
    for (const name of controls) parts.push(entry(CONTROL_SHAPES[name] ?? SHAPES[1], { fill: this.theme("ink") }, name));
    if (this.points.some((p) => this.best.get(p.run) === p.index)) parts.push(element("span", {}, shape("svg", { class: "mark", viewBox: "-8 -8 16 16", "aria-hidden": "true" }, shape("circle", { r: 6, fill: "none", stroke: this.theme("ink"), "stroke-width": 2 })), "best"));
    if (this.points.some((p) => p.kind === KIND.final)) parts.push(entry("M-5,0H5M0,-5V5", { stroke: this.theme("ink"), "stroke-width": 2 }, "fine-tuned"));
    this.parts.legend.replaceChildren(...parts);
  }

  listSelection() {
    const card = this.parts.selection;
    const points = this.brushed;
    card.hidden = !points;
    if (!points) return void card.replaceChildren();
    const key = points.map((p) => `${p.run.id}.${p.index}`).join();
    if (card.dataset.key === key) return;
    card.dataset.key = key;
    const rows = [...points].sort((a, b) => a.y - b.y || a.x - b.x).slice(0, 200);
    const open = (p) => this.select(p.run, p.index);
    card.replaceChildren(
      element("header", {}, element("h2", {}, `${points.length.toLocaleString("en-GB")} selected`),
        element("button", { type: "button", click: () => this.scatter.fitTo(points) }, "Zoom to them"),
        element("button", { type: "button", click: () => { this.brushed = null; this.changed(); } }, "Clear")),
      element("div", { class: "scroll", style: "max-height: 14rem" }, element("table", { class: "selection" },
        element("thead", {}, element("tr", {}, ["Trial", "Run", "Agent"].map((t) => element("th", { scope: "col" }, t)), ["y", "x"].map((axis) => element("th", { class: "number", scope: "col" }, this.metricName(this.state[axis]))))),
        element("tbody", {}, rows.map((p) => element("tr", { click: () => open(p) },
          element("td", {}, element("button", { type: "button", click: () => open(p) }, p.kind === KIND.trial ? p.run.columns.number[p.index] : p.run.title(p.index))),
          element("td", {}, p.run.name), element("td", {}, p.kind === KIND.trial ? p.run.text("label", p.index) : ""),
          element("td", { class: "number" }, this.amount(this.state.y, p.vy)), element("td", { class: "number" }, this.amount(this.state.x, p.vx))))))),
      points.length > rows.length ? element("p", { class: "hint" }, `The first ${rows.length} by ${this.metricName(this.state.y)}.`) : "");
  }

  async showDetail() {
    const card = this.parts.detail;
    if (!this.selected) return void card.replaceChildren(element("h2", {}, "Policy"), element("p", { class: "muted" }, "Click a point: its policy stands here layer by layer, with what it costs and the command that exports it."));
    const { run, index } = this.selected;
    let detail, pinned;
    try {
      [detail] = await this.policies(run, [index]);
      if (this.pinned && this.pinned.index < this.pinned.run.count) [pinned] = await this.policies(this.pinned.run, [this.pinned.index]);
    } catch (error) {
      detail = { policy: null, layers: null, problem: error.message };
    }
    if (this.selected?.run !== run || this.selected.index !== index) return; // another click came first
    if (this.pinned?.run === run && this.pinned.index === index) pinned = null;
    card.replaceChildren(...this.detail(run, index, detail, pinned));
    this.detailOf = this.selected;
    this.finalsShown = run.finals.size;
  }

  detail(run, index, detail, pinned) {
    const trial = run.columns.kind[index] === KIND.trial;
    const number = run.columns.number[index];
    const flags = [];
    if (run.columns.simulated[index] === 1) flags.push(["simulated", "loud"]);
    if (run.columns.extrapolated[index] === 1) flags.push(["extrapolated", "loud"]);
    if (this.best.get(run) === index) flags.push(["best", ""]);
    if (run.front?.some((p) => p.index === index)) flags.push(["front", ""]);
    if (trial && run.columns.feasible[index] !== 1) flags.push([Number.isFinite(run.columns.failed[index]) ? "failed" : "not within the budget", "loud"]);
    const isPinned = this.pinned?.run === run && this.pinned.index === index;
    const head = element("header", {}, element("h2", {}, run.title(index)), ...flags.map(([text, kind]) => element("span", { class: `badge ${kind}` }, text)),
      element("button", { type: "button", "aria-pressed": String(isPinned), title: "Compare other policies with this one", click: () => { this.pinned = isPinned ? null : { run, index }; this.showDetail(); this.scatter.marks(); } }, isPinned ? "Pinned" : "Pin"));
    const where = element("div", { class: "where muted" }, this.mark(run), ` ${run.name}`, trial ? ` · ${run.text("label", index)}` : "", run.study.budget?.length ? ` · budget ${run.study.budget.join(", ")}` : "");
    const nodes = [head, where];
    if (Number.isFinite(run.columns.failed[index])) nodes.push(element("p", { class: "notice" }, `Failed: ${run.text("failed", index)}`));
    nodes.push(this.figures(run, index, pinned));
    if (trial) nodes.push(this.exporting(run, number, detail));
    if (detail?.problem) nodes.push(element("p", { class: "notice" }, detail.problem));
    if (detail?.layers) nodes.push(this.policyTable(detail, pinned));
    return nodes;
  }

  figures(run, index, pinned) {
    const other = pinned ? this.pinned : null;
    const final = run.columns.kind[index] === KIND.trial ? run.finals.get(run.columns.number[index]) : undefined;
    const rows = [];
    for (const metric of Object.keys(METRICS)) {
      const value = run.value(metric, index);
      if (!Number.isFinite(value)) continue;
      const whole = run.whole(metric);
      let text = this.amount(metric, value, false);
      if (metric === "score" && Number.isFinite(run.value("stderr", index))) text += ` ± ${this.scoreText(run.value("stderr", index))}`;
      const cells = [text, ""];
      if (Number.isFinite(whole)) cells[1] = metric === "score" ? signed(value - whole) : `${digits(value / whole, 3)}×`;
      if (other) {
        const base = other.run.value(metric, other.index);
        cells.push(!Number.isFinite(base) ? "–" : metric === "score" ? signed(value - base) : `${signed(100 * (value / base - 1))} %`);
      }
      rows.push([this.metricName(metric), cells]);
      const [low, high] = [run.value("low_ms", index), run.value("high_ms", index)];
      if (metric === "latency_ms" && Number.isFinite(low) && high > low) rows.push(["  90 % interval", [`${amount(metric, low)} – ${amount(metric, high)}`, "", ...(other ? [""] : [])]]);
    }
    if (final !== undefined) {
      rows.push(["fine-tuned: score", [`${this.amount("score", run.value("score", final))} ± ${this.scoreText(run.value("stderr", final))}`, signed(run.value("score", final) - run.whole("score")), ...(other ? [""] : [])]]);
      if (Number.isFinite(run.value("ratio", final))) rows.push(["fine-tuned: measured", [`${digits(run.value("ratio_low", final), 3)} – ${digits(run.value("ratio_high", final), 3)}×`, `${digits(run.value("ratio", final), 3)}×`, ...(other ? [""] : [])]]);
    }
    const table = element("table", {}, element("thead", {}, element("tr", {}, element("th", { scope: "col" }, ""), element("th", { class: "number", scope: "col" }, "value"), element("th", { class: "number", scope: "col" }, "to dense"), other ? element("th", { class: "number", scope: "col", title: `${other.run.title(other.index)} of ${other.run.name}` }, "to the pinned") : null)),
      element("tbody", {}, rows.map(([name, cells]) => element("tr", {}, element("td", { class: name.startsWith(" ") ? "muted" : "" }, name), cells.map((cell) => element("td", { class: "number" }, cell))))));
    const source = run.text("provenance", index);
    return element("section", {}, table, source ? element("p", { class: "hint" }, `Cost by ${source}${run.columns.simulated[index] === 1 ? " (simulated: a model, not a clock)" : ""}`) : null);
  }

  exporting(run, number, detail) {
    const command = `${run.command} --trial ${number} --format onnx`;
    const copy = element("button", { type: "button", click: async () => {
      try {
        await navigator.clipboard.writeText(command);
        copy.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(code);
        copy.textContent = "Press Ctrl + C";
      }
      setTimeout(() => (copy.textContent = "Copy"), 1500);
    } }, "Copy");
    const code = element("code", {}, command);
    const save = element("button", { type: "button", disabled: !detail?.policy, click: () => {
      const url = URL.createObjectURL(new Blob([`${JSON.stringify(detail.policy, null, 1)}\n`], { type: "application/json" }));
      element("a", { href: url, download: `policy-${number}.json` }).click();
      setTimeout(() => URL.revokeObjectURL(url), 1000);
    } }, "policy.json");
    return element("section", {}, element("div", { class: "command" }, code, copy, save));
  }

  policyTable(detail, pinned) {
    const timed = detail.latency && typeof detail.latency === "object";
    const total = (key) => detail.layers.reduce((sum, layer) => sum + layer[key], 0) || 1;
    const shares = [["macs", "MACs", (layer) => layer.macs / total("macs")], ["size", "size", (layer) => layer.size_bytes / total("size_bytes")]];
    if (timed) {
      const all = Object.values(detail.latency).reduce((a, b) => a + Number(b), 0) || 1;
      shares[0] = ["latency", "latency", (layer) => Number(detail.latency[layer.name] ?? 0) / all];
    }
    const tops = shares.map(([, , share]) => Math.max(...detail.layers.map(share), 1e-9));
    const before = new Map((pinned?.layers ?? []).map((layer) => [layer.name, layer]));
    const bar = (share, text, className = "", was = null) => element("div", { class: `bar ${className}` }, element("i", { style: `width:${(100 * clamp(share, 0, 1)).toFixed(1)}%` }), was === null ? null : element("u", { style: `left:${(100 * clamp(was, 0, 1)).toFixed(1)}%` }), element("span", {}, text));
    const bits = (value, old) => {
      const colour = this.ramp("heat", bitShare(value));
      return element("td", { class: "bits" }, element("span", { style: `background:${colour};color:${this.textOn(colour)}`, title: value === 32 ? "floating point" : `${value} bits` }, value === 32 ? "fp" : value), old !== undefined && old !== value ? element("small", { class: "was" }, `(${old === 32 ? "fp" : old})`) : null);
    };
    const row = (layer) => {
      const old = before.get(layer.name);
      const changed = old && ["channels", "rank", "form", "weight_bits", "act_bits"].some((key) => old[key] !== layer[key]);
      return element("tr", { class: changed ? "changed" : "", "data-layer": layer.name },
        element("td", { class: "layer", title: `${layer.name} · ${layer.kind} ${layer.kernel.join("×")}` }, element("bdi", {}, layer.name)),
        element("td", { title: `${layer.channels} of ${layer.of_channels} channels${old && old.channels !== layer.channels ? `, pinned ${old.channels}` : ""}` }, bar(layer.channels / layer.of_channels, `${layer.channels}/${layer.of_channels}`, "", old && old.channels !== layer.channels ? old.channels / old.of_channels : null)),
        element("td", { title: layer.rank ? `rank ${layer.rank} of ${layer.of_rank}, ${layer.form}` : "not factorised" }, layer.rank ? bar(layer.rank / layer.of_rank, `${layer.rank}/${layer.of_rank}`) : element("span", { class: "muted" }, "–"), old && old.rank !== layer.rank ? element("small", { class: "was" }, `(${old.rank ?? "whole"})`) : null),
        bits(layer.weight_bits, old?.weight_bits), bits(layer.act_bits, old?.act_bits),
        shares.map(([key, name, share], i) => element("td", { title: `${digits(100 * share(layer), 3)} % of ${name}` }, bar(share(layer) / tops[i], share(layer) < 0.001 ? "<0.1%" : `${digits(100 * share(layer), 2)}%`, "share"))));
    };
    const heads = ["layer", "channels", "rank"].map((t) => element("th", { scope: "col" }, t));
    return element("section", {}, element("h3", {}, pinned ? `Policy, and in brackets that of ${this.pinned.run.title(this.pinned.index).toLowerCase()}` : "Policy"),
      element("table", { class: "policy" }, element("thead", {}, element("tr", {}, heads, ["W", "A"].map((t) => element("th", { class: "bits", scope: "col", title: t === "W" ? "weight bits" : "activation bits" }, t)), shares.map(([, name]) => element("th", { scope: "col", title: `share of ${name}` }, name)))),
        element("tbody", {}, detail.layers.map(row))),
      element("p", { class: "hint" }, "W, A: bits of weights and activations (fp: floating point). Bars on the right: the layer’s share of the compressed model", timed ? "." : "; latency by layer is kept for the front only."));
  }
}

function parseColour(text) {
  if (text.startsWith("#")) return [1, 3, 5].map((i) => parseInt(text.slice(i, i + 2), 16));
  return text.match(/[\d.]+/g).slice(0, 3).map(Number);
}

/** Bits on a scale from 0 to 1: 2 bits near 0, 8 at two thirds, floating point at 1. */
function bitShare(bits) {
  return bits >= 32 ? 1 : clamp((bits - 1) / 10.5, 0, 1);
}

// --- plots ----------------------------------------------------------------------------------------------------------

class Plot {
  constructor(app, host) {
    this.app = app;
    this.host = host;
    this.svg = shape("svg", { "aria-hidden": "true" });
    this.tip = element("div", { class: "tip", hidden: true });
    host.append(this.svg, this.tip);
  }

  measure() {
    const { width, height } = this.host.getBoundingClientRect();
    this.width = Math.max(200, width);
    this.height = Math.max(120, height);
    this.svg.setAttribute("viewBox", `0 0 ${this.width} ${this.height}`);
    this.box = { left: MARGIN.left, right: this.width - MARGIN.right, top: MARGIN.top, bottom: this.height - MARGIN.bottom };
  }

  px(x) {
    return this.box.left + ((x - this.view.x[0]) / (this.view.x[1] - this.view.x[0])) * (this.box.right - this.box.left);
  }

  py(y) {
    return this.box.bottom - ((y - this.view.y[0]) / (this.view.y[1] - this.view.y[0])) * (this.box.bottom - this.box.top);
  }

  axes(xTitle, yTitle, { logX = false, logY = false, divX = 1, divY = 1 } = {}) {
    const { left, right, top, bottom } = this.box;
    const nodes = [];
    const shift = (ends, log, by) => (log ? ends.map((v) => v - Math.log10(by)) : ends.map((v) => v / by));
    const back = (at, log, by) => (log ? at + Math.log10(by) : at * by);
    for (const [at, text] of ticks(...shift(this.view.x, logX, divX), logX, Math.max(3, (right - left) / 90))) {
      const x = this.px(back(at, logX, divX));
      nodes.push(shape("line", { class: "grid", x1: x, x2: x, y1: top, y2: bottom }), shape("text", { x, y: bottom + 16, "text-anchor": "middle" }, text));
    }
    for (const [at, text] of ticks(...shift(this.view.y, logY, divY), logY, Math.max(3, (bottom - top) / 45))) {
      const y = this.py(back(at, logY, divY));
      nodes.push(shape("line", { class: "grid", x1: left, x2: right, y1: y, y2: y }), shape("text", { x: left - 8, y: y + 4, "text-anchor": "end" }, text));
    }
    nodes.push(shape("line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom }), shape("line", { class: "axis", x1: left, x2: left, y1: top, y2: bottom }),
      shape("text", { class: "title", x: (left + right) / 2, y: this.height - 8, "text-anchor": "middle" }, xTitle),
      shape("text", { class: "title", x: -(top + bottom) / 2, y: 16, transform: "rotate(-90)", "text-anchor": "middle" }, yTitle));
    return nodes;
  }

  showTip(x, y, lines) {
    const [title, ...rest] = lines;
    this.tip.replaceChildren(element("b", {}, title), ...rest.map((line) => element("div", {}, line)));
    this.tip.hidden = false;
    const { offsetWidth: w, offsetHeight: h } = this.tip;
    this.tip.style.left = `${clamp(x + 14, 0, Math.max(0, this.width - w))}px`;
    this.tip.style.top = `${clamp(y - h - 10 < 0 ? y + 14 : y - h - 10, 0, Math.max(0, this.height - h))}px`;
  }
}

class Scatter extends Plot {
  constructor(app, host) {
    super(app, host);
    this.canvas = element("canvas", { "aria-hidden": "true" });
    host.insertBefore(this.canvas, this.svg);
    this.sprites = new Map();
    this.view = null;
    this.serial = 0;
    for (const name of ["under", "points", "over", "marked"]) this.svg.append((this[name] = shape("g")));
    host.setAttribute("tabindex", "0");
    host.setAttribute("role", "application");
    host.setAttribute("aria-label", "Scatter of all trials with the front. Arrow keys walk the front, Enter opens a policy, plus and minus zoom, 0 shows all.");
    host.addEventListener("pointerdown", (e) => this.down(e));
    host.addEventListener("pointermove", (e) => this.move(e));
    host.addEventListener("pointerup", (e) => this.up(e));
    host.addEventListener("pointercancel", () => this.cancel());
    host.addEventListener("pointerleave", () => this.hover(null));
    host.addEventListener("dblclick", () => this.fit(false));
    host.addEventListener("wheel", (e) => this.wheel(e), { passive: false });
    host.addEventListener("keydown", (e) => this.key(e));
  }

  // View

  at(point) {
    const { logX, logY } = this.app;
    return [logX ? Math.log10(point.vx) : point.vx, logY ? Math.log10(point.vy) : point.vy];
  }

  fit(front) {
    this.fitTo(front ? (this.app.joint.length ? this.app.joint : this.app.points) : null);
  }

  /** Show these points; all of them, and what is to come, for null. */
  fitTo(points) {
    this.follow = points === null;
    this.view = this.around(points ?? this.app.points);
    this.draw();
  }

  around(points) {
    const ends = [[Infinity, -Infinity], [Infinity, -Infinity]];
    for (const point of points)
      this.at(point).forEach((v, i) => {
        if (!Number.isFinite(v)) return;
        ends[i][0] = Math.min(ends[i][0], v);
        ends[i][1] = Math.max(ends[i][1], v);
      });
    return Object.fromEntries(ends.map(([low, high], i) => {
      if (low > high) [low, high] = [0, 1];
      const pad = (high - low || Math.abs(high) * 0.1 || 1) * 0.06;
      return [["x", "y"][i], [low - pad, high + pad]];
    }));
  }

  zoom(factor, x = (this.box.left + this.box.right) / 2, y = (this.box.top + this.box.bottom) / 2) {
    const shares = { x: (x - this.box.left) / (this.box.right - this.box.left), y: (this.box.bottom - y) / (this.box.bottom - this.box.top) };
    for (const axis of ["x", "y"]) {
      const [low, high] = this.view[axis];
      const at = low + (high - low) * shares[axis];
      this.view[axis] = [at - (at - low) * factor, at + (high - at) * factor];
    }
    this.follow = false;
    this.queue();
  }

  queue() {
    this.queued ??= requestAnimationFrame(() => {
      this.queued = undefined;
      this.draw(true);
    });
    clearTimeout(this.rest);
    this.rest = setTimeout(() => this.draw(), 150);
  }

  // Drawing

  /** Draw all; while the plot moves, fewer points and no error bars. */
  draw(moving = false) {
    const { app } = this;
    if (!app.points) return;
    this.measure();
    if (!this.view || this.follow !== false) {
      this.view = this.around(app.points);
      this.follow = true;
    }
    const { x, y } = app.state;
    const { logX, logY } = app;
    const scale = (metric, ends, log) => {
      if (metric === "score" || app.state.relative) return [app.metricName(metric) + (metric === "score" ? (app.percent ? " (%)" : "") : " (× dense)"), 1];
      const [unit, size] = unitFor(metric, log ? 10 ** ((ends[0] + ends[1]) / 2) : Math.max(Math.abs(ends[0]), Math.abs(ends[1])));
      return [app.metricName(metric) + (unit ? ` (${unit})` : ""), size];
    };
    const [xTitle, divX] = scale(x, this.view.x, logX);
    const [yTitle, divY] = scale(y, this.view.y, logY);
    const { left, right, top, bottom } = this.box;
    const clip = shape("clipPath", { id: "scatter-clip" }, shape("rect", { x: left, y: top, width: right - left, height: bottom - top }));
    this.under.replaceChildren(clip, ...this.axes(xTitle, yTitle, { logX, logY, divX, divY }), ...this.limits(), ...this.fronts());
    for (const group of [this.points, this.over, this.marked]) group.setAttribute("clip-path", "url(#scatter-clip)");
    this.place();
    this.drawPoints(moving);
    this.over.replaceChildren(...(moving ? [] : this.errorBars()), ...this.controls(), ...this.bestMarks());
    this.marks();
    this.host.dataset.drawn = String(this.drawnTrials);
    this.host.dataset.ready = String(++this.serial);
  }

  /** Pixels of every point. */
  place() {
    for (const point of this.app.points) {
      const [x, y] = this.at(point);
      point.sx = this.px(x);
      point.sy = this.py(y);
    }
  }

  look(point) {
    const { app } = this;
    const { colour } = app.state;
    const base = app.style(point.run);
    if (!point.feasible && !point.front) return { d: base.shape, colour: app.theme("infeasible"), alpha: 0.45, size: 0.75 };
    if (!point.feasible) return { d: base.shape, colour: app.theme("infeasible"), alpha: 1, size: 1.1 };
    let tint = base.colour;
    let d = base.shape;
    if (colour === "number") {
      const share = point.run.columns.number[point.index] / (point.run.lastNumber || 1);
      tint = app.ramp("n", Math.round(share * 24) / 24);
    } else if (colour === "agent") {
      const i = Math.max(0, app.agents_.indexOf(point.run.text("label", point.index)));
      tint = app.palette[i % 6];
      d = SHAPES[Math.floor(i / 6) % 4];
    }
    return { d, colour: tint, alpha: point.front ? 1 : 0.5, size: point.front ? 1.15 : 0.8 };
  }

  /** Work out how each trial looks; on a canvas where they are many, the front always as elements. */
  rebuild() {
    const { app } = this;
    const trials = app.points.filter((p) => p.kind === KIND.trial);
    const thick = trials.length > MOST_ELEMENTS;
    const order = (p) => (p.front ? 2 : p.feasible ? 1 : 0);
    const dim = app.brushed ? new Set(app.brushed) : null;
    const card = app.theme("card");
    const ratio = window.devicePixelRatio || 1;
    const sorted = trials.sort((a, b) => order(a) - order(b));
    const looks = sorted.map((p) => {
      const look = this.look(p);
      if (dim && !dim.has(p)) look.alpha *= 0.25;
      return look;
    });
    this.nodes = [];
    this.cloud = [];
    sorted.forEach((p, i) => {
      const { d, colour, alpha, size } = looks[i];
      if (thick && !p.front) return void this.cloud.push([p, this.sprite(looks[i], ratio)]);
      const node = shape("path", { class: `trial${p.front ? " on-front" : ""}${p.feasible ? "" : " infeasible"}`, d, fill: colour, "fill-opacity": alpha, stroke: p.front ? card : "none", "stroke-width": 1, "data-number": p.run.columns.number[p.index] });
      this.nodes.push([p, node, ` scale(${size})`]);
    });
    this.points.replaceChildren(...this.nodes.map(([, node]) => node));
    this.ratio = ratio;
    this.built = app.version;
    if (thick) this.shuffle();
  }

  /** Mix the cloud, so that every nth of it is a fair picture of all. */
  shuffle() {
    let seed = 1;
    for (let i = this.cloud.length - 1; i > 0; i--) {
      seed = (seed * 48271) % 2147483647;
      const j = seed % (i + 1);
      [this.cloud[i], this.cloud[j]] = [this.cloud[j], this.cloud[i]];
    }
  }

  drawPoints(moving) {
    if (this.built !== this.app.version || this.ratio !== (window.devicePixelRatio || 1)) this.rebuild();
    for (const [p, node, scale] of this.nodes) node.setAttribute("transform", `translate(${p.sx.toFixed(1)},${p.sy.toFixed(1)})${scale}`);
    const { ratio, cloud } = this;
    const [w, h] = [Math.round(this.width * ratio), Math.round(this.height * ratio)];
    if (this.canvas.width !== w || this.canvas.height !== h) [this.canvas.width, this.canvas.height] = [w, h];
    const context = this.canvas.getContext("2d");
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, w, h);
    this.drawnTrials = this.nodes.length + cloud.length;
    if (!cloud.length) return;
    const { left, right, top, bottom } = this.box;
    context.save();
    context.beginPath();
    context.rect(left * ratio, top * ratio, (right - left) * ratio, (bottom - top) * ratio);
    context.clip();
    const most = moving ? Math.min(cloud.length, MOST_MOVING) : cloud.length;
    for (let i = 0; i < most; i++) {
      const [p, sprite] = cloud[i];
      if (p.sx < left - 5 || p.sx > right + 5 || p.sy < top - 5 || p.sy > bottom + 5) continue;
      context.drawImage(sprite, Math.round(p.sx * ratio - sprite.width / 2), Math.round(p.sy * ratio - sprite.height / 2));
    }
    context.restore();
  }

  /** A small picture of a point, drawn once and stamped often. */
  sprite({ d, colour, size, alpha }, ratio) {
    const key = `${d}|${colour}|${alpha}|${size}|${ratio}`;
    let sprite = this.sprites.get(key);
    if (!sprite) {
      sprite = element("canvas");
      sprite.width = sprite.height = Math.ceil(12 * size * ratio);
      const context = sprite.getContext("2d");
      context.translate(sprite.width / 2, sprite.height / 2);
      context.scale(size * 0.85 * ratio, size * 0.85 * ratio);
      context.globalAlpha = alpha;
      context.fillStyle = colour;
      context.fill(new Path2D(d));
      this.sprites.set(key, sprite);
    }
    return sprite;
  }

  /** Path of a stepped front, drawn out to the edges of the plot where it is dominated from. */
  stepped(front) {
    const { app } = this;
    const { left, right, top, bottom } = this.box;
    const worseX = METRICS[app.state.x].better < 0 ? right : left;
    const worseY = METRICS[app.state.y].better < 0 ? top : bottom;
    const at = front.map((p) => this.at(p)).map(([x, y]) => [this.px(x), this.py(y)]);
    const f = (v) => v.toFixed(1);
    return `M${f(at[0][0])},${f(worseY)}V${f(at[0][1])}${at.slice(1).map(([x, y]) => `H${f(x)}V${f(y)}`).join("")}H${f(worseX)}`;
  }

  fronts() {
    const { app } = this;
    const nodes = [];
    const clip = { "clip-path": "url(#scatter-clip)" };
    if (app.shown.length > 1 && app.joint.length) nodes.push(shape("path", { class: "joint", d: this.stepped(app.joint), ...clip }));
    for (const run of app.shown) {
      if (!run.front.length) continue;
      const { colour, dash } = app.style(run);
      nodes.push(shape("path", { class: "front", d: this.stepped(run.front), stroke: app.state.colour === "number" && app.shown.length === 1 ? app.theme("muted") : colour, "stroke-dasharray": dash || null, ...clip }));
    }
    return nodes;
  }

  limits() {
    const { app } = this;
    const { left, right, top, bottom } = this.box;
    const nodes = [];
    const seen = new Set();
    for (const run of app.shown)
      for (const axis of ["x", "y"]) {
        const metric = app.state[axis];
        let value = run.study.limits?.[metric];
        let text = run.study.budget?.find((t) => t.startsWith({ latency_ms: "latency", energy_mj: "energy", size_bytes: "size", peak_ram_bytes: "ram", macs: "macs" }[metric] ?? "accuracy")) ?? "budget";
        if (metric === "score") value = Number.isFinite(run.study.floor ?? NaN) ? run.whole("score") + run.study.floor : NaN;
        else if (app.state.relative) value /= run.whole(metric);
        const at = app[axis === "x" ? "logX" : "logY"] ? Math.log10(value) : value;
        if (!Number.isFinite(at)) continue;
        const p = axis === "x" ? this.px(at) : this.py(at);
        const key = `${axis}${p.toFixed(0)}`;
        if (seen.has(key) || (axis === "x" ? p < left || p > right : p < top || p > bottom)) continue;
        seen.add(key);
        const flip = p > right - 110;
        nodes.push(axis === "x"
          ? shape("g", {}, shape("line", { class: "budget", x1: p, x2: p, y1: top, y2: bottom }), shape("text", { class: "budget-text halo", x: flip ? p - 5 : p + 5, y: bottom - 8, "text-anchor": flip ? "end" : "start" }, text))
          : shape("g", {}, shape("line", { class: "budget", x1: left, x2: right, y1: p, y2: p }), shape("text", { class: "budget-text halo", x: right - 6, y: p - 5, "text-anchor": "end" }, text)));
      }
    return nodes;
  }

  errorBar(point) {
    const { app } = this;
    const { run, index } = point;
    const nodes = [];
    const colour = point.kind === KIND.trial && point.feasible ? app.style(run).colour : app.theme("muted");
    const line = (x1, y1, x2, y2) => nodes.push(shape("path", { class: "error", stroke: colour, d: x1 === x2 ? `M${x1},${y1}V${y2}M${x1 - 3},${y1}h6M${x1 - 3},${y2}h6` : `M${x1},${y1}H${x2}M${x1},${y1 - 3}v6M${x2},${y1 - 3}v6` }));
    for (const axis of ["x", "y"]) {
      const metric = app.state[axis];
      const log = app[axis === "x" ? "logX" : "logY"];
      let ends = null;
      if (metric === "score" && run.value("stderr", index) > 0) ends = [-1, 1].map((s) => run.value("score", index) + s * run.value("stderr", index));
      if (metric === "latency_ms" && run.value("high_ms", index) > run.value("low_ms", index)) ends = ["low_ms", "high_ms"].map((k) => run.value(k, index) / (app.state.relative ? run.whole(metric) : 1));
      if (!ends) continue;
      const at = ends.map((v) => (log ? Math.log10(v) : v));
      if (!at.every(Number.isFinite)) continue;
      if (axis === "x") line(this.px(at[0]), point.sy, this.px(at[1]), point.sy);
      else line(point.sx, this.py(at[0]), point.sx, this.py(at[1]));
    }
    return nodes;
  }

  errorBars() {
    const { app } = this;
    if (!app.state.errors) return [];
    const few = app.points.length <= 60;
    const many = app.shown.length > 4;
    return app.points.filter((p) => (many ? p.joint : p.front || p.kind === KIND.control) || few).flatMap((p) => this.errorBar(p));
  }

  controls() {
    const { app } = this;
    const [card, ink] = [app.theme("card"), app.theme("ink")];
    const labelled = new Set();
    const [nodes, texts, taken] = [[], [], []];
    for (const p of app.points) {
      if (p.kind === KIND.trial) continue;
      const several = app.shown.length > 1;
      const colour = several ? app.style(p.run).colour : ink;
      if (p.kind === KIND.final) {
        const origin = app.where(p.run, p.run.byNumber.get(p.run.columns.number[p.index]));
        if (origin) nodes.push(shape("path", { class: "error", d: `M${origin.sx},${origin.sy}L${p.sx},${p.sy}`, stroke: colour, "stroke-dasharray": "2 2" }));
        nodes.push(shape("path", { class: "final", d: "M-5,0H5M0,-5V5", transform: `translate(${p.sx},${p.sy})`, stroke: colour, "stroke-width": 2 }));
        continue;
      }
      const name = p.run.text("label", p.index);
      nodes.push(shape("path", { class: "control", "data-name": name, d: CONTROL_SHAPES[name] ?? SHAPES[1], transform: `translate(${p.sx.toFixed(1)},${p.sy.toFixed(1)})`, fill: colour, stroke: card, "stroke-width": 1.25 }));
      if (labelled.has(name)) continue;
      labelled.add(name);
      const width = 6.2 * name.length;
      const left = p.sx + 10 + width < this.box.right ? p.sx + 10 : p.sx - 10 - width;
      let y = p.sy + 4;
      while (taken.some((t) => Math.abs(t.y - y) < 13 && left < t.right && t.left < left + width)) y += 13;
      taken.push({ left, right: left + width, y });
      texts.push(shape("text", { class: "halo label", x: left, y }, name));
    }
    return [...nodes, ...texts];
  }

  bestMarks() {
    const { app } = this;
    return app.shown.map((run) => app.where(run, app.best.get(run))).filter(Boolean).map((p) => shape("circle", { class: "best", "data-number": p.run.columns.number[p.index], cx: p.sx, cy: p.sy, r: 8.5, fill: "none", stroke: app.style(p.run).colour, "stroke-width": 2 }));
  }

  /** Rings around what is hovered, selected and pinned. */
  marks() {
    const { app } = this;
    if (!app.points) return;
    const find = (where) => where && app.where(where.run, where.index);
    const nodes = [];
    for (const [where, kind] of [[app.pinned, "pin"], [app.selected, "chosen"], [this.hovered, "hovered"]]) {
      const p = find(where);
      if (!p) continue;
      if (app.state.errors) nodes.push(...this.errorBar(p));
      nodes.push(shape("circle", { class: `ring ${kind}`, cx: p.sx, cy: p.sy, r: kind === "hovered" ? 7 : 10 }));
    }
    if (this.drag?.brush) {
      const { x0, y0, x1, y1 } = this.drag;
      nodes.push(shape("rect", { class: "brush", x: Math.min(x0, x1), y: Math.min(y0, y1), width: Math.abs(x1 - x0), height: Math.abs(y1 - y0) }));
    }
    this.marked.replaceChildren(...nodes);
  }

  // Pointer and keys

  where(event) {
    const { left, top } = this.host.getBoundingClientRect();
    return [event.clientX - left, event.clientY - top];
  }

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

  hover(point) {
    if (this.hovered?.run === point?.run && this.hovered?.index === point?.index) return;
    this.hovered = point;
    if (point) this.showTip(point.sx, point.sy, this.app.describe(point.run, point.index));
    else this.tip.hidden = true;
    this.host.style.cursor = point ? "pointer" : "";
    this.marks();
  }

  down(event) {
    if (event.button !== 0) return;
    const [x, y] = this.where(event);
    this.drag = { x0: x, y0: y, x1: x, y1: y, view: structuredClone(this.view), moved: false, brush: event.shiftKey || this.app.state.mode === "select" };
    this.host.setPointerCapture(event.pointerId);
  }

  move(event) {
    const [x, y] = this.where(event);
    if (!this.drag) return void this.hover(this.nearest(x, y));
    const { drag } = this;
    [drag.x1, drag.y1] = [x, y];
    drag.moved ||= Math.hypot(x - drag.x0, y - drag.y0) > 4;
    if (!drag.moved) return;
    this.hover(null);
    if (drag.brush) return void this.marks();
    const { left, right, top, bottom } = this.box;
    const dx = ((drag.x0 - x) / (right - left)) * (drag.view.x[1] - drag.view.x[0]);
    const dy = ((y - drag.y0) / (bottom - top)) * (drag.view.y[1] - drag.view.y[0]);
    this.view = { x: drag.view.x.map((v) => v + dx), y: drag.view.y.map((v) => v + dy) };
    this.follow = false;
    this.queue();
  }

  up(event) {
    const { drag } = this;
    this.drag = null;
    if (!drag) return;
    const [x, y] = this.where(event);
    if (!drag.moved) {
      const point = this.nearest(x, y);
      if (point) this.app.select(point.run, point.index);
      return;
    }
    if (drag.brush) {
      const inside = (v, a, b) => v >= Math.min(a, b) && v <= Math.max(a, b);
      const found = this.app.points.filter((p) => p.kind === KIND.trial && inside(p.sx, drag.x0, x) && inside(p.sy, drag.y0, y));
      this.app.brushed = found.length ? found : null;
      this.app.changed();
    }
    this.marks();
  }

  cancel() {
    this.drag = null;
    this.marks();
  }

  wheel(event) {
    if (!event.ctrlKey && !event.metaKey) return; // the page scrolls
    event.preventDefault();
    this.zoom(Math.exp(clamp(event.deltaY, -100, 100) * 0.002), ...this.where(event));
  }

  key(event) {
    const { app } = this;
    const line = app.shown.length > 1 ? app.joint : (app.shown[0]?.front ?? []);
    const at = line.findIndex((p) => p.run === app.selected?.run && p.index === app.selected?.index);
    const step = { ArrowLeft: at < 0 ? 0 : at - 1, ArrowRight: at + 1, Home: 0, End: line.length - 1 }[event.key];
    if (event.shiftKey && event.key.startsWith("Arrow")) {
      const [i, j] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key];
      for (const [axis, by] of [["x", i], ["y", j]]) {
        const length = this.view[axis][1] - this.view[axis][0];
        this.view[axis] = this.view[axis].map((v) => v + 0.15 * by * length);
      }
      this.follow = false;
      this.queue();
    } else if (step !== undefined && line.length) {
      const point = line[clamp(step, 0, line.length - 1)];
      app.select(point.run, point.index, true);
    } else if (event.key === "+" || event.key === "=") this.zoom(1 / 1.4);
    else if (event.key === "-") this.zoom(1.4);
    else if (event.key === "0") this.fit(false);
    else if (event.key === "Enter" && app.selected) app.parts.detail.focus();
    else if (event.key === "Escape") {
      app.brushed = null;
      this.cancel();
      app.changed();
    } else return;
    event.preventDefault();
  }
}

/** One quantity of one run after the other against trials or CPU seconds, in steps. */
class TimeLine extends Plot {
  constructor(app, host, kind) {
    super(app, host);
    this.kind = kind;
    this.cache = new Map();
    host.addEventListener("pointermove", (e) => this.hover(e));
    host.addEventListener("pointerleave", () => {
      this.tip.hidden = true;
      this.cursor?.remove();
    });
  }

  series(run) {
    const { app } = this;
    const key = `${run.version}|${app.state.clock}|${JSON.stringify(this.reference)}|${app.state.relative}|${app.state.x}|${app.state.y}`;
    const known = this.cache.get(run.id);
    if (known?.key === key) return known;
    const { kind, feasible, score, cpu_seconds: cpu } = run.columns;
    const rows = [];
    for (let i = 0; i < run.count; i++) if (kind[i] === KIND.trial) rows.push(i);
    const steps = [];
    let clock = 0, value = NaN, front = [];
    const least = this.kind === "best" && Number.isFinite(run.study.floor ?? NaN);
    for (const i of rows) {
      clock += app.state.clock === "cpu" ? cpu[i] || 0 : 1;
      let next = value;
      if (this.kind === "best") {
        const now = least ? run.columns.latency_ms[i] : score[i];
        if (feasible[i] === 1 && Number.isFinite(now) && !(least ? value <= now : value >= now)) next = now;
      } else if (this.reference && Number.isFinite(score[i])) {
        const point = { x: -METRICS[app.state.x].better * app.coordinate(run, app.state.x, i), y: -METRICS[app.state.y].better * app.coordinate(run, app.state.y, i), order: i };
        if (Number.isFinite(point.x) && Number.isFinite(point.y) && !front.some((p) => p.x <= point.x && p.y <= point.y)) {
          front = nonDominated([...front, point]);
          next = area(front, this.reference) / this.reference.span;
        }
      }
      if (Number.isFinite(next) && next !== value) steps.push([clock, (value = next)]);
    }
    const found = { key, steps, end: clock, least };
    this.cache.set(run.id, found);
    return found;
  }

  draw() {
    const { app } = this;
    this.measure();
    this.reference = app.reference();
    this.lines = app.shown.map((run) => [run, this.series(run)]);
    const values = this.lines.flatMap(([, { steps }]) => steps.map(([, v]) => v)).filter(Number.isFinite).sort((a, b) => a - b);
    const end = Math.max(1, ...this.lines.map(([, s]) => s.end));
    let low = values[Math.floor(values.length * 0.05)] ?? 0;
    let high = values.at(-1) ?? 1;
    if (!(high > low)) [low, high] = [low - Math.abs(low || 1) * 0.02, high + Math.abs(high || 1) * 0.02];
    const pad = (high - low) * 0.08;
    this.view = { x: [0, end], y: [low - pad, high + pad] };
    const least = this.lines.some(([, s]) => s.least);
    const title = this.kind === "volume" ? "hypervolume" : least ? "least latency (ms)" : `best ${app.metricName("score")}`;
    const { left, right, top, bottom } = this.box;
    const id = `clip-${this.kind}`;
    const nodes = [shape("clipPath", { id }, shape("rect", { x: left, y: top, width: right - left, height: bottom - top })), ...this.axes(app.state.clock === "cpu" ? "CPU seconds" : "trials", title)];
    for (const [run, { steps, end: last }] of this.lines) {
      if (!steps.length) continue;
      const { colour, dash } = app.style(run);
      const d = steps.map(([x, y], i) => (i ? `H${this.px(x).toFixed(1)}V${this.py(y).toFixed(1)}` : `M${this.px(x).toFixed(1)},${this.py(y).toFixed(1)}`)).join("") + `H${this.px(last).toFixed(1)}`;
      nodes.push(shape("path", { class: "front", d, stroke: colour, "stroke-dasharray": dash || null, "clip-path": `url(#${id})` }));
    }
    this.svg.replaceChildren(...nodes);
  }

  hover(event) {
    const { left, top } = this.host.getBoundingClientRect();
    const x = clamp(event.clientX - left, this.box.left, this.box.right);
    const at = ((x - this.box.left) / (this.box.right - this.box.left)) * this.view.x[1];
    const lines = this.lines.slice(0, 12).map(([run, { steps }]) => `${run.name}: ${digits(steps.findLast(([t]) => t <= at)?.[1] ?? NaN, 5)}`);
    this.cursor?.remove();
    this.cursor = shape("line", { class: "axis", x1: x, x2: x, y1: this.box.top, y2: this.box.bottom });
    this.svg.append(this.cursor);
    this.showTip(x, event.clientY - top, [`${digits(at, 4)} ${this.app.state.clock === "cpu" ? "CPU seconds" : "trials"}`, ...lines]);
  }
}

/** Layers by policies, from the cheapest of the front to its best; or of what is selected. */
class Heat {
  static kinds = {
    weight_bits: { name: "weight bits", share: (l) => bitShare(l.weight_bits), text: (l) => (l.weight_bits === 32 ? "fp" : l.weight_bits), tell: (l) => (l.weight_bits === 32 ? "weights in floating point" : `${l.weight_bits} weight bits`) },
    act_bits: { name: "activation bits", share: (l) => bitShare(l.act_bits), text: (l) => (l.act_bits === 32 ? "fp" : l.act_bits), tell: (l) => (l.act_bits === 32 ? "activations in floating point" : `${l.act_bits} activation bits`) },
    channels: { name: "channels kept", share: (l) => l.channels / l.of_channels, text: (l) => Math.round((100 * l.channels) / l.of_channels), tell: (l) => `${l.channels} of ${l.of_channels} channels (%)` },
    rank: { name: "rank", share: (l) => (l.rank ? l.rank / l.of_rank : 1), text: (l) => (l.rank ? Math.round((100 * l.rank) / l.of_rank) : "·"), tell: (l) => (l.rank ? `rank ${l.rank} of ${l.of_rank}, ${l.form}` : "whole") },
  };

  constructor(app, host) {
    this.app = app;
    this.run = null;
    this.title = element("h2", {}, "From cheapest to best");
    this.which = element("select", { id: "choose-heat-run", change: (e) => { this.run = e.target.value; this.update(); } });
    this.what = element("select", { id: "choose-heat", change: (e) => { app.state.heat = e.target.value; this.draw(); } }, Object.entries(Heat.kinds).map(([value, { name }]) => element("option", { value }, name)));
    this.body = element("div", { class: "plot", style: "touch-action: auto" });
    this.svg = shape("svg", { role: "img", style: "position: static" });
    this.tip = element("div", { class: "tip", hidden: true });
    this.note = element("p", { class: "hint" });
    this.body.append(this.svg, this.tip);
    host.append(element("header", {}, this.title, element("label", { class: "field" }, "run", this.which), element("label", { class: "field" }, "show", this.what)), this.body, this.note);
    this.svg.addEventListener("pointerleave", () => (this.tip.hidden = true));
  }

  async update() {
    const { app } = this;
    const runs = app.shown.filter((run) => run.front?.length);
    const names = runs.map((run) => `${run.id}${run.name}`).join();
    if (names !== this.names) {
      this.names = names;
      this.which.replaceChildren(...runs.map((run) => element("option", { value: run.id }, run.name)));
    }
    const run = runs.find((r) => r.id === this.run) ?? runs[0];
    if (!run) return void this.svg.replaceChildren();
    this.which.value = run.id;
    this.which.parentElement.hidden = runs.length < 2;
    const brushed = app.brushed?.filter((p) => p.run === run);
    let points = brushed?.length ? [...brushed].sort((a, b) => a.x - b.x || a.y - b.y) : run.front;
    const all = points.length;
    if (all > MOST_POLICIES) points = Array.from({ length: MOST_POLICIES }, (_, i) => points[Math.round((i * (all - 1)) / (MOST_POLICIES - 1))]);
    const key = `${run.id}.${run.epoch}.${points.map((p) => p.index).join()}.${app.state.x}.${app.state.relative}`;
    this.title.textContent = brushed?.length ? `Selection of ${all}, from cheapest to dearest` : `Front of ${all}, from cheapest to best`;
    if (key === this.key && this.layers) return void this.draw();
    this.key = key;
    try {
      const details = await app.policies(run, points.map((p) => p.index));
      if (this.key !== key) return;
      this.layers = points.map((p, i) => [p, details[i]]).filter(([, detail]) => detail?.layers);
      this.note.textContent = this.layers.length ? "" : (details[0]?.problem ?? "");
      this.draw();
    } catch (error) {
      this.key = null;
      this.note.textContent = error.message;
    }
  }

  draw() {
    const { app } = this;
    if (!this.layers?.length) return void this.svg.replaceChildren();
    const kind = Heat.kinds[app.state.heat];
    const width = Math.max(240, this.body.getBoundingClientRect().width);
    const rows = this.layers[0][1].layers;
    const longest = Math.max(...rows.map((l) => l.name.length));
    const left = Math.round(clamp(longest * 6.4 + 12, 60, width * 0.28));
    const cell = clamp((width - left - 4) / this.layers.length, 4, 44);
    const row = 20;
    const top = 20;
    const bottom = top + rows.length * row;
    const nodes = [];
    rows.forEach((layer, j) => {
      const most = Math.floor((left - 12) / 6.4);
      const name = layer.name.length > most ? `…${layer.name.slice(-(most - 1))}` : layer.name;
      nodes.push(shape("text", { x: left - 8, y: top + j * row + 14, "text-anchor": "end" }, name, shape("title", {}, layer.name)));
    });
    const every = Math.ceil(34 / cell);
    this.layers.forEach(([point, detail], i) => {
      const x = left + i * cell;
      if (i % every === 0) nodes.push(shape("text", { x: x + cell / 2, y: top - 7, "text-anchor": "middle" }, point.run.columns.number[point.index]), shape("text", { x: x + cell / 2, y: bottom + 14, "text-anchor": "middle" }, digits(this.price(point), 2)));
      detail.layers.forEach((layer, j) => {
        const share = kind.share(layer);
        const colour = app.ramp("heat", share);
        nodes.push(shape("rect", { class: "cell", x, y: top + j * row, width: cell, height: row, fill: colour, rx: 2,
          click: () => app.select(point.run, point.index), pointermove: (e) => this.hover(e, point, layer, kind) }));
        if (cell >= 17) nodes.push(shape("text", { x: x + cell / 2, y: top + j * row + 14, "text-anchor": "middle", style: `fill:${app.textOn(colour)};pointer-events:none` }, kind.text(layer)));
      });
    });
    nodes.push(shape("text", { x: left - 8, y: top - 7, "text-anchor": "end" }, "trial"), shape("text", { x: left - 8, y: bottom + 14, "text-anchor": "end" }, this.unit()));
    this.geometry = { left, top, cell, height: rows.length * row };
    this.svg.setAttribute("viewBox", `0 0 ${width} ${bottom + 22}`);
    this.svg.setAttribute("aria-label", `${kind.name} of each layer over the front`);
    this.svg.style.height = `${bottom + 22}px`;
    this.column = shape("g");
    this.svg.replaceChildren(...nodes, this.column);
    this.mark();
  }

  unit() {
    const { app } = this;
    const metric = METRICS[app.state.x].better < 0 ? app.state.x : "latency_ms";
    const [unit] = app.state.relative ? ["×"] : unitFor(metric, Math.max(...this.layers.map(([p]) => p.run.value(metric, p.index))));
    return `${app.metricName(metric)}${unit ? `, ${unit}` : ""}`;
  }

  price(point) {
    const { app } = this;
    const metric = METRICS[app.state.x].better < 0 ? app.state.x : "latency_ms";
    const value = app.coordinate(point.run, metric, point.index);
    return app.state.relative ? value : value / unitFor(metric, Math.max(...this.layers.map(([p]) => p.run.value(metric, p.index))))[1];
  }

  mark() {
    if (!this.column || !this.layers) return;
    const { selected } = this.app;
    const at = this.layers.findIndex(([p]) => p.run === selected?.run && p.index === selected?.index);
    const { left, top, cell, height } = this.geometry;
    this.column.replaceChildren(...(at < 0 ? [] : [shape("rect", { class: "column", x: left + at * cell, y: top, width: cell, height, rx: 2 })]));
  }

  hover(event, point, layer, kind) {
    const box = this.body.getBoundingClientRect();
    this.width = box.width;
    this.height = box.height;
    Plot.prototype.showTip.call(this, event.clientX - box.left, event.clientY - box.top, [layer.name, `${point.run.title(point.index)}: ${kind.tell(layer)}`]);
  }
}

/** Build the page; TensorBoard calls this once. */
export async function render() {
  const held = document.getElementById("tightrope-data");
  if (!held) {
    const style = element("link", { rel: "stylesheet", href: new URL("./pareto.css", import.meta.url).href });
    const ready = new Promise((done) => ["load", "error"].forEach((event) => style.addEventListener(event, done)));
    document.head.append(style);
    await ready;
  }
  document.documentElement.lang = "en";
  const app = new App(held ? await Embedded.read(held.textContent) : new Served(), document.body);
  await app.poll();
}

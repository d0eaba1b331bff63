// The page: what is shown, where it comes from, how it is coloured and what is selected.

import { KIND, Run, unpack } from "./data.js";
import { button, DASHES, element, mark, SHAPES } from "./dom.js";
import { area, bestOf, nonDominated } from "./fronts.js";
import { Heat } from "./heat.js";
import { Legend, RunList, Selection } from "./lists.js";
import { amount, clamp, counted, digits, METRICS, parseColour, times } from "./numbers.js";
import { Detail } from "./policy.js";
import { Scatter } from "./scatter.js";
import { TimeLine } from "./timeline.js";

const POLL_MS = 3000;
const MOST_RUNS = 50; // asked for at once

export class App {
  constructor(source, root) {
    this.source = source;
    this.runs = new Map(); // by id, in the order of their names
    this.state = {
      x: "latency_ms", y: "score", logX: null, logY: null, // null: as the values ask for
      relative: false, errors: true, colour: "run", clock: "trials",
    };
    this.selected = null; // {run, index}
    this.pinned = null;
    this.brushed = null; // points of the scatter
    this.points = this.marked = this.joint = this.agents = [];
    this.log = { x: false, y: false };
    this.version = 0; // of the points
    this.ready = false; // whether all that the first poll found is here
    this.serial = 0; // of the drawings since then
    this.build(root);
    new ResizeObserver(() => this.draw()).observe(this.parts.scatter);
    this.watchTheme();
  }

  get shown() {
    return [...this.runs.values()].filter((run) => run.visible && run.count > 0);
  }

  // Data

  /** Ask for what is new, and again after a while. */
  async poll(summaries = this.source.runs()) {
    let hurry = false;
    try {
      this.take(await summaries);
      let stale = [...this.runs.values()].filter((run) => run.stale);
      while (stale.length) {
        const batch = stale.slice(0, MOST_RUNS);
        for (const [header, columns] of unpack(await this.source.trials(batch))) this.runs.get(header.run)?.append(header, columns);
        stale = [...stale.slice(MOST_RUNS), ...batch.filter((run) => !run.pending && run.count < run.known)];
        this.ready ||= !stale.length;
        this.changed();
      }
      hurry = [...this.runs.values()].some((run) => run.pending);
      this.ready = true;
      this.status("");
    } catch (error) {
      this.status(`No answer from TensorBoard (${error.message}); trying again.`);
    }
    if (this.source.live) setTimeout(() => this.whenVisible(), hurry ? 50 : POLL_MS);
  }

  whenVisible() {
    if (!document.hidden) return void this.poll();
    document.addEventListener("visibilitychange", () => this.poll(), { once: true });
  }

  /** Take in the list of runs; null where it is as it was. */
  take(summaries) {
    if (!summaries) return;
    const listed = new Set(summaries.map(({ id }) => id));
    const known = [...this.runs.values()].filter((run) => listed.has(run.id));
    let place = Math.max(-1, ...known.map((run) => run.place));
    const fresh = summaries.filter(({ id }) => !this.runs.has(id)).map((summary) => new Run(summary, ++place));
    for (const summary of summaries) this.runs.get(summary.id)?.update(summary);
    const gone = known.length < this.runs.size;
    const inOrder = (a, b) => a.name.localeCompare(b.name, "en", { numeric: true });
    this.runs = new Map([...known, ...fresh].sort(inOrder).map((run) => [run.id, run]));
    this.parts.empty.hidden = this.runs.size > 0;
    for (const part of ["main", "side", "detail"]) this.parts[part].hidden = this.runs.size === 0;
    if (gone || fresh.length) this.changed();
  }

  /** Policies of records of one run, each fetched once. */
  async policies(run, indices) {
    const missing = indices.filter((index) => !run.details.has(index));
    if (missing.length) {
      const { epoch } = run;
      const found = await this.source.policies(run, missing);
      if (run.epoch === epoch) for (const detail of found) run.details.set(detail.index, detail);
    }
    return indices.map((index) => run.details.get(index)).filter(Boolean);
  }

  /** Work out everything anew and draw it. */
  changed() {
    for (const key of ["selected", "pinned"]) {
      const record = this[key];
      if (record && !(this.runs.get(record.run.id) === record.run && record.index < record.run.count)) this[key] = null;
    }
    this.offerMetrics();
    this.gather();
    this.draw();
  }

  /** Offer the metrics that any run has. */
  offerMetrics() {
    if (!this.shown.length) return;
    const names = Object.keys(METRICS).filter((metric) => this.shown.some((run) => run.metrics.has(metric)));
    const scores = new Set(this.shown.map((run) => run.study.metric).filter(Boolean));
    const [only] = scores.size === 1 ? scores : [];
    this.percent = only === "top1";
    this.scoreName = this.percent ? "top-1 accuracy" : (only ?? "score");
    const offered = `${names.join()}|${this.scoreName}`;
    if (offered === this.offered) return;
    this.offered = offered;
    for (const axis of ["x", "y"]) {
      if (!names.includes(this.state[axis])) this.state[axis] = (axis === "y" ? names[0] : names[1]) ?? "score";
      const option = (name) => element("option", { value: name, selected: name === this.state[axis] }, this.metricName(name));
      this.parts[axis].replaceChildren(...names.map(option));
    }
  }

  /** Points of the scatter, the front of each run, the joint front, their hypervolumes and the best of each run. */
  gather() {
    const { shown } = this;
    this.points = shown.flatMap((run) => this.pointsOf(run));
    this.marked = this.points.filter((point) => point.kind !== KIND.trial);
    for (const axis of ["x", "y"]) this.log[axis] = this.parts[axis === "x" ? "logX" : "logY"].checked = this.isLog(axis);
    for (const point of this.points) {
      point.ax = this.log.x ? Math.log10(point.vx) : point.vx;
      point.ay = this.log.y ? Math.log10(point.vy) : point.vy;
    }
    for (const run of shown) {
      run.front = nonDominated(run.points.filter((p) => p && run.isScored(p.index)));
      run.best = bestOf(run);
      for (const point of run.front) point.front = true;
    }
    this.joint = nonDominated(shown.flatMap((run) => run.front));
    for (const point of this.joint) point.joint = true;
    const reference = this.reference();
    const volume = (front) => (reference ? area(front, reference) / reference.span : NaN);
    for (const run of shown) run.volume = volume(run.front);
    this.volume = volume(this.joint);
    this.agents = [...new Set(shown.flatMap((run) => [...run.agents.keys()]))].sort();
    const brushed = this.brushed?.map(({ run, index }) => this.where(run, index)).filter(Boolean) ?? [];
    this.brushed = brushed.length ? brushed : null;
    this.version++;
  }

  /** A point for each record that has both metrics: values `vx`, `vy`, and `x`, `y` where less is better. */
  pointsOf(run) {
    const { x, y } = this.state;
    const [signX, signY] = [-METRICS[x].better, -METRICS[y].better];
    run.points = new Array(run.count); // by index
    for (let index = 0; index < run.count; index++) {
      const kind = run.columns.kind[index];
      if (kind === KIND.dense && run.controls.has("dense")) continue;
      const [vx, vy] = [this.coordinate(run, x, index), this.coordinate(run, y, index)];
      if (!Number.isFinite(vx) || !Number.isFinite(vy)) continue;
      const feasible = run.columns.feasible[index] === 1;
      run.points[index] = {
        run, index, kind, feasible, vx, vy, x: signX * vx, y: signY * vy, order: index,
        ax: 0, ay: 0, sx: 0, sy: 0, front: false, joint: false,
      };
    }
    return run.points.filter(Boolean);
  }

  /** The point of a record, if it is on the scatter. */
  where(run, index) {
    return run.visible ? run.points?.[index] : undefined;
  }

  /** A metric's value on an axis: as it is, or as a share of the dense model's. */
  coordinate(run, metric, index) {
    const value = run.value(metric, index);
    return this.state.relative && metric !== "score" ? value / run.whole(metric) : value;
  }

  /** The ends of a record's interval of a metric, on its axis; undefined where it has none. */
  interval({ run, index }, metric) {
    const [value, error] = [run.value("score", index), run.value("stderr", index)];
    if (metric === "score") return error > 0 ? [value - error, value + error] : undefined;
    const ends = [run.value("low_ms", index), run.value("high_ms", index)];
    if (metric !== "latency_ms" || !(ends[1] > ends[0])) return undefined;
    return this.state.relative ? ends.map((end) => end / run.whole(metric)) : ends;
  }

  /** Whether an axis is logarithmic: as chosen, or where the trials' cost spans more than a factor of four. */
  isLog(axis) {
    const chosen = this.state[axis === "x" ? "logX" : "logY"];
    if (chosen !== null) return chosen;
    if (this.state[axis] === "score") return false;
    let [low, high] = [Infinity, 0];
    for (const point of this.points) {
      const value = axis === "x" ? point.vx : point.vy;
      if (value > 0 && point.kind === KIND.trial) [low, high] = [Math.min(low, value), Math.max(high, value)];
    }
    return high > 4 * low;
  }

  /** What a run's budget allows of a metric, on its axis; NaN where it bounds something else. */
  limit(run, metric) {
    if (metric === "score") return run.whole("score") + (run.study.floor ?? NaN);
    const limit = run.study.limits?.[metric] ?? NaN;
    return this.state.relative ? limit / run.whole(metric) : limit;
  }

  limitText(run, metric) {
    return run.study.budget?.find((text) => text.startsWith(METRICS[metric].budget ?? "accuracy")) ?? "budget";
  }

  /** The worst point that counts for the hypervolume: the budget's limit or the dense cost, and half of the dense score. */
  reference() {
    const ends = ["x", "y"].map((axis) => {
      const metric = this.state[axis];
      const bounded = (run) => metric !== "score" && Number.isFinite(this.limit(run, metric));
      const values = this.shown.map((run) => (bounded(run) ? this.limit(run, metric) : this.coordinate(run, metric, run.dense)));
      const top = Math.max(...values.filter(Number.isFinite));
      const span = metric === "score" ? 0.5 * Math.abs(top) || 1 : top;
      return { at: metric === "score" ? span - top : top, span };
    });
    const span = ends[0].span * ends[1].span;
    return Number.isFinite(span) && span > 0 ? { x: ends[0].at, y: ends[1].at, span } : null;
  }

  // Colours

  watchTheme() {
    let body = null; // of TensorBoard
    try {
      if (window.parent !== window) ({ body } = window.parent.document);
    } catch {
      // a parent of another origin
    }
    const wish = window.matchMedia("(prefers-color-scheme: dark)");
    const apply = () => {
      document.documentElement.classList.toggle("dark", body ? body.classList.contains("dark-mode") : wish.matches);
      const style = getComputedStyle(document.documentElement);
      const known = new Map();
      this.theme = (name) => {
        if (!known.has(name)) known.set(name, style.getPropertyValue(`--${name}`).trim());
        return known.get(name);
      };
      this.changed();
    };
    wish.addEventListener("change", apply);
    if (body) new MutationObserver(apply).observe(body, { attributes: true, attributeFilter: ["class"] });
    apply();
  }

  /** Colour, shape and dash by place: six colours, then the same again with another shape. */
  place(i) {
    return { colour: this.theme(`c${i % 6}`), shape: SHAPES[Math.floor(i / 6) % 4], dash: DASHES[Math.floor(i / 6) % 4] };
  }

  style(run) {
    return this.place(run.place);
  }

  agentStyle(agent) {
    return this.place(Math.max(0, this.agents.indexOf(agent)));
  }

  /** How a run's lines are drawn: where colours stand for agents and it had several of them, or for numbers, in grey. */
  lineStyle(run) {
    const { colour } = this.state;
    const [agent, ...others] = run.agents.keys();
    if (colour === "agent" && agent !== undefined && !others.length) return this.agentStyle(agent);
    const grey = colour === "agent" || (colour === "number" && this.shown.length === 1);
    return grey ? { ...this.style(run), colour: this.theme("muted") } : this.style(run);
  }

  mark(run) {
    const { colour } = this.lineStyle(run);
    return mark(this.style(run).shape, { fill: colour, stroke: colour });
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

  // Words

  metricName(metric) {
    return metric === "score" ? (this.scoreName ?? "score") : METRICS[metric].name;
  }

  /** A score, or a standard error of one: percent with two decimals. */
  scoreText(value) {
    return this.percent && Number.isFinite(value) ? value.toFixed(2) : digits(value);
  }

  amount(metric, value, relative = this.state.relative) {
    if (metric === "score") return `${this.scoreText(value)}${this.percent ? " %" : ""}`;
    return relative ? times(value) : amount(metric, value);
  }

  /** A record in a few lines: what it is, where it stands on both axes, and what else matters. */
  describe(run, index) {
    const { x, y } = this.state;
    const lines = [`${run.title(index)} · ${run.name}`];
    const others = ["score", "latency_ms", "size_bytes"].filter((metric) => ![x, y].includes(metric));
    for (const metric of [y, x, ...others]) {
      const onAxis = !others.includes(metric);
      const value = onAxis ? this.coordinate(run, metric, index) : run.value(metric, index);
      if (!onAxis && !Number.isFinite(value)) continue;
      const error = metric === "score" ? run.value("stderr", index) : 0;
      const spread = error > 0 ? ` ± ${this.scoreText(error)}` : "";
      lines.push(`${this.metricName(metric)} ${this.amount(metric, value, onAxis && this.state.relative)}${spread}`);
    }
    const part = run.part(index);
    if (part) lines.push(`scored on ${counted(part)} of ${counted(run.whole("count"))}`);
    const over = run.columns.feasible[index] === 1 ? "" : " · not within the budget";
    if (run.isTrial(index)) lines.push(`${run.text("label", index)}${over}`);
    if (run.columns.simulated[index] === 1) lines.push("simulated");
    return lines;
  }

  say(text) {
    this.parts.live.textContent = text;
  }

  status(text) {
    this.parts.status.textContent = text;
    this.parts.status.hidden = !text;
  }

  // Doing

  set(key, value) {
    this.state[key] = value;
    if (["x", "y", "relative"].includes(key)) this.state.logX = this.state.logY = null;
    if (["x", "y", "logX", "logY", "relative"].includes(key)) this.scatter.follow = "most";
    this.changed();
  }

  /** Show a record's policy; of a trial that was fine-tuned, the trial's. */
  select(run, index) {
    if (run.columns.kind[index] === KIND.final) index = run.byNumber.get(run.columns.number[index]) ?? index;
    this.selected = { run, index };
    this.chosen();
  }

  deselect() {
    this.selected = null;
    this.chosen();
  }

  pin(record) {
    this.pinned = record;
    this.chosen();
  }

  chosen() {
    void this.detail.show();
    this.scatter.marks();
    this.heat.mark();
  }

  /** Select these points of the scatter; none clears. */
  brush(points) {
    this.brushed = points.length ? points : null;
    this.changed();
  }

  /** Show or hide a run, or all. */
  showRuns(visible, only = null) {
    for (const run of only ? [only] : this.runs.values()) run.visible = visible;
    this.changed();
  }

  /** Draw at the next frame: the scatter, and what stands around it once that is seen. */
  draw() {
    this.drawing ??= requestAnimationFrame(() => {
      this.drawing = undefined;
      if (!this.runs.size || (!this.ready && !this.shown.length)) return;
      this.scatter.draw();
      this.resting ??= setTimeout(() => this.drawRest());
    });
  }

  drawRest() {
    this.resting = undefined;
    this.notice();
    for (const part of [this.list, this.legend, ...this.lines, this.selection]) part.draw();
    void this.heat.update();
    this.detail.refresh();
    if (this.ready) this.parts.scatter.dataset.ready = String(++this.serial);
  }

  /** Warn where costs are not alike. */
  notice() {
    const differ = ["device", "network"].filter((key) => new Set(this.shown.map((run) => run.study[key])).size > 1);
    const text = `The runs shown are for different ${differ.map((key) => `${key}s`).join(" and ")}: compare their costs with care.`;
    this.parts.notice.hidden = differ.length === 0;
    this.parts.notice.textContent = differ.length ? text : "";
  }

  // Parts of the page

  build(root) {
    const parts = (this.parts = {
      scatter: element("div", { class: "plot scatter" }),
      legend: element("div", { class: "legend" }),
      notice: element("p", { class: "notice", hidden: true }),
      best: element("div", { class: "plot line" }),
      volume: element("div", { class: "plot line" }),
      heat: element("section", { class: "card", "aria-label": "Policies from cheapest to best" }),
      selection: element("section", { class: "card", hidden: true, "aria-label": "Selected trials" }),
      side: element("aside", { class: "card runs", hidden: true, "aria-label": "Runs" }),
      detail: element("aside", { class: "card detail", hidden: true, "aria-label": "Policy", tabindex: "-1" }),
      status: element("p", { class: "notice status", hidden: true, role: "status" }),
      live: element("div", { class: "hidden", "aria-live": "polite" }),
    });
    this.scatter = new Scatter(this, parts.scatter);
    this.heat = new Heat(this, parts.heat);
    this.lines = [new TimeLine(this, parts.best, "best"), new TimeLine(this, parts.volume, "volume")];
    this.detail = new Detail(this, parts.detail);
    this.list = new RunList(this, parts.side);
    this.legend = new Legend(this, parts.legend);
    this.selection = new Selection(this, parts.selection);
    const hint = "Click a point for its policy. Drag to pan, Shift + drag to select, Ctrl + wheel to zoom. With the plot focused: "
      + "← → walk the front, Home and End its ends, Enter opens, + − zoom, 0 shows all.";
    const clock = this.choice("clock", "over", { trials: "trials", cpu: "CPU seconds" });
    parts.main = element("main", { class: "main", hidden: true },
      element("section", { class: "card", "aria-label": "All trials and the front" },
        this.toolbar(), parts.notice, parts.scatter, parts.legend, element("p", { class: "hint" }, hint)),
      parts.selection, parts.heat,
      element("section", { class: "card", "aria-label": "Over time" },
        element("header", {}, element("h2", {}, "Over time"), clock), parts.best, parts.volume));
    parts.empty = element("div", { class: "empty", hidden: true }, element("h2", {}, "No search here yet"),
      element("p", {}, "Run ", element("code", {}, "tightrope search net.yaml --budget \"latency<=0.5x\""),
        " with its run folder below this log folder. Trials appear here by themselves."));
    root.append(element("div", { class: "page" }, parts.status, parts.empty, parts.side, parts.main, parts.detail, parts.live));
  }

  toolbar() {
    const { parts } = this;
    const [x, y] = ["x", "y"].map((axis) => this.choice(axis, axis, {}));
    const [logX, logY] = [this.check("logX", "log x"), this.check("logY", "log y")];
    for (const [name, field] of Object.entries({ x, y, logX, logY })) parts[name] = field.querySelector("select, input");
    const modes = { pan: "Pan", select: "Select" };
    const choose = (mode) => {
      this.scatter.gestures.mode = mode;
      for (const [name, node] of Object.entries(buttons)) node.setAttribute("aria-pressed", String(name === mode));
    };
    const buttons = Object.fromEntries(Object.entries(modes).map(([mode, text]) => [mode, button(text, () => choose(mode))]));
    choose("pan");
    const zoom = [["−", "Zoom out", () => this.scatter.zoom(1.4)], ["+", "Zoom in", () => this.scatter.zoom(1 / 1.4)],
      ["Front", "Zoom to the front", () => this.scatter.fit(this.joint)], ["All", "Show all", () => this.scatter.fit()]];
    const group = (label, ...children) => element("span", { class: "buttons", role: "group", "aria-label": label }, ...children);
    return element("header", {}, element("h2", {}, "Trials and front"), x, y, logX, logY,
      this.check("relative", "× dense"), this.check("errors", "error bars"),
      this.choice("colour", "colour", { run: "run", agent: "agent", number: "trial number" }),
      group("Dragging", Object.values(buttons)),
      group("Zoom", zoom.map(([text, label, click]) => button(text, click, { "aria-label": label, title: label }))));
  }

  choice(key, label, options) {
    const option = ([value, text]) => element("option", { value, selected: this.state[key] === value }, text);
    const change = (e) => this.set(key, e.target.value);
    const select = element("select", { id: `choose-${key}`, change }, Object.entries(options).map(option));
    return element("label", { class: "field" }, label, select);
  }

  check(key, label) {
    const change = (e) => this.set(key, e.target.checked);
    const box = element("input", { type: "checkbox", id: `choose-${key}`, checked: this.state[key] === true, change });
    return element("label", { class: "field" }, box, label);
  }
}

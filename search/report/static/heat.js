// Layers by policies, from the cheapest of the front to its best, or of what is selected: what the search learned.

import { element, shape } from "./dom.js";
import { bitShare, bitText, clamp, digits, METRICS, unitFor } from "./numbers.js";
import { Plot } from "./plot.js";

const MOST_POLICIES = 60; // columns
const [ROW, TOP, LETTER] = [20, 20, 6.4]; // pixels

const percent = (part, all) => Math.round((100 * part) / all);
const bits = (key, name, things) => ({
  name,
  share: (layer) => bitShare(layer[key]),
  text: (layer) => bitText(layer[key]),
  tell: (layer) => (layer[key] === 32 ? `${things} in floating point` : `${layer[key]} ${name}`),
});
const KINDS = {
  weight_bits: bits("weight_bits", "weight bits", "weights"),
  act_bits: bits("act_bits", "activation bits", "activations"),
  channels: {
    name: "channels kept, %",
    share: (layer) => layer.channels / layer.of_channels,
    text: (layer) => percent(layer.channels, layer.of_channels),
    tell: (layer) => `${layer.channels} of ${layer.of_channels} channels`,
  },
  rank: {
    name: "rank, %",
    share: (layer) => (layer.rank ? layer.rank / layer.of_rank : 1),
    text: (layer) => (layer.rank ? percent(layer.rank, layer.of_rank) : "·"),
    tell: (layer) => (layer.rank ? `rank ${layer.rank} of ${layer.of_rank}, ${layer.form}` : "whole"),
  },
};

export class Heat extends Plot {
  constructor(app, host) {
    const keys = { tabindex: "0", role: "group", "aria-label": "Policies: arrow keys walk them" };
    const body = element("div", { class: "plot heat", ...keys });
    super(app, body);
    this.columns = []; // [point, layers]
    this.title = element("h2", {}, "From cheapest to best");
    this.note = element("p", { class: "hint" });
    this.which = element("select", { id: "choose-heat-run", change: () => this.update() });
    const options = Object.entries(KINDS).map(([value, { name }]) => element("option", { value }, name));
    this.what = element("select", { id: "choose-heat", change: () => this.draw() }, options);
    this.svg.removeAttribute("aria-hidden");
    this.svg.setAttribute("role", "img");
    body.addEventListener("pointermove", (e) => this.hover(e));
    body.addEventListener("pointerleave", () => (this.tip.hidden = true));
    body.addEventListener("click", (e) => this.open(this.under(e)?.[0]));
    body.addEventListener("keydown", (e) => this.key(e));
    const field = (text, select) => element("label", { class: "field" }, text, select);
    host.append(element("header", {}, this.title, field("run", this.which), field("show", this.what)), body, this.note);
  }

  /** Fetch the policies of the run's front, where they are not those that are shown. */
  async update() {
    const { app } = this;
    const run = this.choose(app.shown.filter((r) => r.front.length));
    if (!run) {
      this.fetched = null;
      return void this.show([]);
    }
    const brushed = app.brushed?.filter((p) => p.run === run) ?? [];
    const all = brushed.length ? brushed.sort((a, b) => a.x - b.x || a.y - b.y) : run.front;
    this.title.textContent = brushed.length
      ? `Selection of ${all.length}, from cheapest to dearest`
      : `Front of ${all.length}, from cheapest to best`;
    const points = spread(all, MOST_POLICIES);
    const key = [run.id, run.epoch, ...points.map((p) => p.index)].join();
    if (key !== this.fetched) {
      this.fetched = key;
      try {
        const details = await app.policies(run, points.map((p) => p.index));
        if (this.fetched !== key) return; // another choice came first
        this.note.textContent = details.find((d) => d.problem)?.problem ?? "";
        this.show(points.map((p, i) => [p, details[i]?.layers]).filter(([, layers]) => layers));
      } catch (error) {
        this.fetched = null;
        this.note.textContent = error.message;
      }
    } else this.draw();
  }

  /** The run to show: the chosen one as long as it is there. */
  choose(runs) {
    const names = JSON.stringify(runs.map(({ id, name }) => [id, name]));
    if (names !== this.names) {
      const chosen = this.which.value;
      this.which.replaceChildren(...runs.map(({ id, name }) => element("option", { value: id, selected: id === chosen }, name)));
      this.which.parentElement.hidden = runs.length < 2;
      this.names = names;
    }
    return runs.find(({ id }) => id === this.which.value) ?? runs[0];
  }

  show(columns) {
    this.columns = columns;
    this.draw();
  }

  draw() {
    const { app, columns } = this;
    this.host.hidden = !columns.length;
    if (!columns.length) return;
    const kind = KINDS[this.what.value];
    const names = columns[0][1].map((layer) => layer.name);
    const width = Math.max(240, this.host.getBoundingClientRect().width);
    const left = Math.round(clamp(Math.max(...names.map((name) => name.length)) * LETTER + 12, 60, width * 0.28));
    const cell = clamp((width - left - 4) / columns.length, 4, 44);
    const bottom = TOP + names.length * ROW;
    this.geometry = { left, cell, bottom };
    const nodes = names.map((name, j) => this.layerName(name, j));
    const told = (x, y, text, anchor = "middle") => shape("text", { x, y, "text-anchor": anchor }, text);
    nodes.push(told(left - 8, TOP - 7, "trial", "end"), told(left - 8, bottom + 14, this.priceTitle(), "end"));
    const every = Math.ceil(38 / cell);
    columns.forEach(([point, layers], i) => {
      const x = left + i * cell;
      if (i % every === 0) nodes.push(told(x + cell / 2, TOP - 7, point.run.columns.number[point.index]));
      if (i % every === 0) nodes.push(told(x + cell / 2, bottom + 14, this.price(point)));
      layers.forEach((layer, j) => {
        const fill = app.ramp("heat", kind.share(layer));
        nodes.push(shape("rect", { class: "cell", x, y: TOP + j * ROW, width: cell, height: ROW, fill, rx: 2 }));
        if (cell < 17) return;
        const place = { x: x + cell / 2, y: TOP + j * ROW + 14, "text-anchor": "middle", style: `fill:${app.textOn(fill)}` };
        nodes.push(shape("text", place, kind.text(layer)));
      });
    });
    this.svg.setAttribute("viewBox", `0 0 ${width} ${bottom + 22}`);
    this.svg.setAttribute("aria-label", `${kind.name} of each layer over the front`);
    this.host.style.height = `${bottom + 22}px`;
    this.chosen = shape("g");
    this.svg.replaceChildren(...nodes, this.chosen);
    this.mark();
  }

  layerName(name, row) {
    const { left } = this.geometry;
    const most = Math.floor((left - 12) / LETTER);
    const short = name.length > most ? `…${name.slice(-(most - 1))}` : name;
    const place = { x: left - 8, y: TOP + row * ROW + 14, "text-anchor": "end" };
    return shape("text", place, short, shape("title", {}, name));
  }

  get priced() {
    const { x } = this.app.state;
    return METRICS[x].better < 0 ? x : "latency_ms";
  }

  get priceUnit() {
    return unitFor(this.priced, Math.max(...this.columns.map(([p]) => p.run.value(this.priced, p.index))));
  }

  priceTitle() {
    const unit = this.app.state.relative ? "×" : this.priceUnit[0];
    return `${this.app.metricName(this.priced)}${unit ? `, ${unit}` : ""}`;
  }

  price({ run, index }) {
    const { app, priced } = this;
    const value = app.coordinate(run, priced, index);
    return digits(app.state.relative ? value : value / this.priceUnit[1], 3);
  }

  // Pointer and keys

  /** [column, layer] below the pointer. */
  under(event) {
    const { left, top } = this.host.getBoundingClientRect();
    const column = this.columns[Math.floor((event.clientX - left - this.geometry.left) / this.geometry.cell)];
    const layer = column?.[1][Math.floor((event.clientY - top - TOP) / ROW)];
    return layer ? [column, layer] : null;
  }

  hover(event) {
    const found = this.under(event);
    this.tip.hidden = !found;
    if (!found) return;
    const [[point], layer] = found;
    const { left, top } = this.host.getBoundingClientRect();
    const text = `${point.run.title(point.index)}: ${KINDS[this.what.value].tell(layer)}`;
    this.showTip(event.clientX - left, event.clientY - top, [layer.name, text]);
  }

  open(column) {
    if (column) this.app.select(column[0].run, column[0].index);
  }

  key(event) {
    const at = this.at();
    const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: this.columns.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    this.open(this.columns[clamp(to, 0, this.columns.length - 1)]);
    const [point] = this.columns[this.at()];
    this.app.say(this.app.describe(point.run, point.index).join(", "));
  }

  /** The column that is selected; -1 where none is. */
  at() {
    const { selected } = this.app;
    return this.columns.findIndex(([p]) => p.run === selected?.run && p.index === selected?.index);
  }

  mark() {
    if (!this.chosen || !this.columns.length) return;
    const { left, cell, bottom } = this.geometry;
    const at = this.at();
    const place = { x: left + at * cell, y: TOP, width: cell, height: bottom - TOP, rx: 2 };
    this.chosen.replaceChildren(...(at < 0 ? [] : [shape("rect", { class: "column", ...place })]));
  }
}

/** At most so many of a list, both ends among them, at even distances. */
function spread(all, most) {
  if (all.length <= most) return all;
  return Array.from({ length: most }, (_, i) => all[Math.round((i * (all.length - 1)) / (most - 1))]);
}

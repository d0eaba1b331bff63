// What the plots have in common: a box with axes, and a tip beside the pointer.

import { element, shape } from "./dom.js";
import { clamp, ticks } from "./numbers.js";

const MARGIN = { left: 72, right: 20, top: 14, bottom: 46 };

export class Plot {
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
    const { left, right, top, bottom } = MARGIN;
    this.box = { left, right: this.width - right, top, bottom: this.height - bottom };
  }

  px(x) {
    const [low, high] = this.view.x;
    return this.box.left + ((x - low) / (high - low)) * (this.box.right - this.box.left);
  }

  py(y) {
    const [low, high] = this.view.y;
    return this.box.bottom - ((y - low) / (high - low)) * (this.box.bottom - this.box.top);
  }

  /** A clip path of the box. */
  clip(id) {
    const { left, right, top, bottom } = this.box;
    return shape("clipPath", { id }, shape("rect", { x: left, y: top, width: right - left, height: bottom - top }));
  }

  /** Grid, ticks and titles. An axis is {title, log, unit}; `unit` divides its values. */
  axes(x, y) {
    const { left, right, top, bottom } = this.box;
    const nodes = [];
    for (const [value, text] of this.ticks(this.view.x, x, Math.max(3, (right - left) / 90))) {
      const at = this.px(value);
      nodes.push(shape("line", { class: "grid", x1: at, x2: at, y1: top, y2: bottom }));
      nodes.push(shape("text", { x: at, y: bottom + 16, "text-anchor": "middle" }, text));
    }
    for (const [value, text] of this.ticks(this.view.y, y, Math.max(3, (bottom - top) / 45))) {
      const at = this.py(value);
      nodes.push(shape("line", { class: "grid", x1: left, x2: right, y1: at, y2: at }));
      nodes.push(shape("text", { x: left - 8, y: at + 4, "text-anchor": "end" }, text));
    }
    const title = (text, attributes) => shape("text", { class: "title", "text-anchor": "middle", ...attributes }, text);
    nodes.push(
      shape("line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom }),
      shape("line", { class: "axis", x1: left, x2: left, y1: top, y2: bottom }),
      title(x.title, { x: (left + right) / 2, y: this.height - 8 }),
      title(y.title, { x: -(top + bottom) / 2, y: 16, transform: "rotate(-90)" }),
    );
    return nodes;
  }

  ticks([low, high], { log = false, unit = 1 }, wanted) {
    const there = (v) => (log ? v - Math.log10(unit) : v / unit);
    const back = (v) => (log ? v + Math.log10(unit) : v * unit);
    return ticks(there(low), there(high), log, wanted).map(([value, text]) => [back(value), text]);
  }

  showTip(x, y, [title, ...lines]) {
    this.tip.replaceChildren(element("b", {}, title), ...lines.map((line) => element("div", {}, line)));
    this.tip.hidden = false;
    const { offsetWidth: w, offsetHeight: h } = this.tip;
    const { width, height } = this.host.getBoundingClientRect();
    this.tip.style.left = `${clamp(x + 14, 0, Math.max(0, width - w))}px`;
    this.tip.style.top = `${clamp(y - h - 10 < 0 ? y + 14 : y - h - 10, 0, Math.max(0, height - h))}px`;
  }
}

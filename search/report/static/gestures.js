// Pointer and keys of the scatter.

import { clamp } from "./numbers.js";

const KEYS = "Arrow keys walk the front, Enter opens a policy, plus and minus zoom, 0 shows all.";

export class Gestures {
  #drag = null; // {x0, y0, x, y, view, brush, moved}

  constructor(scatter) {
    this.scatter = scatter;
    this.mode = "pan"; // or "select": what dragging does
    const { host } = scatter;
    host.setAttribute("tabindex", "0");
    host.setAttribute("role", "application");
    host.setAttribute("aria-label", `Scatter of all trials with the front. ${KEYS}`);
    host.addEventListener("pointerdown", (e) => this.down(e));
    host.addEventListener("pointermove", (e) => this.move(e));
    host.addEventListener("pointerup", (e) => this.up(e));
    host.addEventListener("pointercancel", () => this.cancel());
    host.addEventListener("pointerleave", () => scatter.hover(null));
    host.addEventListener("dblclick", () => scatter.fit());
    host.addEventListener("wheel", (e) => this.wheel(e), { passive: false });
    host.addEventListener("keydown", (e) => this.key(e));
  }

  /** The rectangle that is being drawn by a brush, in pixels. */
  get frame() {
    const drag = this.#drag;
    if (!drag?.brush || !drag.moved) return null;
    const { x0, y0, x, y } = drag;
    return { x: Math.min(x0, x), y: Math.min(y0, y), width: Math.abs(x - x0), height: Math.abs(y - y0) };
  }

  at(event) {
    const { left, top } = this.scatter.host.getBoundingClientRect();
    return [event.clientX - left, event.clientY - top];
  }

  down(event) {
    if (event.button !== 0) return;
    const [x, y] = this.at(event);
    const brush = event.shiftKey || this.mode === "select";
    this.#drag = { x0: x, y0: y, x, y, view: structuredClone(this.scatter.view), brush, moved: false };
    this.scatter.host.setPointerCapture(event.pointerId);
  }

  move(event) {
    const { scatter } = this;
    const [x, y] = this.at(event);
    const drag = this.#drag;
    if (!drag) return void scatter.hover(scatter.nearest(x, y));
    [drag.x, drag.y] = [x, y];
    drag.moved ||= Math.hypot(x - drag.x0, y - drag.y0) > 4;
    if (!drag.moved) return;
    scatter.hover(null);
    if (drag.brush) return void scatter.marks();
    const { left, right, top, bottom } = scatter.box;
    scatter.pan((drag.x0 - x) / (right - left), (y - drag.y0) / (bottom - top), drag.view);
  }

  up(event) {
    const { scatter, frame } = this;
    const { app } = scatter;
    const drag = this.#drag;
    this.#drag = null;
    if (!drag) return;
    if (frame) app.brush(scatter.inside(frame));
    else if (!drag.moved) {
      const point = scatter.nearest(...this.at(event));
      if (point) app.select(point.run, point.index);
    }
    scatter.marks();
  }

  cancel() {
    this.#drag = null;
    this.scatter.marks();
  }

  wheel(event) {
    if (!event.ctrlKey && !event.metaKey) return; // the page scrolls
    event.preventDefault();
    this.scatter.zoom(Math.exp(clamp(event.deltaY, -100, 100) * 0.002), ...this.at(event));
  }

  key(event) {
    const { scatter } = this;
    const { app } = scatter;
    const arrow = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key];
    if (event.shiftKey && arrow) scatter.pan(0.15 * arrow[0], 0.15 * arrow[1]);
    else if (this.walk(event.key)) app.say(app.describe(app.selected.run, app.selected.index).join(", "));
    else if (event.key === "+" || event.key === "=") scatter.zoom(1 / 1.4);
    else if (event.key === "-") scatter.zoom(1.4);
    else if (event.key === "0") scatter.fit();
    else if (event.key === "Enter" && app.selected) app.detail.host.focus();
    else if (event.key === "Escape") {
      this.cancel();
      app.brush([]);
    } else return;
    event.preventDefault();
  }

  /** Select the next of the front; false where the key means something else. */
  walk(key) {
    const { app } = this.scatter;
    const line = app.shown.length > 1 ? app.joint : (app.shown[0]?.front ?? []);
    const at = line.findIndex((p) => p.run === app.selected?.run && p.index === app.selected?.index);
    const to = { ArrowLeft: at < 0 ? 0 : at - 1, ArrowRight: at + 1, Home: 0, End: line.length - 1 }[key];
    if (to === undefined || !line.length) return false;
    const { run, index } = line[clamp(to, 0, line.length - 1)];
    app.select(run, index);
    return true;
  }
}

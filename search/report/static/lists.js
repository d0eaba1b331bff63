// Lists beside the plots: the runs, what the marks mean, and the trials that a brush has selected.

import { KIND } from "./data.js";
import { button, CONTROL_SHAPES, CROSS, element, heads, mark, SHAPES } from "./dom.js";
import { counted, digits } from "./numbers.js";

const MANY_RUNS = 6; // more than this are told in a line less each
const MOST_ROWS = 200; // of the table of selected trials

export class RunList {
  constructor(app, host) {
    this.app = app;
    this.list = element("ul");
    this.total = element("p", { class: "hint" });
    const all = (visible) => button(visible ? "All" : "None", () => app.showRuns(visible));
    const buttons = element("span", { class: "buttons" }, all(true), all(false));
    host.append(element("header", {}, element("h2", {}, "Runs"), buttons), this.list, this.total);
  }

  draw() {
    const { app } = this;
    const focused = document.activeElement?.dataset?.run;
    this.list.replaceChildren(...[...app.runs.values()].map((run) => this.row(run)));
    if (focused) this.list.querySelector(`[data-run="${focused}"]`)?.focus();
    const several = app.shown.length > 1;
    this.total.textContent = several ? `Joint front of ${app.joint.length}, hypervolume ${digits(app.volume)}.` : "";
  }

  row(run) {
    const { app } = this;
    const change = (e) => app.showRuns(e.target.checked, run);
    const box = element("input", { type: "checkbox", checked: run.visible, "data-run": run.id, change });
    const simulated = run.study.simulated ? element("span", { class: "badge loud" }, "simulated") : null;
    return element("li", {}, element("label", {}, box, app.mark(run), element("span", { class: "name", title: run.name }, run.name),
      element("span", { class: "facts" }, simulated, this.facts(run).map((fact) => element("span", {}, fact)))));
  }

  facts(run) {
    const { app } = this;
    const trials = `${counted(run.trials)} trials${run.failed ? `, ${run.failed} failed` : ""}`;
    const few = app.runs.size <= MANY_RUNS;
    const { agent, device } = run.study;
    const facts = few ? [[agent, device].filter(Boolean).join(" on "), trials] : [`${agent}, ${trials}`];
    if (run.visible && run.count) {
      const share = run.front.filter((point) => point.joint).length;
      const joint = app.shown.length > 1 ? ` · joint front ${share} of ${app.joint.length}` : "";
      facts.push(`front ${run.front.length}${joint}`, `hypervolume ${digits(run.volume)}`);
    }
    if (run.bad) facts.push(`${run.bad} unreadable lines`);
    return facts;
  }
}

export class Legend {
  constructor(app, host) {
    this.app = app;
    this.host = host;
  }

  draw() {
    const { app } = this;
    const ink = app.theme("ink");
    const entry = (d, attributes, text) => element("span", {}, mark(d, attributes), text);
    const parts = this.colours(entry);
    const grey = { fill: app.theme("infeasible"), opacity: 0.7 };
    if (app.shown.some((run) => run.over)) parts.push(entry(SHAPES[0], grey, "not within the budget"));
    const hollow = { fill: "none", stroke: app.theme("muted"), "stroke-width": 1.5 };
    if (app.shown.some((run) => run.parts)) parts.push(entry(SHAPES[0], hollow, "scored on a part of the split"));
    const names = app.marked.filter((p) => p.kind !== KIND.final).map((p) => p.run.text("label", p.index));
    for (const name of new Set(names)) parts.push(entry(CONTROL_SHAPES[name] ?? SHAPES[1], { fill: ink }, name));
    if (app.shown.some((run) => run.best >= 0)) parts.push(entry(RING, { fill: "none", stroke: ink, "stroke-width": 2 }, "best"));
    if (app.marked.some((p) => p.kind === KIND.final)) parts.push(entry(CROSS, { stroke: ink, "stroke-width": 2 }, "fine-tuned"));
    this.host.replaceChildren(...parts);
  }

  /** What the colours mean, where they do not stand for runs. */
  colours(entry) {
    const { app } = this;
    if (app.state.colour === "number") {
      const stops = [0, 1, 2, 3].map((i) => app.theme(`n${i}`)).join(",");
      const ramp = element("i", { class: "ramp", style: `background: linear-gradient(90deg, ${stops})` });
      return [element("span", {}, "first trial ", ramp, " last")];
    }
    if (app.state.colour !== "agent") return [];
    const front = app.shown.length > 1 ? app.joint : (app.shown[0]?.front ?? []);
    return app.agents.map((agent) => {
      const given = front.filter((p) => p.run.text("label", p.index) === agent).length;
      const { colour, shape } = app.agentStyle(agent);
      return entry(shape, { fill: colour }, `${agent}: ${given} of the front’s ${front.length}`);
    });
  }
}

const RING = "M-6,0a6,6 0 1,0 12,0a6,6 0 1,0 -12,0z";

/** The trials inside a brush, best first. */
export class Selection {
  constructor(app, host) {
    this.app = app;
    this.host = host;
    this.key = "";
  }

  draw() {
    const { app, host } = this;
    const points = app.brushed;
    host.hidden = !points;
    const key = points?.map((p) => `${p.run.id}.${p.index}.${p.vx}.${p.vy}`).join() ?? "";
    if (key === this.key) return;
    this.key = key;
    if (!points) return void host.replaceChildren();
    const rows = [...points].sort((a, b) => a.y - b.y || a.x - b.x).slice(0, MOST_ROWS);
    const name = (axis) => app.metricName(app.state[axis]);
    host.replaceChildren(
      element("header", {}, element("h2", {}, `${counted(points.length)} selected`),
        button("Zoom to them", () => app.scatter.fit(points)), button("Clear", () => app.brush([]))),
      element("div", { class: "scroll" }, element("table", { class: "selection" },
        heads("Trial", "Run", "Agent", [name("y"), "number"], [name("x"), "number"]),
        element("tbody", {}, rows.map((point) => this.row(point))))),
      points.length > rows.length ? element("p", { class: "hint" }, `The first ${rows.length} by ${name("y")}.`) : "");
  }

  row({ run, index, vx, vy }) {
    const { app } = this;
    const open = () => app.select(run, index);
    const number = (text) => element("td", { class: "number" }, text);
    return element("tr", { click: open }, element("td", {}, button(run.columns.number[index], open)), element("td", {}, run.name),
      element("td", {}, run.text("label", index)), number(app.amount(app.state.y, vy)), number(app.amount(app.state.x, vx)));
  }
}

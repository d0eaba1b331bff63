// One record: its figures, the command that exports it and its policy layer by layer; with nothing chosen, the best of each run.

import { button, element, heads } from "./dom.js";
import { tiesWithBest } from "./fronts.js";
import { amount, bitShare, bitText, clamp, counted, digits, METRICS, signed, times } from "./numbers.js";

const QUIET = ["best", "ties with the best", "front"];

export class Detail {
  constructor(app, host) {
    this.app = app;
    this.host = host;
    this.shown = ""; // what stands here, to draw it again where that has changed
  }

  /** Show what is selected, beside what is pinned. */
  async show() {
    const { app } = this;
    const { selected, pinned } = app;
    if (!selected) return void this.overview();
    const { run, index } = selected;
    const other = pinned && !(pinned.run === run && pinned.index === index) && pinned.index < pinned.run.count ? pinned : null;
    let detail;
    let base;
    try {
      [detail] = await app.policies(run, [index]);
      if (other) [base] = await app.policies(other.run, [other.index]);
    } catch (error) {
      detail = { policy: null, layers: null, problem: error.message };
    }
    if (app.selected !== selected) return; // another click came first
    this.shown = this.state();
    const nodes = [this.head(run, index), this.where(run, index), this.figures(run, index, other)];
    if (run.isTrial(index)) nodes.push(this.exporting(run, run.columns.number[index], detail));
    if (detail?.problem) nodes.push(element("p", { class: "notice" }, detail.problem));
    if (detail?.layers) nodes.push(this.policy(detail, other && { ...other, layers: base?.layers ?? [] }));
    this.host.replaceChildren(...nodes);
  }

  /** Draw again where what is known of the record has changed. */
  refresh() {
    if (this.state() !== this.shown) void this.show();
  }

  state() {
    const { selected, pinned, shown, state, scoreName, theme } = this.app;
    const bests = shown.map((run) => [run.id, run.best]);
    if (!selected) return JSON.stringify([bests, state.x, state.colour, scoreName, theme("card")]);
    const { run, index } = selected;
    return JSON.stringify([run.id, index, this.flags(run, index), run.finals.size, pinned?.run.id, pinned?.index, theme("card")]);
  }

  /** The best of each run that is shown, to begin with. */
  overview() {
    const { app } = this;
    this.shown = this.state();
    const runs = app.shown.filter((run) => run.best >= 0);
    const priced = METRICS[app.state.x].better < 0 ? app.state.x : "latency_ms";
    const hint = "Click a point: its policy stands here layer by layer, with what it costs and the command that exports it.";
    const row = (run) => {
      const { best } = run;
      const open = button(`Trial ${run.columns.number[best]}`, () => app.select(run, best));
      const cells = [app.scoreText(run.value("score", best)), amount(priced, run.value(priced, best)),
        times(run.value(priced, best) / run.whole(priced))];
      return element("tr", {}, element("td", {}, app.mark(run), ` ${run.name}`), element("td", {}, open),
        cells.map((cell) => element("td", { class: "number" }, cell)));
    };
    const head = heads("run", "", [app.metricName("score"), "number"], [app.metricName(priced), "number"], ["to dense", "number"]);
    this.host.replaceChildren(
      element("header", {}, element("h2", {}, "Best under the budget")),
      runs.length ? element("table", { class: "bests" }, head, element("tbody", {}, runs.map(row)))
        : element("p", { class: "muted" }, "No trial meets the budget yet."),
      element("p", { class: "hint" }, hint));
  }

  flags(run, index) {
    const flags = [];
    const { simulated, extrapolated, feasible, failed } = run.columns;
    if (simulated[index] === 1) flags.push("simulated");
    if (extrapolated[index] === 1) flags.push("extrapolated");
    if (run.best === index) flags.push("best");
    if (tiesWithBest(run, index)) flags.push("ties with the best");
    if (run.front.some((p) => p.index === index)) flags.push("front");
    if (Number.isFinite(failed[index])) flags.push("failed");
    else if (run.isTrial(index) && feasible[index] !== 1) flags.push("not within the budget");
    return flags;
  }

  head(run, index) {
    const { app } = this;
    const badges = this.flags(run, index).map((text) => {
      return element("span", { class: `badge ${QUIET.includes(text) ? "" : "loud"}` }, text);
    });
    const isPinned = app.pinned?.run === run && app.pinned.index === index;
    const pin = button(isPinned ? "Pinned" : "Pin", () => app.pin(isPinned ? null : { run, index }), {
      "aria-pressed": String(isPinned), title: "Compare other policies with this one",
    });
    const close = button("✕", () => app.deselect(), { "aria-label": "Close", title: "Back to the best of each run" });
    return element("header", {}, element("h2", {}, run.title(index)), badges, element("span", { class: "buttons" }, pin, close));
  }

  where(run, index) {
    const { app } = this;
    const parts = [run.name];
    if (run.isTrial(index)) parts.push(run.text("label", index));
    if (run.study.budget?.length) parts.push(`budget ${run.study.budget.join(", ")}`);
    const failed = Number.isFinite(run.columns.failed[index]) ? `Failed: ${run.text("failed", index)}` : null;
    return element("div", { class: "where muted" }, app.mark(run), ` ${parts.join(" · ")}`,
      failed && element("p", { class: "notice" }, failed));
  }

  /** Every metric: its value, what it is to the dense model, and to the pinned. */
  figures(run, index, other) {
    const told = Object.keys(METRICS).filter((metric) => Number.isFinite(run.value(metric, index)));
    const rows = told.flatMap((metric) => this.figure(run, index, metric, other));
    const final = run.isTrial(index) ? run.finals.get(run.columns.number[index]) : undefined;
    if (final !== undefined) rows.push(...this.tuned(run, final));
    const head = heads("", ["value", "number"], ["to dense", "number"],
      other && ["to the pinned", "number", `${other.run.title(other.index)} of ${other.run.name}`]);
    const cell = (text) => element("td", { class: "number" }, text);
    const body = rows.map(([name, ...cells]) => {
      const filled = [...cells, "", "", ""].slice(0, other ? 3 : 2);
      return element("tr", {}, element("td", { class: name.startsWith(" ") ? "muted" : "" }, name), filled.map(cell));
    });
    const source = run.text("provenance", index);
    const model = run.columns.simulated[index] === 1 ? " (simulated: a model, not a clock)" : "";
    return element("section", {}, element("table", {}, head, element("tbody", {}, body)),
      source ? element("p", { class: "hint" }, `Cost by ${source}${model}`) : null);
  }

  figure(run, index, metric, other) {
    const { app } = this;
    const [value, dense] = [run.value(metric, index), run.whole(metric)];
    const base = other ? other.run.value(metric, other.index) : NaN;
    if (metric === "score") {
      const error = run.value("stderr", index);
      const text = `${app.amount(metric, value)}${error >= 0 ? ` ± ${app.scoreText(error)}` : ""}`;
      const gap = (from, none) => (Number.isFinite(from) ? signed(value - from) : none);
      const rows = [[app.metricName(metric), text, gap(dense, ""), gap(base, "–")]];
      const part = run.part(index);
      if (part) rows.push(["  scored on a part of the split", `${counted(part)} of ${counted(run.whole("count"))}`]);
      return rows;
    }
    const share = Number.isFinite(dense) ? times(value / dense) : "";
    const more = Number.isFinite(base) ? `${signed(100 * (value / base - 1))} %` : "–";
    const rows = [[app.metricName(metric), amount(metric, value), share, more]];
    const [low, high] = [run.value("low_ms", index), run.value("high_ms", index)];
    if (metric === "latency_ms" && high > low) rows.push(["  90 % interval", `${amount(metric, low)} – ${amount(metric, high)}`]);
    return rows;
  }

  /** What became of a trial after its fine-tuning. */
  tuned(run, final) {
    const { app } = this;
    const [score, error] = [run.value("score", final), run.value("stderr", final)];
    const text = `${app.amount("score", score)} ± ${app.scoreText(error)}`;
    const rows = [["fine-tuned: score", text, signed(score - run.whole("score"))]];
    const [ratio, low, high] = ["ratio", "ratio_low", "ratio_high"].map((name) => run.value(name, final));
    if (Number.isFinite(ratio)) rows.push(["fine-tuned: measured", `${low.toPrecision(3)} – ${times(high)}`, times(ratio)]);
    return rows;
  }

  exporting(run, number, detail) {
    const command = `${run.command} --trial ${number} --format ${run.format}`;
    const code = element("code", {}, command);
    const copy = button("Copy", async () => {
      try {
        await navigator.clipboard.writeText(command);
        copy.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(code);
        copy.textContent = "Press Ctrl + C";
      }
      setTimeout(() => (copy.textContent = "Copy"), 1500);
    });
    const save = button("policy.json", () => {
      const url = URL.createObjectURL(new Blob([`${JSON.stringify(detail.policy, null, 1)}\n`], { type: "application/json" }));
      element("a", { href: url, download: `policy-${number}.json` }).click();
      setTimeout(() => URL.revokeObjectURL(url), 1000);
    }, { disabled: !detail?.policy, title: "Download the policy" });
    return element("section", {}, element("div", { class: "command" }, code, copy, save));
  }

  // The policy

  /** One row a layer: channels, rank and bits, and its share of the compressed model's latency (or MACs) and size. */
  policy(detail, other) {
    const shares = sharesOf(detail);
    const before = new Map((other?.layers ?? []).map((layer) => [layer.name, layer]));
    const rows = detail.layers.map((layer) => this.layer(layer, before.get(layer.name), shares));
    const head = heads("layer", "channels", "rank", ["W", "bits", "weight bits"], ["A", "bits", "activation bits"],
      ...shares.map(({ name }) => [name, "", `share of ${name}`]));
    const title = other ? `Policy, and in brackets that of ${other.run.title(other.index).toLowerCase()}` : "Policy";
    const kept = shares[0].name === "latency" ? "" : "; latency by layer is kept for the front only";
    return element("section", {}, element("h3", {}, title),
      element("table", { class: "policy" }, head, element("tbody", {}, rows)),
      element("p", { class: "hint" }, "W, A: bits of weights and activations (fp: floating point). ",
        `Bars on the right: the layer’s share of the compressed model${kept}.`));
  }

  layer(layer, old, shares) {
    const changed = old && ["channels", "rank", "form", "weight_bits", "act_bits"].some((key) => old[key] !== layer[key]);
    const was = (key, text) => (old && old[key] !== layer[key] ? element("small", { class: "was" }, `(${text(old[key])})`) : null);
    const bits = (key) => {
      const background = this.app.ramp("heat", bitShare(layer[key]));
      const style = `background:${background};color:${this.app.textOn(background)}`;
      const title = layer[key] === 32 ? "floating point" : `${layer[key]} bits`;
      return element("td", { class: "bits" }, element("span", { style, title }, bitText(layer[key])), was(key, bitText));
    };
    const whole = element("span", { class: "muted" }, "–");
    const rank = layer.rank ? bar(layer.rank / layer.of_rank, `${layer.rank}/${layer.of_rank}`) : whole;
    return element("tr", { class: changed ? "changed" : "", "data-layer": layer.name },
      element("td", { class: "layer", title: `${layer.name} · ${layer.kind} ${layer.kernel.join("×")}` },
        element("bdi", {}, layer.name)),
      element("td", { title: `${layer.channels} of ${layer.of_channels} channels` },
        bar(layer.channels / layer.of_channels, `${layer.channels}/${layer.of_channels}`), was("channels", String)),
      element("td", { title: layer.rank ? `rank ${layer.rank} of ${layer.of_rank}, ${layer.form}` : "not factorised" },
        rank, was("rank", (value) => value ?? "whole")),
      bits("weight_bits"), bits("act_bits"),
      shares.map(({ name, of, top }) => {
        const share = of(layer);
        const text = share < 0.001 ? "<0.1%" : `${digits(100 * share, 2)}%`;
        return element("td", { title: `${digits(100 * share, 3)} % of ${name}` }, bar(share / top, text, "share"));
      }));
  }
}

function bar(share, text, kind = "") {
  const width = `width:${(100 * clamp(share, 0, 1)).toFixed(1)}%`;
  return element("div", { class: `bar ${kind}` }, element("i", { style: width }), element("span", {}, text));
}

/** What each layer takes of the whole, and the most that one takes: latency, or MACs where it is not known, and size. */
function sharesOf({ layers, latency }) {
  const sum = (values) => values.reduce((a, b) => a + b, 0) || 1;
  const times = latency && sum(Object.values(latency).map(Number));
  const [macs, size] = ["macs", "size_bytes"].map((key) => sum(layers.map((layer) => layer[key])));
  const first = times
    ? { name: "latency", of: (layer) => Number(latency[layer.name] ?? 0) / times }
    : { name: "MACs", of: (layer) => layer.macs / macs };
  const shares = [first, { name: "size", of: (layer) => layer.size_bytes / size }];
  return shares.map((share) => ({ ...share, top: Math.max(...layers.map(share.of), 1e-9) }));
}

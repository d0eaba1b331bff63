// Where the data come from: the plug-in's routes, or a page that carries them; and what is known of one run.

import { METRICS } from "./numbers.js";

export const KIND = { trial: 0, control: 1, final: 2, dense: 3 }; // as in `runs.py`

async function ask(route) {
  const answer = await fetch(new URL(route, import.meta.url), { cache: "no-store" });
  if (answer.ok) return answer;
  const { error } = await answer.json().catch(() => ({ error: `HTTP ${answer.status}` }));
  throw new Error(error);
}

/** Reads from the plug-in's routes. */
export class Served {
  live = true;
  #tag = "";

  /** Summaries of all runs; null where nothing is new. */
  async runs() {
    const { tag, runs } = await (await ask(`./runs?tag=${this.#tag}`)).json();
    this.#tag = tag;
    return runs ?? null;
  }

  async trials(since) {
    const query = since.map(({ id, epoch, count }) => `${id}.${epoch}.${count}`).join(",");
    return (await ask(`./trials?since=${query}`)).arrayBuffer();
  }

  async policies(run, indices) {
    return (await (await ask(`./policies?run=${run.id}&index=${indices.join(",")}`)).json()).policies;
  }
}

function decode(base64) {
  return Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
}

/** Reads from what a page carries with it: JSON, compressed. */
export class Embedded {
  live = false;

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
    const problem = "This page holds the policies of the fronts, the controls and the first trials; the run folder has all.";
    return indices.map((index) => this.data.policies[run.id]?.[index] ?? { index, policy: null, layers: null, problem });
  }
}

/** The parts of a binary answer: [header, {column: Float64Array}]. */
export function unpack(buffer) {
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

/** All that is known of one run. A record is told by its index; its numbers stand in `columns`. */
export class Run {
  constructor(summary, place) {
    this.id = summary.id;
    this.place = place; // its colour
    this.visible = true;
    this.version = 0;
    this.details = new Map(); // by index: policy and layers
    this.update(summary);
    this.clear(summary.epoch);
  }

  update({ name, study, count, epoch, more, command, format, bad_lines: bad }) {
    Object.assign(this, { name, study, known: count, latest: epoch, pending: more, command, format, bad });
  }

  clear(epoch) {
    this.epoch = epoch;
    this.count = this.lastNumber = 0;
    this.trials = this.failed = this.over = this.parts = 0; // how many: all, failed, beyond the budget, scored on a part
    this.columns = {};
    this.strings = [];
    this.dense = -1;
    this.front = [];
    this.best = -1;
    this.finals = new Map(); // by the trial's number
    this.byNumber = new Map();
    this.agents = new Map(); // how many trials of each
    this.controls = new Set();
    this.metrics = new Set(); // that any record has
    this.details.clear();
    this.version++;
  }

  /** Whether the server has records that are not here. */
  get stale() {
    return this.epoch !== this.latest || this.count < this.known || this.pending;
  }

  append(header, columns) {
    if (header.epoch !== this.epoch || header.from !== this.count) this.clear(header.epoch);
    if (header.from !== this.count) return;
    const [from, count] = [this.count, this.count + header.count];
    for (const [name, block] of Object.entries(columns)) {
      let column = this.columns[name];
      if (!column || column.length < count) {
        const grown = new Float64Array(Math.max(256, 2 * count));
        if (column) grown.set(column.subarray(0, from));
        column = this.columns[name] = grown;
      }
      column.set(block, from);
    }
    this.count = count;
    this.strings = header.strings;
    this.pending = header.more;
    this.version++;
    for (let i = from; i < count; i++) this.take(i);
    for (const name of Object.keys(METRICS)) if (columns[name].some(Number.isFinite)) this.metrics.add(name);
  }

  /** Note what a new record is. */
  take(index) {
    const { kind, number, failed, feasible } = this.columns;
    if (kind[index] === KIND.trial) {
      const agent = this.text("label", index);
      this.trials++;
      this.failed += Number.isFinite(failed[index]);
      this.over += feasible[index] !== 1;
      this.parts += this.part(index) > 0;
      this.byNumber.set(number[index], index);
      this.lastNumber = Math.max(this.lastNumber, number[index]);
      this.agents.set(agent, (this.agents.get(agent) ?? 0) + 1);
    } else if (kind[index] === KIND.final) this.finals.set(number[index], index);
    else if (kind[index] === KIND.control) this.controls.add(this.text("label", index));
    else if (this.dense < 0) this.dense = index;
  }

  value(metric, index) {
    return index < 0 ? NaN : this.columns[metric][index];
  }

  text(column, index) {
    return this.strings[this.columns[column][index]] ?? "";
  }

  /** The dense model's value of a metric. */
  whole(metric) {
    return this.value(metric, this.dense);
  }

  isTrial(index) {
    return this.columns.kind[index] === KIND.trial;
  }

  /** Whether this is a trial with a score on the whole split: these alone stand on fronts. */
  isScored(index) {
    return this.isTrial(index) && Number.isFinite(this.columns.score[index]) && !this.part(index);
  }

  /** How many examples a trial was scored on, where that is only a part of those of the dense model; else 0. */
  part(index) {
    const [count, all] = [this.value("count", index), this.whole("count")];
    return this.isTrial(index) && count < all ? count : 0;
  }

  title(index) {
    const { kind, number } = this.columns;
    if (kind[index] === KIND.trial) return `Trial ${number[index]}`;
    if (kind[index] === KIND.final) return `Trial ${number[index]}, fine-tuned`;
    return `Control: ${this.text("label", index)}`;
  }
}

// The tab "Pareto": every trial of the searches below the log folder, their fronts, and the policy of each point.
//
// `module.py` joins this module and those it imports to the one that is served. In TensorBoard (`plugin.py`) it polls for new
// records; in a page of its own (`page.py`) it reads what the page holds.

import { App } from "./app.js";
import { Embedded, Served } from "./data.js";
import { element } from "./dom.js";

/** Build the page; TensorBoard calls this once. */
export async function render() {
  document.documentElement.lang = "en";
  const held = document.getElementById("tightrope-data");
  const source = held ? await Embedded.read(held.textContent) : new Served();
  const runs = source.runs(); // on its way while the style is loaded
  runs.catch(() => {}); // told by the poll
  if (!held) await style("./pareto.css");
  await new App(source, document.body).poll(runs);
}

function style(path) {
  const link = element("link", { rel: "stylesheet", href: new URL(path, import.meta.url).href });
  document.head.append(link);
  return new Promise((done) => ["load", "error"].forEach((event) => link.addEventListener(event, done)));
}

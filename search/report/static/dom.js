// Building HTML and SVG. What comes from a run is only ever set as text or as a number, never as markup.

const SVG = "http://www.w3.org/2000/svg";

export function element(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

export function shape(tag, attributes = {}, ...children) {
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

/** A mark beside a text, as it stands in the plots. */
export function mark(d, attributes) {
  return shape("svg", { class: "mark", viewBox: "-8 -8 16 16", "aria-hidden": "true" }, shape("path", { d, ...attributes }));
}

export function button(text, click, attributes = {}) {
  return element("button", { type: "button", click, ...attributes }, text);
}

/** The head of a table: texts, or [text, class, title]. */
export function heads(...cells) {
  const head = (cell) => {
    const [text, kind, title] = [cell].flat();
    return element("th", { scope: "col", class: kind, title }, text);
  };
  return element("thead", {}, element("tr", {}, cells.filter((cell) => cell !== null).map(head)));
}

// Marks of runs and agents beyond the sixth colour, of the controls, and of trials after their fine-tuning.
export const SHAPES = [
  "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0z",
  "M0,-5L5,0L0,5L-5,0z",
  "M-3.6,-3.6H3.6V3.6H-3.6z",
  "M0,-4.6L4.6,3.6H-4.6z",
];
export const DASHES = ["", "6 3", "2 3", "8 3 2 3"];
export const CONTROL_SHAPES = {
  dense: "M-5,-5H5V5H-5z",
  uniform: "M0,-6.2L6,4.4H-6z",
  random: "M0,6.2L6,-4.4H-6z",
  recipe: "M0,-7L1.9,-2.4L6.8,-2.1L3,1L4.2,5.8L0,3.2L-4.2,5.8L-3,1L-6.8,-2.1L-1.9,-2.4z",
};
export const CROSS = "M-5,0H5M0,-5V5";

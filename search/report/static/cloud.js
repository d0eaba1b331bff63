// Thousands of marks on a canvas.

import { element } from "./dom.js";
import { parseColour } from "./numbers.js";

/** Stamps marks into pixels by itself: a canvas that is told to draw each of them takes some twenty times as long. */
export class Cloud {
  #masks = new Map();
  #image = null;

  constructor() {
    this.canvas = element("canvas", { "aria-hidden": "true" });
    this.context = this.canvas.getContext("2d");
  }

  /** Draw marks {point, look} inside `box`, in a plot of `width` x `height` pixels, on a background. */
  draw(marks, box, width, height, ratio, background) {
    const size = [width, height].map((v) => Math.round(v * ratio));
    if (this.canvas.width !== size[0] || this.canvas.height !== size[1]) [this.canvas.width, this.canvas.height] = size;
    const [left, top] = [box.left, box.top].map((v) => Math.round(v * ratio));
    const [w, h] = [Math.round(box.right * ratio) - left, Math.round(box.bottom * ratio) - top];
    if (!marks.length || w < 1 || h < 1) return void this.context.clearRect(0, 0, ...size);
    if (this.#image?.width !== w || this.#image.height !== h) this.#image = this.context.createImageData(w, h);
    const { data } = this.#image;
    data.set([...parseColour(background), 255]);
    new Uint32Array(data.buffer).fill(new Uint32Array(data.buffer, 0, 1)[0]);
    for (const { point, look } of marks) {
      look.mask ??= this.#mask(look, ratio);
      stamp(data, w, h, Math.round(point.sx * ratio) - left, Math.round(point.sy * ratio) - top, look);
    }
    this.context.putImageData(this.#image, left, top);
  }

  /** How much of each pixel a mark covers, in 256ths: {side, cover}. */
  #mask({ d, size, hollow, alpha }, ratio) {
    const key = `${d}|${size}|${hollow}|${alpha}|${ratio}`;
    const known = this.#masks.get(key);
    if (known) return known;
    const side = Math.ceil(6 * size * ratio) * 2 + 1;
    const canvas = element("canvas", { width: side, height: side });
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.translate(side / 2, side / 2);
    context.scale(size * ratio, size * ratio);
    if (hollow) {
      context.lineWidth = 1.5;
      context.stroke(new Path2D(d));
    } else context.fill(new Path2D(d));
    const { data } = context.getImageData(0, 0, side, side);
    const cover = Uint16Array.from({ length: side * side }, (_, i) => Math.round((data[4 * i + 3] * alpha * 256) / 255));
    const mask = { side, cover };
    this.#masks.set(key, mask);
    return mask;
  }
}

/** Blend one mark, its centre at (x, y), into an image of `w` x `h` pixels. */
function stamp(data, w, h, x, y, { mask: { side, cover }, rgb: [r, g, b] }) {
  const [x0, y0] = [x - (side >> 1), y - (side >> 1)];
  if (x0 >= w || y0 >= h || x0 + side <= 0 || y0 + side <= 0) return;
  const [from, to] = [Math.max(0, -x0), Math.min(side, w - x0)];
  for (let j = Math.max(0, -y0); j < side && y0 + j < h; j++) {
    let at = 4 * ((y0 + j) * w + x0 + from);
    for (let i = from; i < to; i++, at += 4) {
      const a = cover[j * side + i];
      if (a === 0) continue;
      data[at] += ((r - data[at]) * a) >> 8;
      data[at + 1] += ((g - data[at + 1]) * a) >> 8;
      data[at + 2] += ((b - data[at + 2]) * a) >> 8;
    }
  }
}

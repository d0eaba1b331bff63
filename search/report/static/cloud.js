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

  /** The pixels of a mark, from its centre, and how much of each it covers, in 256ths: {reach, dx, dy, cover}. */
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
    const pixels = [];
    const { data } = context.getImageData(0, 0, side, side);
    for (let i = 0; i < side * side; i++) {
      const cover = Math.round((data[4 * i + 3] * alpha * 256) / 255);
      if (cover) pixels.push([(i % side) - (side >> 1), Math.floor(i / side) - (side >> 1), cover]);
    }
    const [dx, dy, cover] = [0, 1, 2].map((k) => Int32Array.from(pixels, (pixel) => pixel[k]));
    const mask = { reach: side >> 1, dx, dy, cover };
    this.#masks.set(key, mask);
    return mask;
  }
}

/** Blend one mark, its centre at (x, y), into an image of `w` x `h` pixels. */
function stamp(data, w, h, x, y, { mask: { reach, dx, dy, cover }, rgb: [r, g, b] }) {
  if (x < -reach || y < -reach || x >= w + reach || y >= h + reach) return;
  const whole = x >= reach && y >= reach && x < w - reach && y < h - reach;
  for (let i = 0; i < cover.length; i++) {
    const [px, py] = [x + dx[i], y + dy[i]];
    if (!whole && (px < 0 || py < 0 || px >= w || py >= h)) continue;
    const at = 4 * (py * w + px);
    const a = cover[i];
    data[at] += ((r - data[at]) * a) >> 8;
    data[at + 1] += ((g - data[at + 1]) * a) >> 8;
    data[at + 2] += ((b - data[at + 2]) * a) >> 8;
  }
}

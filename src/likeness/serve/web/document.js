// What the user works on: two layers, a prompt and settings. It is kept in the browser's storage, per tab.

import { History } from "./history.js";
import { layerOf, padded, resized } from "./raster.js";
import { pixelsOfImage } from "./png.js";

export const PAPER = 255;
const DEFAULTS = { prompt: "", negative: "", seed: 1, maskScale: 1, sketchScale: 1 };

export class Document {
  /** @param side of the layers, @param palette [[r, g, b], ...] by class */
  constructor(side, palette) {
    this.side = side;
    this.palette = palette;
    this.values = { ...DEFAULTS };
    this.layers = { mask: layerOf(side, side), sketch: layerOf(side, side, PAPER) };
    this.history = new History(this.layers, this.values);
  }

  get hasMask() { return this.layers.mask.data.some((value) => value !== 0); }

  get hasSketch() { return this.layers.sketch.data.some((value) => value !== PAPER); }

  /** The photograph that is edited, aligned, and its mask, {blob, before}; null for other masks. */
  get photo() { return this.history.photo; }

  set photo(photo) { this.history.photo = photo; }

  /** Replaces layers by others of any size, and values, as one step of the history. */
  replace(layers, values = {}) {
    for (const [name, layer] of Object.entries(layers)) {
      const square = padded(layer, name === "mask" ? 0 : PAPER);
      this.layers[name].data.set(resized(square, this.side, this.side, name === "sketch").data);
    }
    Object.assign(this.values, values);
    this.history.commit(true);
  }

  /** Empty layers. */
  blank() {
    return { mask: layerOf(this.side, this.side), sketch: layerOf(this.side, this.side, PAPER) };
  }

  reset() {
    this.history.begin();
    this.photo = null;
    this.replace(this.blank());
  }

  /** Layer of an image in canonical form: a Blob, or an <img>. */
  async layerOfImage(image, name) {
    const { data, width, height } = await pixelsOfImage(image);
    const layer = layerOf(width, height);
    const index = new Map(this.palette.map(([r, g, b], i) => [(r << 16) | (g << 8) | b, i]));
    for (let i = 0; i < layer.data.length; i++) {
      const [r, g, b] = data.subarray(4 * i), color = (r << 16) | (g << 8) | b;
      if (name === "mask" && !index.has(color)) index.set(color, this.nearest(r, g, b)); // browsers may add noise
      layer.data[i] = name === "mask" ? index.get(color) : r;
    }
    return layer;
  }

  /** Class with the nearest color. */
  nearest(r, g, b) {
    const distances = this.palette.map(([u, v, w]) => (r - u) ** 2 + (g - v) ** 2 + (b - w) ** 2);
    return distances.indexOf(Math.min(...distances));
  }

  /** Keeps the state for a reload. Layers are run-length coded. */
  save() {
    const layers = Object.fromEntries(Object.entries(this.layers).map(([name, layer]) => [name, runs(layer.data)]));
    try {
      sessionStorage.setItem("document", JSON.stringify({ side: this.side, values: this.values, layers }));
    } catch { /* the storage is full or forbidden: nothing is kept */ }
  }

  /** Restores what `save` kept; returns whether there was anything. */
  restore() {
    let kept = null;
    try {
      kept = JSON.parse(sessionStorage.getItem("document"));
    } catch { /* as in `save` */ }
    if (!kept) return false;
    const layers = {};
    for (const [name, list] of Object.entries(kept.layers)) {
      let at = 0;
      layers[name] = layerOf(kept.side, kept.side);
      for (const [value, count] of list) layers[name].data.fill(value, at, (at += count));
    }
    this.replace(layers, kept.values);
    this.history.clear();
    return true;
  }
}

function runs(data) {
  const out = [];
  for (const value of data) {
    const last = out.at(-1);
    if (last && last[0] === value) last[1]++; else out.push([value, 1]);
  }
  return out;
}

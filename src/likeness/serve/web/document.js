// What the user works on: two layers, a prompt and settings. It is kept in the browser's storage, per tab.

import { History } from "./history.js";
import { layerOf, resized } from "./raster.js";
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
    this.history = new History(this.layers);
  }

  get hasMask() { return this.layers.mask.data.some((value) => value !== 0); }

  get hasSketch() { return this.layers.sketch.data.some((value) => value !== PAPER); }

  /** The photograph that is edited, aligned, and its mask, {blob, before}; null for other masks. */
  get photo() { return this.history.photo; }

  set photo(photo) { this.history.photo = photo; }

  /** Replaces a layer by another of any size, as one step of the history. */
  replace(name, layer) {
    const { width, height } = this.layers[name];
    this.layers[name].data.set(resized(layer, width, height).data);
    this.history.commit();
  }

  reset() {
    this.photo = null;
    this.layers.mask.data.fill(0);
    this.layers.sketch.data.fill(PAPER);
    this.history.commit();
  }

  /** Layer of an image in canonical form: a Blob, or an <img>. */
  async layerOfImage(image, name) {
    const { data, width, height } = await pixelsOfImage(image);
    const layer = layerOf(width, height);
    const index = new Map(this.palette.map(([r, g, b], i) => [(r << 16) | (g << 8) | b, i]));
    for (let i = 0; i < layer.data.length; i++) {
      const color = (data[4 * i] << 16) | (data[4 * i + 1] << 8) | data[4 * i + 2];
      layer.data[i] = name === "mask" ? (index.get(color) ?? 0) : data[4 * i];
    }
    return layer;
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
    if (kept?.side !== this.side) return false;
    Object.assign(this.values, kept.values);
    for (const [name, list] of Object.entries(kept.layers)) {
      let at = 0;
      for (const [value, count] of list) this.layers[name].data.fill(value, at, (at += count));
    }
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

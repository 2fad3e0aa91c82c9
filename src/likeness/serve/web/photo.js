// A photograph that is edited: only what was painted since it was opened is generated anew.

import { editPhoto } from "./api.js";
import { pixelsOfImage } from "./png.js";

export class Photo {
  /** @param blob the photograph, aligned, of which `doc` has the mask. */
  static async open(blob, doc) {
    const { width, height } = await pixelsOfImage(blob);
    return Object.assign(new Photo(), { blob, width, height, before: doc.layers.mask.data.slice() });
  }

  /** The request for the current mask; null if nothing was painted. The area to edit is transparent. */
  async request(doc, mask) {
    const { width, height, before } = this, { data } = doc.layers.mask;
    const canvas = new OffscreenCanvas(width, height), context = canvas.getContext("2d");
    const area = context.createImageData(width, height);
    let changes = 0;
    for (let y = 0; y < height; y++) for (let x = 0; x < width; x++) {
      const i = Math.floor(((y + 0.5) * doc.side) / height) * doc.side + Math.floor(((x + 0.5) * doc.side) / width);
      const same = data[i] === before[i];
      area.data[4 * (y * width + x) + 3] = same ? 255 : 0;
      changes += !same;
    }
    if (!changes) return null;
    context.putImageData(area, 0, 0);
    const { prompt, seed } = doc.values;
    const control = JSON.stringify({ mask });
    return { image: this.blob, mask: await canvas.convertToBlob(), prompt, seed, control_image: control };
  }

  /** Edits the photograph; the note states how many pixels outside the area changed. */
  async edit(request, signal) {
    if (!request) return { blob: this.blob, seed: 0, note: "Paint on the photograph" };
    const { blob, answer } = await editPhoto(request, signal);
    return { blob, seed: request.seed, note: `Pixels changed outside the area: ${answer.changed_outside}` };
  }
}

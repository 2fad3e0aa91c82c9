// A photograph that is edited: what was painted since it was opened is generated anew, the other pixels stay.

import { editPhoto, inspect } from "./api.js";

export class Photo {
  /** @param blob the photograph, aligned, of which `doc` has the mask. */
  constructor(blob, doc) {
    this.blob = blob;
    this.before = doc.layers.mask.data.slice();
  }

  /** The request for the current mask, a Blob; null if nothing was painted. */
  async request(doc, mask) {
    if (doc.layers.mask.data.every((value, i) => value === this.before[i])) return null;
    const { prompt, seed } = doc.values;
    return { image: this.blob, wanted_mask: (await inspect(mask, "mask")).id, prompt, seed };
  }

  /** Edits the photograph; the note states how many pixels outside the region changed. */
  async edit(request, signal) {
    if (!request) return { blob: this.blob, seed: 0, note: "Paint on the photograph" };
    const { blob, certificate } = await editPhoto(request, signal);
    return { blob, seed: request.seed, note: `Pixels changed outside the region: ${certificate.changed_outside}` };
  }
}

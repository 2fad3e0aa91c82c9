// Undo and redo without limit in practice: each step keeps the rectangle that it changed, the photograph, and the values
// if it replaced them, before and after.

export class History {
  /** @param layers name -> layer of raster.js, @param values of the document; both are changed in place. */
  constructor(layers, values) {
    Object.assign(this, { layers, values });
    this.photo = null; // the photograph that the mask belongs to
    this.clear();
  }

  clear() {
    this.steps = [];
    this.position = 0;
    this.begin();
  }

  /** Remembers the layers before a change. */
  begin() {
    this.photoBefore = this.photo;
    this.valuesBefore = { ...this.values };
    this.before = Object.fromEntries(Object.entries(this.layers).map(([name, layer]) => [name, layer.data.slice()]));
  }

  /** Records what changed since `begin` as one step, the values if `withValues`; returns whether anything did. */
  commit(withValues = false) {
    const parts = Object.entries(this.layers)
      .map(([name, layer]) => difference(name, this.before[name], layer))
      .filter(Boolean);
    const values = { before: this.valuesBefore, after: { ...this.values } };
    const replaced = withValues && Object.keys(values.after).some((name) => values.before[name] !== values.after[name]);
    const step = { parts, photo: { before: this.photoBefore, after: this.photo }, values: replaced ? values : null };
    this.begin();
    if (!parts.length && !replaced && step.photo.before === step.photo.after) return false;
    this.steps.length = this.position;
    this.steps.push(step);
    this.position++;
    return true;
  }

  /** Takes back what changed since `begin`, such as a stroke that is not complete. */
  revert() {
    for (const [name, layer] of Object.entries(this.layers)) layer.data.set(this.before[name]);
  }

  undo() {
    this.revert();
    return this.position > 0 && this.apply(this.steps[--this.position], "before");
  }

  redo() {
    this.revert();
    return this.position < this.steps.length && this.apply(this.steps[this.position++], "after");
  }

  apply({ parts, photo, values }, side) {
    this.photo = photo[side];
    if (values) {
      values[side === "before" ? "after" : "before"] = { ...this.values }; // also what was typed since
      Object.assign(this.values, values[side]);
    }
    for (const { name, x, y, width, height, ...content } of parts) {
      const layer = this.layers[name];
      for (let row = 0; row < height; row++)
        layer.data.set(content[side].subarray(row * width, (row + 1) * width), (y + row) * layer.width + x);
    }
    this.begin();
    return true;
  }
}

function difference(name, before, { data, width, height }) {
  let left = width, right = -1, top = height, bottom = -1;
  for (let i = 0; i < data.length; i++) {
    if (data[i] === before[i]) continue;
    const x = i % width, y = Math.floor(i / width);
    left = Math.min(left, x); right = Math.max(right, x);
    top = Math.min(top, y); bottom = y;
  }
  if (right < 0) return null;
  const box = { x: left, y: top, width: right - left + 1, height: bottom - top + 1 };
  const cut = (source) => {
    const out = new Uint8Array(box.width * box.height);
    for (let row = 0; row < box.height; row++) {
      const start = (top + row) * width + left;
      out.set(source.subarray(start, start + box.width), row * box.width);
    }
    return out;
  };
  return { name, ...box, before: cut(before), after: cut(data) };
}

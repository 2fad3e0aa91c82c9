// Raster operations on a layer {data: Uint8Array [height * width], width, height}. Every pixel is set to a value as a
// whole: nothing is anti-aliased. Coordinates are integers; all arithmetic is exact, so another implementation can
// reproduce it byte for byte.

export const layerOf = (width, height, value = 0) => ({
  data: new Uint8Array(width * height).fill(value), width, height,
});

/** Rows [dy, x0, x1] of a brush of `size` pixels, relative to the pixel right below its center. */
export function brushRows(size, shape) {
  const rows = [], half = size >> 1;
  for (let y = 0; y < size; y++) {
    const inside = [];
    for (let x = 0; x < size; x++) {
      const dx = 2 * x - size + 1, dy = 2 * y - size + 1; // distance from the center in half pixels
      if (shape === "square" || dx * dx + dy * dy <= size * size - size) inside.push(x);
    }
    if (inside.length) rows.push([y - half, inside[0] - half, inside.at(-1) - half]);
  }
  return rows;
}

/**
 * Returns a function that sets one pixel. `lock`: classes that may be painted over (default all). `mirror`: a map from
 * a value to its value on the other side; the mirrored pixel is set, too.
 */
export function painter(layer, value, { lock = null, mirror = null } = {}) {
  const { data, width, height } = layer;
  const set = (i, painted) => { if (!lock || lock.has(data[i])) data[i] = painted; };
  return (x, y) => {
    if (x < 0 || y < 0 || x >= width || y >= height) return;
    set(y * width + x, value);
    if (mirror) set(y * width + width - 1 - x, mirror[value] ?? value);
  };
}

export function stamp(put, x, y, rows) {
  for (const [dy, x0, x1] of rows) for (let dx = x0; dx <= x1; dx++) put(x + dx, y + dy);
}

/** Calls `visit(x, y)` for the pixels of a line (Bresenham), both ends included. */
export function line(x0, y0, x1, y1, visit) {
  const dx = Math.abs(x1 - x0), dy = -Math.abs(y1 - y0), sx = x0 < x1 ? 1 : -1, sy = y0 < y1 ? 1 : -1;
  for (let error = dx + dy; ;) {
    visit(x0, y0);
    if (x0 === x1 && y0 === y1) return;
    const twice = 2 * error;
    if (twice >= dy) { error += dy; x0 += sx; }
    if (twice <= dx) { error += dx; y0 += sy; }
  }
}

/** Brush stroke from one point to another. */
export function stroke(put, from, to, rows) {
  line(from[0], from[1], to[0], to[1], (x, y) => stamp(put, x, y, rows));
}

/** Sets the connected pixels (4 neighbors) of the value at (x, y), or all pixels of that value. */
export function fill(layer, x, y, put, everywhere = false) {
  const { data, width, height } = layer, old = data[y * width + x];
  if (everywhere) {
    const found = [];
    data.forEach((value, i) => { if (value === old) found.push(i); });
    found.forEach((i) => put(i % width, Math.floor(i / width)));
    return;
  }
  const seen = new Uint8Array(data.length), stack = [y * width + x];
  seen[stack[0]] = 1;
  const visit = (i) => { if (!seen[i] && data[i] === old) { seen[i] = 1; stack.push(i); } };
  const found = [];
  while (stack.length) {
    const i = stack.pop(), column = i % width;
    found.push(i);
    if (column) visit(i - 1);
    if (column < width - 1) visit(i + 1);
    if (i >= width) visit(i - width);
    if (i < width * (height - 1)) visit(i + width);
  }
  found.forEach((i) => put(i % width, Math.floor(i / width)));
}

/** Closed contour through points [x, y]: its inside (even-odd rule at pixel centers) and its outline. */
export function contour(layer, points, put) {
  const edges = points.map((point, i) => [point, points[(i + 1) % points.length]]);
  for (let y = 0; y < layer.height; y++) {
    const crossings = edges
      .filter(([[, y0], [, y1]]) => (y0 <= y) !== (y1 <= y))
      .map(([[x0, y0], [x1, y1]]) => x0 + ((y - y0) * (x1 - x0)) / (y1 - y0))
      .sort((a, b) => a - b);
    for (let i = 0; i + 1 < crossings.length; i += 2)
      for (let x = Math.ceil(crossings[i]); x <= Math.floor(crossings[i + 1]); x++) put(x, y);
  }
  for (const [a, b] of edges) line(...a, ...b, put);
}

/** Each pixel takes the most frequent value of its 3 x 3 neighborhood. Ties: its own value, else the smallest.
 * `only`: pixels that have or get this value. */
export function smooth(layer, only) {
  const { data, width, height } = layer, before = data.slice();
  for (let y = 0; y < height; y++) for (let x = 0; x < width; x++) {
    const own = before[y * width + x], count = new Map();
    for (let v = Math.max(0, y - 1); v <= Math.min(height - 1, y + 1); v++)
      for (let u = Math.max(0, x - 1); u <= Math.min(width - 1, x + 1); u++) {
        const value = before[v * width + u];
        count.set(value, (count.get(value) ?? 0) + 1);
      }
    const most = Math.max(...count.values());
    if (count.get(own) === most) continue;
    const value = Math.min(...[...count.keys()].filter((value) => count.get(value) === most));
    if (only === undefined || own === only || value === only) data[y * width + x] = value;
  }
}

/** Pixels [i, ...] of a value, optionally only inside a rectangle [x, y, width, height]. */
export function pixelsOf(layer, value, box = null) {
  const found = [];
  layer.data.forEach((v, i) => {
    const x = i % layer.width, y = Math.floor(i / layer.width);
    const inside = !box || (x >= box[0] && y >= box[1] && x < box[0] + box[2] && y < box[1] + box[3]);
    if (inside && (value === null || v === value)) found.push(i);
  });
  return found;
}

/**
 * Moves pixels by (dx, dy) and scales them around their center. What they leave takes the value of the nearest pixel
 * that stays, found ring by ring.
 */
export function move(layer, pixels, dx, dy, scale = 1) {
  const { data, width, height } = layer;
  if (!pixels.length) return;
  const values = new Map(pixels.map((i) => [i, data[i]]));
  const open = new Uint8Array(data.length);
  for (const i of pixels) open[i] = 1;
  let ring = pixels.length < data.length ? pixels : [];
  while (ring.length) { // fill from the edge inwards
    const next = [], filled = [];
    for (const i of ring) {
      const x = i % width, near = [];
      if (x && !open[i - 1]) near.push(data[i - 1]);
      if (x < width - 1 && !open[i + 1]) near.push(data[i + 1]);
      if (i >= width && !open[i - width]) near.push(data[i - width]);
      if (i < width * (height - 1) && !open[i + width]) near.push(data[i + width]);
      if (near.length) filled.push([i, near[0]]); else next.push(i);
    }
    if (!filled.length) break;
    for (const [i, value] of filled) { data[i] = value; open[i] = 0; }
    ring = next;
  }
  const xs = pixels.map((i) => i % width), ys = pixels.map((i) => Math.floor(i / width));
  const [left, right, top, bottom] = [xs, xs, ys, ys].map((list, k) =>
    list.reduce((a, b) => (k % 2 ? Math.max(a, b) : Math.min(a, b))));
  const cx = (left + right) / 2, cy = (top + bottom) / 2;
  const reach = Math.ceil(Math.max(right - left, bottom - top) * scale / 2) + 1;
  for (let y = Math.floor(cy + dy - reach); y <= cy + dy + reach; y++)
    for (let x = Math.floor(cx + dx - reach); x <= cx + dx + reach; x++) {
      if (x < 0 || y < 0 || x >= width || y >= height) continue;
      const u = Math.round((x - dx - cx) / scale + cx), v = Math.round((y - dy - cy) / scale + cy);
      if (u < 0 || v < 0 || u >= width || v >= height) continue;
      const value = values.get(v * width + u);
      if (value !== undefined) data[y * width + x] = value;
    }
}

/** Resizes to another size by nearest neighbor; to a smaller one by averages if `average`. */
export function resized(layer, width, height, average = false) {
  const out = layerOf(width, height), down = average && layer.width > width && layer.height > height;
  for (let y = 0; y < height; y++) for (let x = 0; x < width; x++) {
    const v = Math.floor(((y + 0.5) * layer.height) / height), u = Math.floor(((x + 0.5) * layer.width) / width);
    out.data[y * width + x] = down ? mean(layer, x, y, width, height) : layer.data[v * layer.width + u];
  }
  return out;
}

/** Mean of the pixels of a layer that a pixel of a smaller one covers. */
function mean({ data, width, height }, x, y, smallWidth, smallHeight) {
  const [left, right] = [x, x + 1].map((place) => Math.floor((place * width) / smallWidth));
  const [top, bottom] = [y, y + 1].map((place) => Math.floor((place * height) / smallHeight));
  let sum = 0;
  for (let v = top; v < bottom; v++) for (let u = left; u < right; u++) sum += data[v * width + u];
  return Math.round(sum / ((bottom - top) * (right - left)));
}

/** The layer in the middle of a square of another value. */
export function padded(layer, value) {
  const side = Math.max(layer.width, layer.height), out = layerOf(side, side, value);
  const left = Math.floor((side - layer.width) / 2), top = Math.floor((side - layer.height) / 2);
  for (let y = 0; y < layer.height; y++)
    out.data.set(layer.data.subarray(y * layer.width, (y + 1) * layer.width), (top + y) * side + left);
  return out;
}

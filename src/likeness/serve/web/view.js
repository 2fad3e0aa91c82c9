// The canvas: draws a layer with zoom and pan, and turns pointer positions into pixels of the layer.

export class View {
  constructor(canvas) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.zoom = 1;
    this.x = this.y = 0; // of the layer's corner, in CSS pixels
    this.buffer = document.createElement("canvas");
    this.cursor = null;
    this.fitted = true; // until the user zooms or pans
    new ResizeObserver(() => { this.resize(); }).observe(canvas);
  }

  /** Shows a layer. `colors`: Uint32Array, value -> RGBA in memory order. */
  setLayer(layer, colors) {
    const first = this.layer?.width !== layer.width;
    Object.assign(this, { layer, colors });
    this.buffer.width = layer.width;
    this.buffer.height = layer.height;
    this.pixels = new ImageData(layer.width, layer.height);
    if (first) this.fit(); else this.draw();
  }

  /** Adapts to the size of the canvas and the density of the screen; the middle stays, or the layer fits as before. */
  resize() {
    const { clientWidth: width, clientHeight: height } = this.canvas, before = this.size ?? [width, height];
    this.ratio = devicePixelRatio;
    this.size = [width, height];
    this.canvas.width = Math.round(width * this.ratio);
    this.canvas.height = Math.round(height * this.ratio);
    if (this.fitted) this.fit(); else this.pan((width - before[0]) / 2, (height - before[1]) / 2);
  }

  fit() {
    const { clientWidth: width, clientHeight: height } = this.canvas;
    this.fitted = true;
    if (!this.layer) return;
    this.zoom = Math.min(width / this.layer.width, height / this.layer.height) * 0.96;
    this.x = (width - this.layer.width * this.zoom) / 2;
    this.y = (height - this.layer.height * this.zoom) / 2;
    this.draw();
  }

  /** Zooms by a factor around a point in CSS pixels. */
  zoomAt(factor, x, y) {
    const zoom = Math.min(64, Math.max(0.25, this.zoom * factor));
    this.x = x - ((x - this.x) * zoom) / this.zoom;
    this.y = y - ((y - this.y) * zoom) / this.zoom;
    this.zoom = zoom;
    this.fitted = false;
    this.draw();
  }

  pan(dx, dy) {
    this.fitted = false;
    this.x += dx;
    this.y += dy;
    this.draw();
  }

  /** Pixel of the layer under a pointer; it may be outside. */
  pixel(event) {
    const box = this.canvas.getBoundingClientRect();
    const places = [event.clientX - box.left - this.x, event.clientY - box.top - this.y];
    return places.map((place) => Math.floor(place / this.zoom));
  }

  draw() {
    if (!this.layer || this.frame) return;
    this.frame = requestAnimationFrame(() => {
      this.frame = null;
      this.paint();
    });
  }

  paint() {
    if (this.ratio !== devicePixelRatio) this.resize(); // moved to another screen
    const { context, layer, colors, zoom, ratio } = this;
    const words = new Uint32Array(this.pixels.data.buffer);
    for (let i = 0; i < words.length; i++) words[i] = colors[layer.data[i]];
    this.buffer.getContext("2d").putImageData(this.pixels, 0, 0);
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, this.canvas.width, this.canvas.height);
    context.translate(this.x, this.y);
    context.scale(zoom, zoom);
    context.imageSmoothingEnabled = false;
    if (this.underlay) context.drawImage(this.underlay, 0, 0, layer.width, layer.height);
    context.globalAlpha = this.underlay ? this.opacity : 1;
    context.drawImage(this.buffer, 0, 0);
    context.globalAlpha = 1;
    context.lineWidth = 1 / zoom;
    context.strokeStyle = "#888";
    context.strokeRect(0, 0, layer.width, layer.height);
    if (this.cursor) this.outline(this.cursor);
    if (this.path) this.drawPath(this.path);
  }

  /** Outline of the brush, dark on light and light on dark. */
  outline({ x, y, rows }) {
    const { context } = this;
    context.beginPath();
    for (const [dy, x0, x1] of rows) context.rect(x + x0, y + dy, x1 - x0 + 1, 1);
    context.globalCompositeOperation = "difference";
    context.strokeStyle = "#fff";
    context.stroke();
    context.globalCompositeOperation = "source-over";
  }

  drawPath(points) {
    const { context } = this;
    context.beginPath();
    for (const [x, y] of points) context.lineTo(x + 0.5, y + 0.5);
    context.globalCompositeOperation = "difference";
    context.strokeStyle = "#fff";
    context.stroke();
    context.globalCompositeOperation = "source-over";
  }
}

/** RGBA words in memory order for a palette [[r, g, b], ...]. */
export const wordsOf = (palette) =>
  new Uint32Array(Uint8Array.from(palette.flatMap((color) => [...color, 255])).buffer);

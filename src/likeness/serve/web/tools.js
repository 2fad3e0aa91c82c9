// Tools: from pointer events to changes of a layer. Each stroke is one step of the history.

import { brushRows, contour, fill, move, painter, pixelsOf, stamp, stroke } from "./raster.js";
import { PAPER } from "./document.js";

export const TOOLS = {
  brush: { title: "Brush", key: "b", size: 8 },
  eraser: { title: "Eraser", key: "e", size: 12 },
  line: { title: "Line", key: "l", size: 3 },
  contour: { title: "Contour", key: "c", size: 1 },
  fill: { title: "Fill", key: "f", size: 1 },
  pick: { title: "Pick class", key: "i", size: 1 },
  move: { title: "Move class", key: "m", size: 1 },
  select: { title: "Move area", key: "s", size: 1 },
};

const ERASER_BUTTON = 32;
const ALONG = ["brush", "eraser", "contour"]; // tools that depend on the way

export class Tools {
  /**
   * @param view of view.js
   * @param doc of document.js
   * @param state {tool, value, sizes, square, mirror, lock: Set, layer, pairs}
   * @param on {changed(), picked(value)}
   */
  constructor(view, doc, state, on) {
    Object.assign(this, { view, doc, state, on, pointers: new Map(), action: null, space: false, erase: false });
    const { canvas } = view;
    canvas.addEventListener("pointerdown", (event) => this.down(event));
    canvas.addEventListener("pointermove", (event) => this.moved(event));
    for (const kind of ["pointerup", "pointercancel"]) canvas.addEventListener(kind, (event) => this.up(event));
    canvas.addEventListener("pointerleave", () => { view.cursor = null; view.draw(); });
    canvas.addEventListener("contextmenu", (event) => event.preventDefault());
    canvas.addEventListener("wheel", (event) => this.wheel(event), { passive: false });
    addEventListener("blur", () => { this.space = this.erase = false; }); // keys may be released elsewhere
  }

  get layer() { return this.doc.layers[this.state.layer]; }

  /** The tool in use: keys and the pen's eraser override the chosen one. */
  toolOf(event) {
    if (this.erase || event.buttons & ERASER_BUTTON) return "eraser";
    return event.altKey || event.button === 2 ? "pick" : this.state.tool;
  }

  rows(tool, event) {
    const pressure = event.pointerType === "pen" && tool !== "line" && event.pressure ? event.pressure : 1;
    const size = Math.max(1, Math.round(this.state.sizes[tool] * pressure));
    return brushRows(size, this.state.square ? "square" : "round");
  }

  painter(tool) {
    const { state } = this, mask = state.layer === "mask";
    const value = tool === "eraser" ? (mask ? 0 : PAPER) : mask ? state.value : 0;
    return painter(this.layer, value, {
      lock: mask && state.lock.size && tool !== "eraser" ? state.lock : null,
      mirror: state.mirror ? (mask ? state.pairs : {}) : null,
    });
  }

  down(event) {
    if (event.pointerType === "touch" && this.action?.pen) return; // the hand that holds the pen
    if (event.pointerType === "pen" && this.pointers.size) {
      this.pointers.clear();
      this.doc.history.revert();
    }
    this.view.canvas.setPointerCapture(event.pointerId);
    this.view.canvas.focus();
    this.pointers.set(event.pointerId, [event.clientX, event.clientY]);
    if (this.pointers.size > 1) return this.pinch();
    if (this.space || event.button === 1) { this.action = { kind: "pan" }; return; }
    const tool = this.toolOf(event), at = this.view.pixel(event);
    const { data, width, height } = this.layer, inside = within([0, 0, width, height], at);
    const value = data[at[1] * width + at[0]];
    this.doc.history.begin();
    const started = performance.now(), pen = event.pointerType === "pen";
    this.action = { kind: tool, pen, started, start: at, last: at, points: [at] };
    if (tool === "pick") return inside && this.on.picked(value);
    if (tool === "fill" && inside) fill(this.layer, ...at, this.painter(tool), event.shiftKey);
    if (tool === "brush" || tool === "eraser") stamp(this.painter(tool), ...at, this.rows(tool, event));
    if (tool === "move" && inside) this.action.pixels = pixelsOf(this.layer, value);
    if (tool === "select" && this.area && within(this.area, at))
      this.action.pixels = pixelsOf(this.layer, null, this.area);
    this.view.draw();
  }

  moved(event) {
    const previous = this.pointers.get(event.pointerId);
    if (previous) this.pointers.set(event.pointerId, [event.clientX, event.clientY]);
    const { action } = this, tool = action?.kind ?? this.toolOf(event);
    const [x, y] = this.view.pixel(event);
    this.view.cursor = tool in this.state.sizes ? { x, y, rows: this.rows(tool, event) } : null;
    if (!action || !previous) return this.view.draw();
    if (action.kind === "pan") return this.view.pan(event.clientX - previous[0], event.clientY - previous[1]);
    if (action.kind === "pinch") return this.pointers.size > 1 && this.pinch(action);
    const parts = ALONG.includes(action.kind) ? event.getCoalescedEvents?.() ?? [] : []; // of others, the last counts
    for (const part of parts.length ? parts : [event]) this.drag(action, part);
    this.view.draw();
  }

  drag(action, event) {
    const at = this.view.pixel(event);
    if (action.kind === "brush" || action.kind === "eraser") {
      stroke(this.painter(action.kind), action.last, at, this.rows(action.kind, event));
    } else if (action.kind === "line") {
      this.doc.history.revert();
      stroke(this.painter("line"), action.start, at, this.rows("line", event));
    } else if (action.kind === "contour") {
      action.points.push(at);
      this.view.path = action.points;
    } else if (action.pixels) {
      this.doc.history.revert();
      move(this.layer, action.pixels, at[0] - action.start[0], at[1] - action.start[1], action.scale);
    } else if (action.kind === "select") {
      this.area = boxOf(action.start, at);
      this.view.path = corners(this.area);
    }
    action.last = at;
  }

  up(event) {
    this.pointers.delete(event.pointerId);
    const { action } = this;
    if (!action || this.pointers.size) return;
    this.action = null;
    if (action.kind === "contour" && event.type === "pointerup")
      contour(this.layer, action.points, this.painter("contour"));
    if (action.kind !== "select" || action.pixels) this.view.path = this.area = null;
    if (event.type === "pointercancel" && !keeps(action)) this.doc.history.revert();
    if (this.doc.history.commit()) this.on.changed();
    this.view.draw();
  }

  /** Takes back the stroke that is not complete; returns whether there was one. */
  cancel() {
    if (!this.action) return false;
    this.action = this.view.path = null;
    this.doc.history.revert();
    this.view.draw();
    return true;
  }

  /** Two fingers zoom and pan; what the first one painted just before is taken back. */
  pinch(action) {
    const [a, b] = [...this.pointers.values()];
    const now = { x: (a[0] + b[0]) / 2, y: (a[1] + b[1]) / 2, distance: Math.hypot(a[0] - b[0], a[1] - b[1]) || 1 };
    if (!action) {
      if (!keeps(this.action)) this.doc.history.revert();
      if (this.doc.history.commit()) this.on.changed();
      this.view.path = this.area = null;
      this.action = { kind: "pinch", ...now };
      return;
    }
    const box = this.view.canvas.getBoundingClientRect();
    this.view.pan(now.x - action.x, now.y - action.y);
    this.view.zoomAt(now.distance / action.distance, now.x - box.left, now.y - box.top);
    Object.assign(action, now);
  }

  wheel(event) {
    event.preventDefault();
    const { action } = this;
    if (action?.pixels) { // scales what is being moved
      action.scale = Math.min(4, Math.max(0.25, (action.scale ?? 1) * Math.exp(-event.deltaY / 500)));
      this.drag(action, event);
      return this.view.draw();
    }
    const box = this.view.canvas.getBoundingClientRect();
    this.view.zoomAt(Math.exp(-event.deltaY / 400), event.clientX - box.left, event.clientY - box.top);
  }
}

/** Whether a stroke stays if it is interrupted: it was painted for longer than a gesture takes to begin. */
const keeps = (action) => ["brush", "eraser"].includes(action?.kind) && performance.now() - action.started > 300;

const within = ([x, y, width, height], [u, v]) => u >= x && v >= y && u < x + width && v < y + height;

const boxOf = ([x0, y0], [x1, y1]) =>
  [Math.min(x0, x1), Math.min(y0, y1), Math.abs(x1 - x0) + 1, Math.abs(y1 - y0) + 1];

const corners = ([x, y, width, height]) => [[x, y], [x + width, y], [x + width, y + height], [x, y + height], [x, y]];

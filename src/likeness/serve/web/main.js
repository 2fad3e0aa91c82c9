// The page: connects the controls with the document, the tools, the service and the results.

import * as api from "./api.js";
import { Document } from "./document.js";
import { Live } from "./live.js";
import { encodePng, pixelsOfImage, toBase64 } from "./png.js";
import { smooth } from "./raster.js";
import { Results } from "./results.js";
import { TOOLS, Tools } from "./tools.js";
import { View, wordsOf } from "./view.js";

const $ = (id) => document.getElementById(id);
const PREVIEW_STEPS = 4; // of a model of many steps
const TITLES = { // l_ and r_ are the person's left and right
  eye_g: "glasses", l_eye: "left eye", r_eye: "right eye", l_brow: "left brow", r_brow: "right brow", l_ear: "left ear", r_ear: "right ear",
  u_lip: "upper lip", l_lip: "lower lip", cloth: "clothes",
};
const KEYS = [
  ...Object.values(TOOLS).map(({ title, key }) => [key, title]),
  ["[ ]", "Smaller, larger brush"], ["hold x", "Erase"], ["Alt + click", "Pick class"], ["Shift + click", "Fill the whole class"],
  ["Ctrl + z, Ctrl + Shift + z", "Undo, redo"], ["Space + drag", "Pan"], ["Wheel", "Zoom; while moving a class: its size"],
  ["0", "Fit the window"], ["r", "Mirror"], ["k", "Lock: paint only over this class"], ["Tab", "Mask or sketch"], ["g", "Generate"],
  ["n", "New seed"], ["Shift + click in the history", "Compare"], ["?", "Keys"],
];

const about = await connect();
const classes = about.mask_classes; // [{name, color: [r, g, b], pair}]
const palette = classes.map(({ color }) => color);
const side = Math.max(256, about.defaults.size);
const doc = new Document(side, palette);
const view = new View($("canvas"));
const words = { mask: wordsOf(palette), sketch: wordsOf(Array.from({ length: 256 }, (_, grey) => [grey, grey, grey])) };
const state = {
  layer: "mask", tool: "brush", value: 1, square: false, mirror: false, lock: new Set(),
  sizes: Object.fromEntries(Object.entries(TOOLS).filter(([, { size }]) => size > 1).map(([name, { size }]) => [name, size * side / 256])),
  pairs: Object.fromEntries(classes.map(({ pair }, value) => [value, pair ?? value])),
};
const tools = new Tools(view, doc, state, { changed, picked: choose });
const results = new Results(
  { image: $("image"), other: $("other"), compare: $("compare"), strip: $("strip"), history: $("history"), save: $("save-image") },
  restore,
);
const live = new Live({ render, show, failed });
let photo = null; // the photograph that is edited: {blob, layer}

// The service

async function connect() {
  for (;;) {
    try {
      return await api.capabilities();
    } catch (error) {
      say(error.message, true);
      if (!error.offline) throw error;
      await new Promise((done) => setTimeout(done, 1000));
    }
  }
}

function say(text, error = false) {
  $("status").textContent = text;
  $("status").classList.toggle("error", error);
}

/** Runs work that the user asked for; reports its error. */
async function attempt(text, work) {
  say(text);
  try {
    await work();
    say("");
  } catch (error) {
    failed(error);
  }
}

function failed(error) {
  say(error.message, true);
  if (error.offline) connect().then(() => { say("Connected again"); changed(); });
}

async function content(name) {
  return toBase64(await encodePng(doc.layers[name], name === "mask" ? palette : null));
}

/** The request for the current state. */
async function request(kind) {
  const { prompt, negative, seed, maskScale, sketchScale } = doc.values;
  const body = { prompt, negative_prompt: negative, seed, control_image: {}, conditioning_scale: {} };
  for (const [name, present, scale] of [["mask", doc.hasMask, maskScale], ["sketch", doc.hasSketch, sketchScale]]) {
    if (!present || !about.conditions.includes(name)) continue;
    body.control_image[name] = await content(name);
    body.conditioning_scale[name] = scale;
  }
  if (kind === "preview") body.steps = about.defaults.steps > PREVIEW_STEPS ? PREVIEW_STEPS : 1;
  return body;
}

// Live

function changed() {
  doc.save();
  controls();
  view.draw();
  clearTimeout(changed.timer);
  changed.timer = setTimeout(diagnose, 400);
  if ($("live").checked) live.changed(); else live.stop();
}

async function render(kind, signal) {
  const start = performance.now();
  if (photo) return renderPhoto(kind, signal, start);
  const body = await request(kind), encoded = performance.now();
  const [image] = await api.generate(body, signal);
  return { ...image, entry: snapshot(image), times: { encode: encoded - start, service: performance.now() - encoded } };
}

function show(kind, { entry, times, note }, started) {
  results.show(entry, kind === "full");
  $("image").decode().catch(() => {}).then(() => requestAnimationFrame(() => {
    const total = performance.now() - started;
    const draw = total - times.encode - times.service;
    $("timing").textContent =
      `${kind} ${total.toFixed(0)} ms: encode ${times.encode.toFixed(0)}, service ${times.service.toFixed(0)}, draw ${draw.toFixed(0)}`
      + (note ? `. ${note}` : "");
    $("timing").dataset.kind = kind;
    $("timing").dataset.count = Number($("timing").dataset.count ?? 0) + 1;
  }));
  underlay(entry.blob);
}

async function underlay(blob) {
  view.underlay = await createImageBitmap(blob);
  view.opacity = $("opacity").value / 100;
  view.draw();
}

const snapshot = ({ blob, seed }) => ({
  blob, seed, values: { ...doc.values, seed },
  layers: Object.fromEntries(Object.entries(doc.layers).map(([name, { data, width, height }]) => [name, { data: data.slice(), width, height }])),
});

function restore(entry) {
  results.stopComparison();
  doc.values = { ...entry.values };
  for (const [name, layer] of Object.entries(entry.layers)) doc.layers[name].data.set(layer.data);
  doc.history.commit();
  doc.save();
  controls();
  live.stop();
  results.show(entry, false);
  underlay(entry.blob);
  showLayer();
}

async function diagnose() {
  const list = $("problems");
  if (!doc.hasMask) return list.replaceChildren();
  const { problems, contradictions } = await api.check(await content("mask"), doc.values.prompt).catch(() => ({ problems: [], contradictions: [] }));
  list.replaceChildren(...[...problems, ...contradictions].map(({ kind, text, fix }) => {
    const item = document.createElement("li");
    item.textContent = text;
    item.dataset.kind = kind;
    if (fix) {
      const button = document.createElement("button");
      button.textContent = fix.title;
      button.addEventListener("click", () => edit(fix.operation, fix.fields));
      item.append(" ", button);
    }
    return item;
  }));
}

// Photographs

async function openPhoto(blob) {
  const found = await api.extract("mask", blob, about.defaults.size);
  const image = await (await fetch(`data:image/png;base64,${found.image}`)).blob();
  setLayer("mask", await doc.layerOfContent(found.b64_json, "mask"));
  photo = about.edits ? { blob: image, before: doc.layers.mask.data.slice() } : null;
  $("save-image").disabled = false;
  results.show({ ...snapshot({ blob: image, seed: doc.values.seed }) }, true);
  underlay(image);
  $("opacity").value = 60;
  view.opacity = 0.6;
}

/** Regenerates the area of the photograph whose class changed. */
async function renderPhoto(kind, signal, start) {
  const { data } = doc.layers.mask, pixels = await pixelsOfImage(photo.blob);
  const alpha = new OffscreenCanvas(pixels.width, pixels.height), context = alpha.getContext("2d");
  const area = context.createImageData(pixels.width, pixels.height);
  let changes = 0;
  for (let y = 0; y < pixels.height; y++) for (let x = 0; x < pixels.width; x++) {
    const v = Math.floor(((2 * y + 1) * side) / (2 * pixels.height)), u = Math.floor(((2 * x + 1) * side) / (2 * pixels.width));
    const same = data[v * side + u] === photo.before[v * side + u];
    changes += !same;
    area.data[4 * (y * pixels.width + x) + 3] = same ? 255 : 0;
  }
  if (!changes) return { entry: snapshot({ blob: photo.blob, seed: doc.values.seed }), times: { encode: 0, service: 0 }, note: "Paint on the photograph" };
  context.putImageData(area, 0, 0);
  const mask = await alpha.convertToBlob(), encoded = performance.now();
  const { prompt, seed } = doc.values, control = new Blob([JSON.stringify({ mask: await content("mask") })]);
  const { blob, answer } = await api.editPhoto({ image: photo.blob, mask, prompt, seed, control_image: await control.text() }, signal);
  const note = `Pixels changed outside the area: ${answer.changed_outside}`;
  return { entry: snapshot({ blob, seed }), times: { encode: encoded - start, service: performance.now() - encoded }, note };
}

// Layers and files

function setLayer(name, layer) {
  doc.history.begin();
  doc.replace(name, layer);
  state.layer = name;
  showLayer();
}

async function load(name, base64) { setLayer(name, await doc.layerOfContent(base64, name)); }

async function openFile(file) {
  const recipe = await api.recipeOf(file).catch((error) => { if (error.offline) throw error; return null; });
  if (recipe) {
    const { prompt, negative_prompt: negative, seed, control_image: control, conditioning_scale: scale } = recipe;
    Object.assign(doc.values, { prompt, negative, seed, maskScale: scale.mask ?? 1, sketchScale: scale.sketch ?? 1 });
    doc.reset();
    for (const name of Object.keys(control)) if (name in doc.layers) await load(name, control[name]);
    return changed();
  }
  const { condition, b64_json: base64, format } = await api.inspect(file);
  if (!(condition in doc.layers)) throw new Error(`${file.name} contains ${condition}, which cannot be painted`);
  await load(condition, base64);
  changed();
  return say(format);
}

/** Opens a file dialog; resolves to the file. */
const pickFile = (accept = "image/*,.npy") => new Promise((done) => {
  const input = $("file");
  input.accept = accept;
  input.value = "";
  input.onchange = () => done(input.files[0]);
  input.click();
});

async function labelsOf(file) {
  const { condition, b64_json: base64 } = await api.inspect(file, "mask");
  return condition && base64;
}

/** Applies an operation of the service to the mask. */
const edit = (operation, fields) => attempt(`${operation}…`, async () => {
  const { b64_json: base64 } = await api.editMask(await content("mask"), operation, fields);
  await load("mask", base64);
  changed();
});

function saveFile(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

// Starting points

async function propose() {
  const dialog = $("choose"), choices = dialog.querySelector(".choices"), prompt = doc.values.prompt || "a person";
  dialog.querySelector("h2").textContent = prompt;
  choices.replaceChildren();
  dialog.showModal();
  for (let i = 0; i < 4 && dialog.open; i++) {
    const found = await api.propose(prompt, Math.floor(Math.random() * 2 ** 31));
    const button = document.createElement("button"), image = document.createElement("img");
    image.src = `data:image/png;base64,${found.b64_json}`;
    image.alt = `Mask ${i + 1}`;
    button.append(image);
    button.addEventListener("click", async () => { dialog.close(); await load("mask", found.b64_json); changed(); });
    choices.append(button);
  }
}

async function random() {
  doc.values.seed = Math.floor(Math.random() * 2 ** 31);
  const [image] = await api.generate({ prompt: doc.values.prompt, seed: doc.values.seed });
  const found = await api.extract("mask", image.blob, about.defaults.size);
  await load("mask", found.b64_json);
  changed();
}

// Controls

function choose(value) {
  if (state.layer !== "mask") return;
  state.value = value;
  controls();
}

function showLayer() {
  view.setLayer(doc.layers[state.layer], words[state.layer]);
  controls();
}

/** Brings all controls in line with the state. */
function controls() {
  for (const input of document.querySelectorAll("input[name=tool]")) input.checked = input.value === state.tool;
  for (const input of document.querySelectorAll("input[name=class]")) input.checked = Number(input.value) === state.value;
  for (const input of document.querySelectorAll("input[name=lock]")) input.checked = state.lock.has(Number(input.value));
  for (const input of document.querySelectorAll("input[name=layer]")) input.checked = input.value === state.layer;
  const size = state.sizes[state.tool];
  $("size").disabled = !size;
  $("size").value = size ?? 1;
  $("size-value").textContent = size ? `${$("size").value} px` : "";
  $("square").checked = state.square;
  $("mirror").checked = state.mirror;
  $("undo").disabled = !doc.history.position;
  $("redo").disabled = doc.history.position === doc.history.steps.length;
  for (const [id, name] of [["prompt", "prompt"], ["negative", "negative"], ["seed", "seed"], ["mask-scale", "maskScale"], ["sketch-scale", "sketchScale"]])
    if (document.activeElement !== $(id)) $(id).value = doc.values[name];
  $("mask-scale-value").textContent = doc.values.maskScale;
  $("sketch-scale-value").textContent = doc.values.sketchScale;
}

function radio(name, value, title) {
  const label = document.createElement("label"), input = document.createElement("input");
  Object.assign(input, { type: "radio", name, value });
  label.append(input, title);
  return label;
}

function build() {
  for (const [name, { title, key }] of Object.entries(TOOLS)) {
    const label = radio("tool", name, title);
    label.title = `${title} (${key})`;
    label.firstChild.addEventListener("change", () => { state.tool = name; controls(); });
    $("tool").append(label);
  }
  classes.forEach(({ name, color }, value) => {
    const row = document.createElement("div"), label = radio("class", value, ""), swatch = document.createElement("i"), lock = document.createElement("input");
    row.className = "class";
    swatch.style.background = `rgb(${color})`;
    label.append(swatch, TITLES[name] ?? name);
    label.title = name;
    label.firstChild.addEventListener("change", () => choose(value));
    Object.assign(lock, { type: "checkbox", name: "lock", value, title: `Paint only over ${TITLES[name] ?? name}` });
    lock.setAttribute("aria-label", lock.title);
    lock.addEventListener("change", () => state.lock[lock.checked ? "add" : "delete"](value));
    row.append(label, lock);
    $("classes").append(row);
  });
  $("keys").querySelector("dl").append(...KEYS.flatMap(([key, text]) =>
    [["dt", key], ["dd", text]].map(([tag, words]) => Object.assign(document.createElement(tag), { textContent: words }))));
}

function undo(redo) {
  if (doc.history[redo ? "redo" : "undo"]()) changed();
}

function newSeed() {
  doc.values.seed = Math.floor(Math.random() * 2 ** 31);
  changed();
}

const classNow = () => classes[state.value].name;

function wire() {
  const click = (id, work) => $(id).addEventListener("click", work);
  for (const input of document.querySelectorAll("input[name=layer]"))
    input.addEventListener("change", () => { state.layer = input.value; showLayer(); });
  $("size").addEventListener("input", () => { state.sizes[state.tool] = Number($("size").value); controls(); });
  $("square").addEventListener("change", () => { state.square = $("square").checked; });
  $("mirror").addEventListener("change", () => { state.mirror = $("mirror").checked; });
  $("opacity").addEventListener("input", () => { view.opacity = $("opacity").value / 100; view.draw(); });
  for (const [id, name] of [["prompt", "prompt"], ["negative", "negative"]])
    $(id).addEventListener("input", () => { doc.values[name] = $(id).value; changed(); });
  for (const [id, name] of [["mask-scale", "maskScale"], ["sketch-scale", "sketchScale"]])
    $(id).addEventListener("input", () => { doc.values[name] = Number($(id).value); changed(); });
  $("seed").addEventListener("change", () => { if ($("seed").checkValidity()) { doc.values.seed = Number($("seed").value); changed(); } });
  click("undo", () => undo(false));
  click("redo", () => undo(true));
  click("generate", () => live.finish());
  click("variations", () => attempt("Generating…", async () => {
    live.stop();
    const images = await api.generate({ ...(await request("full")), n: 4 });
    results.variations(images.map(snapshot));
  }));
  click("propose", () => attempt("Generating masks…", propose));
  click("random", () => attempt("Generating…", random));
  click("photo", async () => { const file = await pickFile("image/*"); await attempt("Parsing the photograph…", () => openPhoto(file)); });
  click("open", async () => { const file = await pickFile(); await attempt("Opening…", () => openFile(file)); });
  click("clear", () => { photo = null; view.underlay = null; doc.reset(); changed(); });
  for (const operation of ["grow", "shrink"]) click(operation, () => edit(operation, { classes: [classNow()], by: "1" }));
  click("remove", () => edit("remove", { classes: [classNow()] }));
  click("smooth", () => { doc.history.begin(); smooth(doc.layers.mask); if (doc.history.commit()) changed(); });
  click("paste", async () => {
    const file = await pickFile();
    await attempt("Copying…", async () => edit("paste", { classes: [classNow()], other: await labelsOf(file), align: true }));
  });
  click("interpolate", async () => {
    const file = await pickFile();
    await attempt("Generating 7 faces…", async () => blend(await labelsOf(file)));
  });
  click("save-mask", async () => saveFile(await encodePng(doc.layers.mask, palette), "mask.png"));
  click("save-index", async () => saveFile(await encodePng(doc.layers.mask), "mask-index.png"));
  click("save-sketch", async () => saveFile(await encodePng(doc.layers.sketch), "sketch.png"));
  click("save-image", () => saveFile(results.current.blob, `face-${results.current.seed}.png`));
  click("theme", () => {
    const root = document.documentElement, dark = root.className || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
    root.className = dark === "dark" ? "light" : "dark";
  });
  click("help", () => $("keys").showModal());
  addEventListener("keydown", keyDown);
  addEventListener("keyup", (event) => { if (event.key === " ") tools.space = false; if (event.key === "x") tools.erase = false; });
  addEventListener("dragover", (event) => { event.preventDefault(); document.body.classList.add("drop"); });
  addEventListener("dragleave", () => document.body.classList.remove("drop"));
  addEventListener("drop", (event) => {
    event.preventDefault();
    document.body.classList.remove("drop");
    const [file] = event.dataTransfer.files;
    if (file) attempt("Opening…", () => openFile(file));
  });
}

/** Animation between the current mask and another. */
async function blend(other) {
  live.stop();
  const own = await content("mask"), body = await request("full"), entries = [];
  for (let i = 0; i <= 6; i++) {
    const { b64_json: mask } = await api.editMask(own, "interpolate", { other, at: i / 6 });
    const [image] = await api.generate({ ...body, control_image: { ...body.control_image, mask }, conditioning_scale: { ...body.conditioning_scale, mask: doc.values.maskScale } });
    entries.push(snapshot(image));
    say(`${i + 1} of 7`);
  }
  results.animate(entries);
}

function keyDown(event) {
  if (event.target.matches("textarea, input:not([type=range], [type=radio], [type=checkbox])") || document.querySelector("dialog[open]")) return;
  const key = event.key.toLowerCase();
  if ((event.ctrlKey || event.metaKey) && (key === "z" || key === "y")) {
    event.preventDefault();
    return undo(key === "y" || event.shiftKey);
  }
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const tool = Object.keys(TOOLS).find((name) => TOOLS[name].key === key);
  const other = {
    " ": () => { tools.space = true; },
    x: () => { tools.erase = true; },
    "[": () => resize(1 / 1.25),
    "]": () => resize(1.25),
    0: () => view.fit(),
    r: () => { state.mirror = !state.mirror; },
    k: () => { state.lock[state.lock.has(state.value) ? "delete" : "add"](state.value); },
    tab: () => { state.layer = state.layer === "mask" ? "sketch" : "mask"; showLayer(); },
    g: () => live.finish(),
    n: newSeed,
    "?": () => $("keys").showModal(),
  }[key];
  if (!tool && !other) return;
  if (key === "tab" && document.activeElement !== $("canvas")) return; // elsewhere, Tab moves the focus
  if (key === " " && event.target.matches("button, input, summary")) return;
  event.preventDefault();
  if (tool) state.tool = tool; else other();
  controls();
}

function resize(factor) {
  const size = state.sizes[state.tool];
  if (size) state.sizes[state.tool] = Math.min(64, Math.max(1, factor > 1 ? Math.ceil(size * factor) : Math.floor(size * factor)));
}

build();
wire();
const restored = doc.restore();
showLayer();
say(restored ? "Your last work is back" : "");
document.documentElement.dataset.ready = "true";
window.studio = { doc, state, view, live }; // for tests and the curious

// The page: connects the document, the tools, the service and the results.

import * as api from "./api.js";
import { build, refresh, wire } from "./controls.js";
import { Document } from "./document.js";
import { done, say, pickFile, saveFile } from "./files.js";
import { Live } from "./live.js";
import { encodePng, fromBase64, toBase64 } from "./png.js";
import { smooth } from "./raster.js";
import { Results } from "./results.js";
import { TOOLS, Tools } from "./tools.js";
import { View, wordsOf } from "./view.js";

const $ = (id) => document.getElementById(id);
const PREVIEW_STEPS = 4; // of a model of many steps
const FRAMES = 7; // of an animation
const VARIATIONS = 4;
const EXAMPLES = [
  "smile", "fringe", "long-hair", "short-hair", "curly", "beard", "glasses", "earrings", "hat", "old",
];
const PHOTO_OPACITY = 60;

const about = await answered(api.capabilities);
const palette = about.mask_classes.map(({ color }) => color);
const side = Math.max(256, about.defaults.size);
const doc = new Document(side, palette);
const view = new View($("canvas"));
const words = { mask: wordsOf(palette), sketch: wordsOf(Array.from({ length: 256 }, (_, grey) => [grey, grey, grey])) };
const sized = Object.entries(TOOLS).filter(([, { size }]) => size > 1);
const state = {
  layer: "mask", tool: "brush", value: 1, square: false, mirror: false, lock: new Set(),
  sizes: Object.fromEntries(sized.map(([name, { size }]) => [name, (size * side) / 256])),
  pairs: Object.fromEntries(about.mask_classes.map(({ pair }, value) => [value, pair ?? value])),
};
const tools = new Tools(view, doc, state, { changed, picked });
const elements = ["image", "other", "compare", "comparison", "note", "strip", "history"];
const shown = Object.fromEntries(elements.map((id) => [id, $(id)]));
const results = new Results({ ...shown, save: $("save-image") }, restore);
const live = new Live({
  render, show, failed, stopped: done, busy: (on) => { $("result").ariaBusy = String(on); },
  resting: () => !tools.action,
});
const pause = (time) => new Promise((done) => setTimeout(done, time));
const random = () => Math.floor(Math.random() * 2 ** 31);

// The service

/** Asks until the service answers; returns the answer. */
async function answered(ask) {
  for (;;) {
    try {
      return await ask();
    } catch (error) {
      say(error.message, true);
      if (!error.offline) throw error;
      await pause(1000);
    }
  }
}

/** Runs work that the user asked for; reports its error. */
async function attempt(text, work) {
  say(text);
  try {
    await work();
    done();
  } catch (error) {
    failed(error);
  }
}

function failed(error) {
  say(error.message, true);
  if (!error.offline || failed.waiting) return;
  failed.waiting = true;
  pause(1000).then(() => answered(api.ready)).then(() => answered(api.capabilities)).then(({ model }) => {
    if (model !== about.model) return location.reload(); // its classes and sizes differ
    say("Connected again");
    changed();
  }).catch(() => {}) // `answered` reports it
    .finally(() => { failed.waiting = false; });
}

/** Waits until no stroke is in progress. */
async function resting() {
  while (tools.action) await pause(50);
}

const content = async (name) => toBase64(await encodePng(doc.layers[name], name === "mask" ? palette : null));

/** The request for the current state. */
async function request(kind) {
  const { prompt, negative, seed, maskScale, sketchScale } = doc.values;
  const body = { prompt, negative_prompt: negative, seed };
  if (kind === "preview") body.steps = about.defaults.steps > PREVIEW_STEPS ? PREVIEW_STEPS : 1;
  if (kind === "variations") body.n = VARIATIONS;
  if (doc.photo && kind !== "animation") return { ...body, image: doc.photo.blob, wanted_mask: await content("mask") };
  if (kind === "preview") body.output_format = "jpeg"; // encoded sooner
  Object.assign(body, { control_image: {}, conditioning_scale: {} });
  for (const [name, present, scale] of [["mask", doc.hasMask, maskScale], ["sketch", doc.hasSketch, sketchScale]]) {
    if (!present || !about.conditions.includes(name)) continue;
    body.control_image[name] = await content(name);
    body.conditioning_scale[name] = scale;
  }
  return body;
}

// Live

/** Called after every change of the document. */
function changed() {
  if ($("live").checked) live.start("preview"); // first: the preview does not wait for the rest
  settle();
}

/** Keeps, shows and checks the document. */
function settle() {
  doc.save();
  refresh(state, doc);
  view.draw();
  clearTimeout(settle.timer);
  settle.timer = setTimeout(diagnose, 400);
}

/** Generates images; returns what `show` shows, with the time of each stage in ms. */
async function render(kind, signal, given) {
  const start = performance.now(), { photo } = doc, entryOf = snapshots();
  if (kind === "animation") return { entries: await frames(given, signal), times: {} };
  const unchanged = () => ({ entries: [entryOf({ blob: photo.blob, seed: doc.values.seed })], times: {} });
  if (photo && doc.layers.mask.data.every((value, i) => value === photo.before[i])) return unchanged();
  const send = await request(kind), encoded = performance.now();
  const images = await (photo ? api.editPhoto : api.generate)(send, signal).catch((error) => {
    if (error.code !== "empty-region") throw error; // too thin for the size of the photograph
  });
  if (!images) return unchanged();
  const times = { encode: encoded - start, service: performance.now() - encoded };
  return { entries: images.map(entryOf), times };
}

function show(kind, { entries, times }, started) {
  done();
  if (kind === "animation") return results.animate(entries);
  if (kind === "variations") return results.variations(entries);
  const [entry] = entries;
  results.show(entry, kind === "full");
  underlay(entry.blob);
  $("image").decode().catch(() => {}).then(() => requestAnimationFrame(() => {
    const total = performance.now() - started, { encode = 0, service = 0 } = times;
    const stages = Object.entries({ encode, service, draw: total - encode - service });
    const text = stages.map(([name, time]) => `${name} ${time.toFixed(0)}`).join(", ");
    $("timing").textContent = `${kind} ${total.toFixed(0)} ms: ${text}`;
    $("timing").dataset.kind = kind;
  }));
}

/** Shows an image below the layer. */
async function underlay(blob) {
  view.underlay = await createImageBitmap(blob);
  view.opacity = $("opacity").value / 100;
  view.draw();
}

/** Function that joins images with the state at this time, which makes them. */
function snapshots() {
  const { photo } = doc, values = { ...doc.values };
  const copy = ([name, layer]) => [name, { ...layer, data: layer.data.slice() }];
  const layers = Object.fromEntries(Object.entries(doc.layers).map(copy));
  return ({ blob, seed, certificate }) =>
    ({ blob, seed, photo, values: { ...values, seed }, note: noteOf(photo, certificate), layers });
}

function noteOf(photo, certificate) {
  if (!photo) return "";
  if (!certificate) return "The photograph: what you paint on it is generated";
  const { changed_outside: outside, changed_inside: inside } = certificate;
  return `Certificate: ${outside} pixels changed outside the region, which is what you painted and a margin; ${inside} inside`;
}

function restore(entry) {
  live.stop();
  live.stale = false; // the state has an image
  results.stopComparison();
  replace(entry.layers, state.layer, entry.photo, entry.values);
  results.show(entry, false);
  underlay(entry.blob);
  settle();
}

/** Lists the problems of the mask, with a button for those that an operation corrects. */
async function diagnose() {
  const run = (diagnose.run = {});
  const found = doc.hasMask ? await api.check(await content("mask"), doc.values.prompt).catch(() => null) : null;
  if (diagnose.run !== run) return; // a newer one has started
  const items = found ? [...found.contradictions, ...found.problems] : [];
  items.sort((a, b) => Boolean(b.fix) - Boolean(a.fix));
  $("problems").replaceChildren(...items.map(({ kind, text, fix }) => {
    const item = Object.assign(document.createElement("li"), { textContent: text });
    item.dataset.kind = kind;
    if (fix) {
      const button = Object.assign(document.createElement("button"), { textContent: fix.title });
      button.addEventListener("click", () => { button.disabled = true; edit(fix.operation, fix.fields); });
      item.append(" ", button);
    }
    return item;
  }));
}

// Layers and files

let opened = 0; // how often layers were replaced

function showLayer() {
  view.setLayer(doc.layers[state.layer], words[state.layer]);
  refresh(state, doc);
}

function picked(value) {
  if (state.layer === "mask") state.value = value;
  refresh(state, doc);
}

/** Replaces a layer by a condition in canonical form, a Blob or an <img>, of the photograph or of none, and values. */
async function load(name, image, photo = doc.photo, values = {}) {
  const layer = await doc.layerOfImage(image, name);
  await resting();
  replace({ [name]: layer }, name, photo, values);
}

/** Replaces layers and values in one step, and shows one of the layers. */
function replace(layers, name, photo, values) {
  opened++;
  tools.action = null; // a stroke that is not complete ends
  doc.history.commit();
  doc.photo = photo;
  doc.replace(layers, values);
  state.layer = name;
  showLayer();
}

/** Opens an image made by likeness with all its settings, or a mask or a sketch in any format. */
async function openFile(file) {
  const recipe = await api.recipeOf(file).catch((error) => {
    if (error.offline || error.code === "edited") throw error;
    return null;
  });
  if (recipe) {
    const { prompt, negative_prompt: negative, seed, control_image: control, conditioning_scale: scale } = recipe;
    if (!Number.isSafeInteger(seed))
      throw new Error(`The seed of ${file.name} is larger than 2^53 - 1, the limit of the page: use likeness replay`);
    const values = { prompt, negative, seed, maskScale: scale.mask ?? 1, sketchScale: scale.sketch ?? 1 };
    const layers = doc.blank(), names = Object.keys(control).filter((name) => name in layers);
    for (const name of names) layers[name] = await doc.layerOfImage(fromBase64(control[name]), name);
    await resting();
    replace(layers, names.at(-1) ?? state.layer, null, values);
  } else {
    const { condition, b64_json: base64 } = await api.inspect(file).catch((error) => {
      if (error.code !== "unknown-condition") throw error;
      throw new Error(`${file.name} is neither a mask nor a sketch. Open photographs with Photograph…`);
    });
    if (!(condition in doc.layers)) throw new Error(`${file.name} contains ${condition}, which cannot be painted`);
    await load(condition, fromBase64(base64), null);
  }
  changed();
}

async function openPhoto(file) {
  const found = await api.extract("mask", file, about.defaults.size), blob = fromBase64(found.image);
  const photo = about.edits ? { blob } : null;
  await load("mask", fromBase64(found.b64_json), photo);
  live.stop();
  if (photo) photo.before = doc.layers.mask.data.slice();
  results.stopComparison();
  results.show(snapshots()({ blob, seed: doc.values.seed }), true);
  $("opacity").value = PHOTO_OPACITY;
  underlay(blob);
  settle();
}

// Masks

/** Applies an operation of the service to the mask; again, if it was painted on meanwhile. */
async function apply(operation, fields) {
  const { data } = doc.layers.mask, sent = data.slice(), before = opened;
  const { b64_json: base64 } = await api.editMask(await content("mask"), operation, fields);
  const mask = await doc.layerOfImage(fromBase64(base64), "mask");
  await resting();
  if (opened !== before) return; // the operation was for another mask
  if (data.some((value, i) => value !== sent[i])) return apply(operation, fields);
  replace({ mask }, "mask", doc.photo, {});
  changed();
}

let edits = Promise.resolve(); // one after another: each starts from the result of the one before
const edit = (operation, fields) => {
  edits = edits.then(() => attempt(`${operation}…`, () => apply(operation, fields)));
};

/** Starts from a mask that belongs to no photograph: a Blob, or an <img>. */
async function startFrom(image, values = {}) {
  await load("mask", image, null, values);
  changed();
}

/** Opens a dialog; returns a function that adds a mask to choose from to it, and one that returns whether it is still open. */
function offer(title) {
  const dialog = $("choose"), choices = dialog.querySelector(".choices"), run = (offer.run = {});
  dialog.querySelector("h2").textContent = title;
  choices.replaceChildren();
  dialog.showModal();
  function add(src, alt) {
    const image = Object.assign(new Image(), { src, alt, title: alt }), button = document.createElement("button");
    button.append(image);
    button.addEventListener("click", () => {
      dialog.close();
      attempt("Opening…", () => image.decode().then(() => startFrom(image)));
    });
    choices.append(button);
  }

  return { add, isOpen: () => dialog.open && offer.run === run };
}

function examples() {
  const { add } = offer("Examples");
  for (const name of EXAMPLES) add(`examples/${name}.png`, name.replace("-", " "));
}

/** Offers four masks for the prompt. */
async function propose() {
  const prompt = doc.values.prompt || "a person", { add, isOpen } = offer(prompt);
  for (let i = 1; i <= 4 && isOpen(); i++) {
    try {
      const { b64_json: base64 } = await api.propose(prompt, random());
      if (isOpen()) add(`data:image/png;base64,${base64}`, `Mask ${i}`);
    } catch (error) {
      if (isOpen()) $("choose").close();
      throw error;
    }
  }
}

/** Generates a face from the prompt only, and parses it. */
async function randomFace() {
  const seed = random(), [image] = await api.generate({ prompt: doc.values.prompt, seed });
  await startFrom(fromBase64((await api.extract("mask", image.blob, about.defaults.size)).b64_json), { seed });
}

/** Images between the mask and another one. */
async function frames(other, signal) {
  const entries = [], entryOf = snapshots();
  const own = await content("mask"), { control_image: control, ...body } = await request("animation");
  for (let i = 0; i < FRAMES; i++) {
    say(`Generating ${i + 1} of ${FRAMES} faces…`);
    const { b64_json: base64 } = await api.editMask(own, "interpolate", { other, at: i / (FRAMES - 1) });
    const [image] = await api.generate({ ...body, control_image: { ...control, mask: base64 } }, signal);
    const entry = entryOf(image), mask = await doc.layerOfImage(fromBase64(base64), "mask");
    entries.push({ ...entry, photo: null, note: "", layers: { ...entry.layers, mask } });
  }
  return entries;
}

// Controls

const className = () => about.mask_classes[state.value].name;
const maskOf = async (file) => (await api.inspect(file, "mask")).b64_json;
const withFile = (text, work, accept) => async () => {
  const file = await pickFile(accept);
  await attempt(text, () => work(file));
};

const actions = {
  undo: () => { if (!tools.cancel() && doc.history.undo()) changed(); },
  redo: () => { if (!tools.cancel() && doc.history.redo()) changed(); },
  generate: () => live.start("full"),
  variations: () => { live.start("variations"); say("Generating variations…"); },
  examples,
  propose: () => attempt("Generating masks…", propose),
  random: () => attempt("Generating…", randomFace),
  photo: withFile("Parsing the photograph…", openPhoto, "image/*"),
  open: withFile("Opening…", openFile),
  clear: () => {
    if (tools.action) return;
    opened++;
    view.underlay = null;
    doc.reset();
    changed();
  },
  grow: () => edit("grow", { classes: [className()], by: "1" }),
  shrink: () => edit("shrink", { classes: [className()], by: "1" }),
  remove: () => edit("remove", { classes: [className()] }),
  smooth: () => {
    if (tools.action) return;
    doc.history.begin();
    smooth(doc.layers.mask, state.value);
    state.layer = "mask";
    showLayer();
    if (doc.history.commit()) changed();
  },
  paste: withFile("Copying…", async (file) => {
    edit("paste", { classes: [className()], other: await maskOf(file), align: true });
  }),
  interpolate: withFile("Opening…", async (file) => live.start("animation", await maskOf(file))),
  "save-mask": async () => saveFile(await encodePng(doc.layers.mask, palette), "mask.png"),
  "save-index": async () => saveFile(await encodePng(doc.layers.mask), "mask-index.png"),
  "save-sketch": async () => saveFile(await encodePng(doc.layers.sketch), "sketch.png"),
  "save-image": () => {
    const { blob, seed } = results.current;
    saveFile(blob, `face-${seed}.${blob.type.split("/")[1]}`); // a preview is a JPEG
  },
  seed: () => { doc.values.seed = random(); changed(); },
  layer: (name) => { if (!tools.action) state.layer = name; showLayer(); },
  drop: (file) => attempt("Opening…", () => openFile(file)),
  changed,
};

for (const id of ["prompt", "negative"]) $(id).maxLength = about.limits.prompt;
build(about.mask_classes, state, doc, actions);
wire({ state, doc, view, tools, actions });
const restored = doc.restore();
showLayer();
settle();
say(restored ? "Your last work is back" : "Paint, open a file, or start with Masks from text");
document.documentElement.dataset.ready = "true";
window.studio = { doc, state, view, live, results }; // for tests and the curious

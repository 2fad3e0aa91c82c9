// The controls: buttons, keys, dropped files. What they do is in `actions` of main.js.

import { TOOLS } from "./tools.js";

const $ = (id) => document.getElementById(id);
const all = (selector) => document.querySelectorAll(selector);

const KEYS = [
  ...Object.values(TOOLS).map(({ title, key }) => [key, title]),
  ["[ ] or - +", "Smaller, larger brush"],
  ["hold x", "Erase"],
  ["Alt + click, right button", "Pick class"],
  ["Shift + click", "Fill the whole class; in the history: compare"],
  ["Ctrl + z, Ctrl + Shift + z", "Undo, redo"],
  ["Space + drag, middle button", "Pan"],
  ["Wheel", "Zoom; while moving a class: its size"],
  ["0", "Fit the window"],
  ["r", "Mirror"],
  ["k", "Lock: paint only over this class"],
  ["v", "Mask or sketch"],
  ["g", "Generate"],
  ["n", "New seed"],
  ["?", "Keys"],
];

const FIELDS = { // id of a control -> value of the document
  prompt: "prompt", negative: "negative", seed: "seed", "mask-scale": "maskScale", "sketch-scale": "sketchScale",
};

/** Brings all controls in line with the state. */
export function refresh(state, doc) {
  for (const name of ["tool", "layer"])
    for (const input of all(`input[name=${name}]`)) input.checked = input.value === state[name];
  for (const input of all("input[name=class]")) input.checked = Number(input.value) === state.value;
  for (const input of all("input[name=lock]")) input.checked = state.lock.has(Number(input.value));
  for (const id of ["square", "mirror"]) $(id).checked = state[id];
  const size = state.sizes[state.tool];
  $("size").disabled = !size;
  $("size").value = size ?? 1;
  $("size-value").textContent = size ? `${$("size").value} px` : "";
  $("undo").disabled = !doc.history.position;
  $("redo").disabled = doc.history.position === doc.history.steps.length;
  for (const [id, name] of Object.entries(FIELDS)) {
    const typing = id === "seed" && document.activeElement === $(id);
    if (!typing && $(id).value !== String(doc.values[name])) $(id).value = doc.values[name];
  }
  for (const id of ["mask-scale", "sketch-scale"]) $(`${id}-value`).textContent = doc.values[FIELDS[id]];
}

function radio(name, value, title) {
  const label = document.createElement("label");
  const input = Object.assign(document.createElement("input"), { type: "radio", name, value });
  label.append(input, title);
  return label;
}

/** Creates the tools, the classes and the list of keys. */
export function build(classes, state, doc, actions) {
  for (const [name, { title, key }] of Object.entries(TOOLS)) {
    const label = Object.assign(radio("tool", name, title), { title: `${title} (${key})` });
    label.firstChild.addEventListener("change", () => { state.tool = name; refresh(state, doc); });
    $("tool").append(label);
  }
  classes.forEach(({ name, title, color }, value) => {
    const row = document.createElement("div"), swatch = document.createElement("i");
    const label = Object.assign(radio("class", value, ""), { title: name });
    swatch.style.background = `rgb(${color})`;
    label.append(swatch, title);
    label.firstChild.addEventListener("change", () => { state.value = value; refresh(state, doc); });
    const lock = document.createElement("input"), meaning = `Paint only over ${title}`;
    Object.assign(lock, { type: "checkbox", name: "lock", value, title: meaning, ariaLabel: meaning });
    lock.addEventListener("change", () => state.lock[lock.checked ? "add" : "delete"](value));
    row.className = "class";
    row.append(label, lock);
    $("classes").append(row);
  });
  const entries = KEYS.flatMap(([key, text]) => [["dt", key], ["dd", text]]);
  $("keys").querySelector("dl").append(...entries.map(([tag, text]) =>
    Object.assign(document.createElement(tag), { textContent: text })));
  for (const button of all("button[id]"))
    if (button.id in actions) button.addEventListener("click", () => actions[button.id]());
}

/** Connects the other controls. */
export function wire({ state, doc, view, tools, actions }) {
  for (const input of all("input[name=layer]")) input.addEventListener("change", () => actions.layer(input.value));
  $("size").addEventListener("input", () => {
    state.sizes[state.tool] = Number($("size").value);
    refresh(state, doc);
  });
  for (const id of ["square", "mirror"]) $(id).addEventListener("change", () => { state[id] = $(id).checked; });
  $("opacity").addEventListener("input", () => { view.opacity = $("opacity").value / 100; view.draw(); });
  for (const [id, name] of Object.entries(FIELDS)) {
    $(id).addEventListener(id === "seed" ? "change" : "input", () => {
      if (!$(id).reportValidity()) return;
      doc.values[name] = typeof doc.values[name] === "number" ? Number($(id).value) : $(id).value;
      actions.changed();
    });
  }
  $("theme").addEventListener("click", () => {
    const root = document.documentElement, dark = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
    root.className = (root.className || dark) === "dark" ? "light" : "dark";
  });
  $("help").addEventListener("click", () => $("keys").showModal());
  addEventListener("keydown", (event) => keyDown(event, { state, doc, view, tools, actions }));
  addEventListener("keyup", (event) => {
    if (event.key === " ") tools.space = false;
    if (event.key.toLowerCase() === "x") tools.erase = false;
  });
  const withFiles = (event) => event.dataTransfer.types.includes("Files"); // text is dropped into fields
  addEventListener("dragover", (event) => {
    if (!withFiles(event)) return;
    event.preventDefault();
    document.body.classList.add("drop");
  });
  addEventListener("dragleave", () => document.body.classList.remove("drop"));
  addEventListener("drop", (event) => {
    if (!withFiles(event)) return;
    event.preventDefault();
    document.body.classList.remove("drop");
    const [file] = event.dataTransfer.files;
    if (file) actions.drop(file);
  });
}

function keyDown(event, { state, doc, view, tools, actions }) {
  const typing = event.target.matches("textarea, input:not([type=range], [type=radio], [type=checkbox])");
  if (typing || document.querySelector("dialog[open]")) return;
  const key = event.key.toLowerCase();
  if ((event.ctrlKey || event.metaKey) && (key === "z" || key === "y")) {
    event.preventDefault();
    return actions[key === "y" || event.shiftKey ? "redo" : "undo"]();
  }
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (key === " " && event.target.matches("button, input, summary") && !view.canvas.matches(":hover")) return;
  if (event.repeat && ["g", "n", "v"].includes(key)) return;
  const resize = (factor) => {
    const size = state.sizes[state.tool];
    const next = factor > 1 ? Math.ceil(size * factor) : Math.floor(size * factor);
    if (size) state.sizes[state.tool] = Math.min(64, Math.max(1, next));
  };
  const tool = Object.keys(TOOLS).find((name) => TOOLS[name].key === key);
  const work = tool ? () => { state.tool = tool; } : {
    " ": () => { tools.space = true; },
    x: () => { tools.erase = true; },
    ...Object.fromEntries(["[", "-"].map((name) => [name, () => resize(1 / 1.25)])),
    ...Object.fromEntries(["]", "+", "="].map((name) => [name, () => resize(1.25)])),
    0: () => view.fit(),
    r: () => { state.mirror = !state.mirror; },
    k: () => { state.lock[state.lock.has(state.value) ? "delete" : "add"](state.value); },
    v: () => tools.action || actions.layer(state.layer === "mask" ? "sketch" : "mask"),
    g: actions.generate,
    n: actions.seed,
    "?": () => $("keys").showModal(),
  }[key];
  if (!work) return;
  event.preventDefault();
  work();
  refresh(state, doc);
}

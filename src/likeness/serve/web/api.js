// The service (docs/serve.md). Every function throws an Error whose message is for the user.

import { fromBase64 } from "./png.js";

const key = new URLSearchParams(location.hash.slice(1).replace(/[+&]/g, encodeURIComponent)).get("key");

function unreachable(error) {
  if (error.name === "AbortError") throw error;
  const message = "The service does not answer. Your work is kept in this browser.";
  throw Object.assign(new Error(message), { offline: true });
}

async function send(path, { json, form, signal } = {}) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  if (json) headers["Content-Type"] = "application/json";
  const response = await fetch(`/v1/${path}`, {
    method: json || form ? "POST" : "GET", headers, signal, body: json ? JSON.stringify(json) : form,
  }).catch(unreachable);
  const answer = await response.json().catch((error) => response.ok ? unreachable(error) : null);
  if (!response.ok) {
    const error = new Error(answer?.error?.message ?? `The service answered with status ${response.status}`);
    const offline = [502, 503, 504].includes(response.status); // of a proxy, or a restart
    throw Object.assign(error, { offline, code: answer?.error?.code });
  }
  return answer;
}

const formOf = (values) => {
  const form = new FormData();
  for (const [name, value] of Object.entries(values)) if (value !== undefined) form.append(name, value);
  return form;
};

export const capabilities = () => send("capabilities");

/** Whether the service generates images; an error with `offline` if not. */
export const ready = () => send("../readyz");

/** Images of an answer: [{blob, seed, certificate}], the latter of edits. */
const imagesOf = ({ data, seeds, certificates, output_format: format }) => data.map((image, i) => (
  { blob: fromBase64(image.b64_json, `image/${format}`), seed: seeds[i], certificate: certificates?.[i] }));

/** Generates images. Aborting `signal` cancels the job. */
export const generate = async (json, signal) => imagesOf(await send("images/generations", { json, signal }));

/** Edits a photograph (`POST /v1/images/edits`). */
export const editPhoto = async (fields, signal) =>
  imagesOf(await send("images/edits", { form: formOf(fields), signal }));

/** Recognizes a condition file of any format: {condition, format, problems, b64_json}. */
export const inspect = (file, condition) => send("inspect", { form: formOf({ file, condition }) });

/** Extracts a condition of a photograph: {b64_json, image}. */
export const extract = (condition, image, size) => send(`conditions/${condition}`, { form: formOf({ image, size }) });

export const propose = (prompt, seed) => send("masks/propose", { json: { prompt, seed } });

export const editMask = (mask, operation, fields = {}) => send("masks/edit", { json: { mask, operation, ...fields } });

/** Problems of a mask and its contradictions to a prompt: {problems: [{kind, text}], contradictions: [...]}. */
export const check = (mask, prompt) => send("masks/check", { json: { mask, prompt } });

/** The request that made an image: fields of `generate`, and `control_image`. */
export const recipeOf = (image) => send("recipes", { form: formOf({ image }) });

// Messages, and files from and to the user's disk.

const $ = (id) => document.getElementById(id);

const READING = 6000; // ms for which an error stays

export function say(text, error = false) {
  clearTimeout(say.timer);
  say.until = error ? performance.now() + READING : 0;
  if ($("status").textContent !== text) $("status").textContent = text;
  $("status").classList.toggle("error", error);
}

/** Ends a message of progress; an error stays until it could be read. */
export function done() {
  const left = (say.until ?? 0) - performance.now();
  if (left <= 0) return say("");
  clearTimeout(say.timer);
  say.timer = setTimeout(() => say(""), left);
}

/** Opens a file dialog; resolves to the file. */
export const pickFile = (accept = "image/*,.npy,.npz") => new Promise((done) => {
  const input = $("file");
  input.accept = accept;
  input.value = "";
  input.onchange = () => done(input.files[0]);
  input.click();
});

export function saveFile(blob, name) {
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

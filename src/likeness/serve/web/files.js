// Messages, and files from and to the user's disk.

const $ = (id) => document.getElementById(id);

export function say(text, error = false) {
  $("status").textContent = text;
  $("status").classList.toggle("error", error);
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

// The generated images: the current one, comparison with an older one, variations, history, animation.

const LONGEST_HISTORY = 40;

export class Results {
  /** @param elements {image, other, compare, comparison, note, strip, history, save} @param restore (entry) => void */
  constructor(elements, restore) {
    Object.assign(this, elements, { restore, current: null, timer: null });
    this.compare.addEventListener("input", () => this.split());
    this.comparison.addEventListener("click", () => (this.comparing ? this.stopComparison() : this.press(true)));
  }

  /** Shows an image. `entry`: {blob, seed, values, layers, note}; `keep`: it enters the history. */
  show(entry, keep) {
    this.stopAnimation();
    this.display(entry);
    if (!keep || this.history.firstChild?.entry.blob === entry.blob) return; // the photograph, again
    this.history.prepend(this.button(entry));
    while (this.history.children.length > LONGEST_HISTORY) this.history.lastChild.remove();
  }

  display(entry) {
    this.put(this.image, entry.blob);
    this.note.textContent = entry.note;
    this.current = entry;
    this.save.disabled = false;
  }

  /** Compares the current image with another one. */
  against(entry) {
    this.put(this.other, entry.blob);
    this.compare.hidden = this.other.hidden = false;
    this.press(true);
    this.split();
  }

  split() { this.other.style.clipPath = `inset(0 0 0 ${this.compare.value}%)`; }

  stopComparison() {
    this.compare.hidden = this.other.hidden = true;
    this.press(false);
  }

  get comparing() { return this.comparison.ariaPressed === "true"; }

  /** Decides what a click on an image of the history does. */
  press(on) { this.comparison.ariaPressed = String(on); }

  variations(entries) {
    this.strip.replaceChildren(...entries.map((entry) => this.button(entry)));
  }

  /** Plays images forth and back until one of them, or another one, is chosen. */
  animate(entries) {
    this.stopAnimation();
    this.stopComparison();
    this.variations(entries);
    if (matchMedia("(prefers-reduced-motion: reduce)").matches) return;
    const order = [...entries, ...entries.slice(1, -1).reverse()];
    let at = 0;
    this.timer = setInterval(() => this.display(order[at++ % order.length]), 160);
  }

  stopAnimation() {
    clearInterval(this.timer);
    this.timer = null;
  }

  /** Button with an image: a click returns to it, or compares it with the current one. */
  button(entry) {
    const button = Object.assign(document.createElement("button"), { entry }), image = document.createElement("img");
    this.put(image, entry.blob);
    image.alt = button.title = `Seed ${entry.seed}`;
    button.append(image);
    button.addEventListener("click", ({ shiftKey }) =>
      (shiftKey || this.comparing ? this.against(entry) : this.restore(entry)));
    return button;
  }

  put(image, blob) {
    const url = URL.createObjectURL(blob);
    image.onload = () => URL.revokeObjectURL(url);
    image.src = url;
    image.hidden = false;
  }
}

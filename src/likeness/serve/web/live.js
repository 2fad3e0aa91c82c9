// One job in flight: a change starts a preview at once, and the full image when the hand rests. A newer job cancels the
// older one; the full image follows variations if they cancelled it.

export class Live {
  /**
   * @param render async (kind, signal, given) => result
   * @param show (kind, result) => void
   * @param failed (error) => void
   * @param stopped () => void, a job was cancelled
   * @param busy (boolean) => void, whether a job is in flight
   * @param resting () => boolean, whether the hand does not paint
   * @param rest milliseconds after the last change until the full image
   */
  constructor({ render, show, failed, stopped, busy, resting, rest = 700 }) {
    Object.assign(this, { render, show, failed, stopped, busy, resting, rest, job: null, timer: null, cancelled: 0 });
    this.stale = false; // whether the last change has no full image yet
  }

  /** Starts a job now: a "preview", which the "full" image follows, or another kind that `render` knows. */
  start(kind, given) {
    this.stop();
    this.stale ||= kind === "preview";
    this.run(kind, given);
  }

  /** Cancels the job in flight and what would follow. */
  stop() {
    clearTimeout(this.timer);
    if (this.job) {
      this.cancelled++;
      this.job.abort();
      this.end();
      this.stopped();
    }
  }

  async run(kind, given) {
    const job = (this.job = new AbortController());
    const started = performance.now();
    this.busy(true);
    try {
      const result = await this.render(kind, job.signal, given);
      if (this.job !== job) return;
      this.end();
      this.show(kind, result, started);
      if (kind === "full") this.stale = false;
      if (this.stale && kind !== "animation") this.follow(this.rest - (performance.now() - started));
    } catch (error) {
      if (this.job !== job) return; // cancelled
      this.end();
      this.failed(error);
    }
  }

  /** Starts the full image in `wait` milliseconds, or once the hand rests. */
  follow(wait) {
    this.timer = setTimeout(() => this.resting() ? this.run("full") : this.follow(this.rest), wait);
  }

  end() {
    this.job = null;
    this.busy(false);
  }
}

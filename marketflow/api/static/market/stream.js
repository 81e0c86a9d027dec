/**
 * The stream of prices, kept alive.
 *
 * The browser's own reconnecting gives up on some answers, says nothing of when it will try again, and does not notice a
 * connection that has died without a word. So each connection is used once, watched by its heartbeats, and replaced.
 */

const EVENTS = ["snapshot", "prices", "mode", "health", "heartbeat", "end"];

/** Silence after which a connection is given up; a heartbeat comes every 5 s. */
const SILENCE_MS = 12_000;

const LONGEST_PAUSE_MS = 10_000;

/**
 * Events: those of the stream, with their data as `detail`, and `state` with
 * {state: "connecting" | "open" | "lost", reason, retryAt (ms of performance.now)}.
 */
export class Stream extends EventTarget {
  /** @param {string} url */
  constructor(url) {
    super();
    this.url = url;
    /** @type {EventSource | null} */
    this.source = null;
    this.heardAt = 0;
    this.failures = 0;
    this.retryTimer = 0;
    this.ended = false;
    setInterval(() => this.#watch(), 1000);
    window.addEventListener("online", () => this.retry());
    document.addEventListener("visibilitychange", () => document.hidden || this.retry());
    // A page that comes back out of the browser's cache has lost its connection.
    window.addEventListener("pageshow", (event) => event.persisted && this.open());
  }

  /** Connect, whatever was before. */
  open() {
    this.#close();
    this.ended = false;
    this.heardAt = performance.now();
    const source = new EventSource(this.url);
    this.source = source;
    for (const name of EVENTS) {
      source.addEventListener(name, (event) => source === this.source && this.#heard(name, event.data));
    }
    source.addEventListener("error", () => source === this.source && this.#lost(this.#reason()));
    this.#tell({ state: "connecting", failures: this.failures });
  }

  /** Connect now if there is no connection. */
  retry() {
    if (this.source === null) this.open();
  }

  /** @param {string} name @param {string} data */
  #heard(name, data) {
    this.heardAt = performance.now();
    if (name === "snapshot") {
      this.failures = 0;
      this.#tell({ state: "open" });
    }
    this.ended ||= name === "end";
    this.dispatchEvent(new CustomEvent(name, { detail: JSON.parse(data) }));
  }

  #watch() {
    if (this.source !== null && performance.now() - this.heardAt > SILENCE_MS) this.#lost("The connection is silent.");
  }

  #reason() {
    if (!navigator.onLine) return "This device is offline.";
    return this.ended ? "MarketFlow has ended." : "The connection is lost.";
  }

  /** @param {string} reason */
  #lost(reason) {
    this.#close();
    const pause = Math.min(LONGEST_PAUSE_MS, 1000 * 2 ** this.failures);
    this.failures += 1;
    this.retryTimer = setTimeout(() => this.retry(), pause);
    this.#tell({ state: "lost", reason, retryAt: performance.now() + pause });
  }

  #close() {
    clearTimeout(this.retryTimer);
    this.source?.close();
    this.source = null;
  }

  /** @param {object} detail */
  #tell(detail) {
    this.dispatchEvent(new CustomEvent("state", { detail }));
  }
}

/**
 * Client of the price stream that reconnects: a connection without heartbeats is replaced.
 *
 * A WebSocket, since browsers open only six HTTP connections to a server in all tabs together.
 */

const EVENTS = new Set(["snapshot", "prices", "mode", "health", "heartbeat", "alert", "end"]);

/** Close code of a server that shuts down. */
const GOING_AWAY = 1001;

/** Silence after which a connection counts as lost; the server sends a heartbeat every 5 s. */
const SILENCE_MS = 12_000;

const MAX_PAUSE_MS = 10_000;

/**
 * Events: those of the stream, with their data as `detail`, and `state` with
 * {state: "connecting" | "open" | "lost", reason, retryAt (ms of performance.now)}.
 */
export class Stream extends EventTarget {
  /** @param {string} path relative to the page */
  constructor(path) {
    super();
    this.url = new URL(path, document.baseURI);
    this.url.protocol = this.url.protocol === "https:" ? "wss:" : "ws:";
    /** @type {WebSocket | null} */
    this.socket = null;
    this.receivedAt = 0;
    this.failures = 0;
    this.retryTimer = 0;
    this.opened = false; // ever
    this.ended = false;
    setInterval(() => this.#watch(), 1000);
    window.addEventListener("online", () => this.retry());
    document.addEventListener("visibilitychange", () => document.hidden || this.retry());
    // A page restored from the browser's cache has lost its connection.
    window.addEventListener("pageshow", (event) => event.persisted && this.open());
  }

  /** Open a new connection, and close any other. */
  open() {
    this.#close();
    this.receivedAt = performance.now();
    const socket = new WebSocket(this.url);
    this.socket = socket;
    socket.addEventListener("message", ({ data }) => socket === this.socket && this.#receive(JSON.parse(data)));
    socket.addEventListener("close", ({ code }) => socket === this.socket && this.#lost(this.#reason(code)));
    this.#notify({ state: "connecting", failures: this.failures });
  }

  /** Connect now if there is no connection. */
  retry() {
    if (this.socket === null) this.open();
  }

  /** @param {{event: string, data: any}} message */
  #receive({ event, data }) {
    this.receivedAt = performance.now();
    if (!EVENTS.has(event)) return;
    if (event === "snapshot") {
      this.failures = 0;
      this.opened = true;
      this.ended = false; // not before: an attempt that fails says nothing new
      this.#notify({ state: "open" });
    }
    this.ended ||= event === "end";
    this.dispatchEvent(new CustomEvent(event, { detail: data }));
  }

  #watch() {
    if (this.socket !== null && performance.now() - this.receivedAt > SILENCE_MS) this.#lost("The connection is silent.");
  }

  /** @param {number} code of the close */
  #reason(code) {
    if (!navigator.onLine) return "This device is offline.";
    this.ended ||= code === GOING_AWAY;
    if (this.ended) return "MarketFlow has ended.";
    return this.opened ? "The connection is lost." : "There is no connection: MarketFlow is down or refuses it, or a proxy does not pass WebSockets on.";
  }

  /** @param {string} reason */
  #lost(reason) {
    this.#close();
    const pause = Math.min(MAX_PAUSE_MS, 1000 * 2 ** this.failures);
    this.failures += 1;
    this.retryTimer = setTimeout(() => this.retry(), pause);
    this.#notify({ state: "lost", reason, retryAt: performance.now() + pause });
  }

  #close() {
    clearTimeout(this.retryTimer);
    const { socket } = this;
    this.socket = null; // later events of it are ignored
    socket?.close();
  }

  /** @param {object} detail */
  #notify(detail) {
    this.dispatchEvent(new CustomEvent("state", { detail }));
  }
}

/** The last 24 hours of the reference price of each symbol that is seen: one request a symbol for hourly candles. */

import { ask, pathOf } from "./api.js";

const HOUR_MS = 3_600_000;
const DAY_MS = 24 * HOUR_MS;

/** How long an answer with candles is used. */
const KEPT_MS = 5 * 60_000;

/** First and longest pause after a request that failed or brought no candles, doubled each time: a first tick is soon in a candle. */
const FIRST_PAUSE_MS = 1000;
const MAX_PAUSE_MS = 30_000;

/** Requests at once: forty symbols are no burst. */
const AT_ONCE = 2;

/** @typedef {{from: number, opening: number, closes: number[]}} Trend `from`: opening of the first candle, Unix ms */

/** Event `changed`: `detail` is the symbol. */
export class Trends extends EventTarget {
  /** @param {import("./market.js").Market} market */
  constructor(market) {
    super();
    this.market = market;
    /** @type {Map<string, Trend | null>} null is none on record */
    this.trends = new Map();
    /** @type {Map<string, number>} when a symbol may be asked for again, ms of performance.now */
    this.due = new Map();
    /** @type {Map<string, number>} requests without candles since the last one with them */
    this.misses = new Map();
    /** @type {Set<string>} symbols that wait for a request */
    this.waiting = new Set();
    this.running = 0;
    this.abort = new AbortController();
  }

  /** Clears all: another mode has other prices. */
  restart() {
    this.abort.abort();
    this.abort = new AbortController();
    this.trends.clear();
    this.due.clear();
    this.misses.clear();
    this.waiting.clear();
    this.running = 0;
  }

  /** The trend of a symbol, which is requested if it is too old. @param {string} symbol @returns {Trend | null} */
  of(symbol) {
    if ((this.due.get(symbol) ?? 0) <= performance.now() && !document.hidden) {
      this.due.set(symbol, Infinity);
      this.waiting.add(symbol);
      this.#next();
    }
    return this.trends.get(symbol) ?? null;
  }

  #next() {
    for (const symbol of this.waiting) {
      if (this.running === AT_ONCE) return;
      this.waiting.delete(symbol);
      this.running += 1;
      this.#ask(symbol, this.abort.signal);
    }
  }

  /** @param {string} symbol @param {AbortSignal} signal */
  async #ask(symbol, signal) {
    let found = false;
    try {
      const from = Math.ceil((this.market.now() - DAY_MS) / HOUR_MS) * HOUR_MS;
      const { candles } = await ask(`${pathOf("candles", symbol, "reference")}?interval=1h&from=${from}`, { signal });
      if (signal.aborted) return;
      this.trends.set(symbol, trendOf(candles));
      found = candles.length > 0;
    } catch {
      // What was known stays.
    }
    if (signal.aborted) return;
    const misses = found ? 0 : (this.misses.get(symbol) ?? 0) + 1;
    this.misses.set(symbol, misses);
    const pause = found ? KEPT_MS : Math.min(MAX_PAUSE_MS, FIRST_PAUSE_MS * 2 ** (misses - 1));
    this.due.set(symbol, performance.now() + pause);
    this.running -= 1;
    this.dispatchEvent(new CustomEvent("changed", { detail: symbol }));
    this.#next();
  }
}

/** @param {any[]} candles of the API @returns {Trend | null} */
function trendOf(candles) {
  if (candles.length === 0) return null;
  return { from: Date.parse(candles[0].time), opening: candles[0].open, closes: candles.map(({ close }) => close) };
}

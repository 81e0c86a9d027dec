/** Candles of one series and interval: asked for in pieces, kept in order, and kept running by newest prices. */

import { ask, pathOf } from "./api.js";

export const INTERVALS = { "1m": 60_000, "5m": 300_000, "15m": 900_000, "1h": 3_600_000, "4h": 14_400_000, "1d": 86_400_000 };

const FIRST = 500;

/** Filled holes, the newest of them: as many as a chart can show apart. */
const HOLES = 200;

/** How many of the newest are asked for again where any of them may have been corrected or verified. */
const CORRECTED = 120;
const MORE = 1000; // as many as the API gives at once

/**
 * @typedef {{at: number, open: number, high: number, low: number, close: number, average: number | null,
 *   ticks: number | null, volume: number | null, turnover: number | null, vwap: number | null, buy_volume: number | null,
 *   closed: boolean, source: "ticks" | "venue", verified: boolean | null, venue: VenueValues | null, complete: boolean | null,
 *   filled: boolean}} Candle
 * `at`: Unix ms of its opening; `filled`: missing trades of it were fetched; null is unknown. Candles made from the stream alone have prices only.
 * @typedef {{open: number, high: number, low: number, close: number, volume: number | null, turnover: number | null,
 *   ticks: number | null}} VenueValues
 */

/** What the stream does not tell of a candle. */
const UNKNOWN = {
  average: null, ticks: null, volume: null, turnover: null, vwap: null, buy_volume: null, source: "ticks", complete: null, verified: null,
  venue: null, filled: false,
};

export class Candles {
  /** @param {string} symbol @param {string} exchange the reference price if empty @param {string} interval */
  constructor(symbol, exchange, interval) {
    this.symbol = symbol;
    this.exchange = exchange;
    this.interval = interval;
    this.length = INTERVALS[interval];
    /** @type {Candle[]} oldest first */
    this.all = [];
    this.complete = false; // nothing older is on record
    /** @type {{from: number, to: number}[]} holes that were filled, Unix ms */
    this.filled = [];
    this.ticked = 0; // newest tick that was taken, Unix ms by the exchange's clock
    this.pathOf = pathOf("candles", symbol, exchange || "reference");
  }

  /** The newest ones. @param {AbortSignal} signal */
  async load(signal) {
    await this.#askHoles(signal);
    this.all = await this.#ask({ limit: FIRST }, signal);
    this.complete = this.all.length < FIRST;
  }

  /** Those before the oldest. @param {AbortSignal} signal */
  async loadOlder(signal) {
    const older = await this.#ask({ to: this.all[0].at, limit: MORE }, signal);
    this.complete = older.length < MORE;
    this.all = [...older, ...this.all];
  }

  /**
   * What has become of the newest ones, and all since: what the stream leaves out, the API has.
   * @param {AbortSignal} signal
   * @param {boolean} corrected whether others than the newest two may have changed; and where none are older, some may have come
   * @returns {Promise<Candle[] | null>} those that changed, or null where so many are missing that all are to be loaded
   */
  async refresh(signal, corrected) {
    if (corrected) await this.#askHoles(signal);
    const from = corrected && this.complete ? undefined : (this.all.at(corrected ? -CORRECTED : -2) ?? this.all[0])?.at;
    const received = await this.#ask(from === undefined ? { limit: FIRST } : { from, limit: MORE }, signal);
    if (from === undefined) this.complete &&= received.length < FIRST;
    else if (received.length === MORE) return null;
    const known = new Map(this.all.slice(-MORE).map((candle) => [candle.at, candle]));
    return received
      .map((candle) => this.#withTicks(candle))
      .filter((candle) => JSON.stringify(known.get(candle.at)) !== JSON.stringify(candle))
      .map((candle) => this.#put(candle));
  }

  /**
   * Takes a price of the stream, or a reference price.
   * @param {{symbol: string, exchange: string, price: number, at: number}} quote `exchange` is empty for a reference price
   * @returns {Candle | null} the candle that changed
   */
  take({ symbol, exchange, price, at }) {
    if (symbol !== this.symbol || exchange !== this.exchange) return null;
    const opening = Math.floor(at / this.length) * this.length;
    const last = this.all.at(-1);
    // What is late for the newest candle comes with the next refresh.
    if (at < this.ticked || (last && opening < last.at)) return null;
    this.ticked = at;
    if (last?.at !== opening) {
      return this.#put({
        at: opening, open: price, high: price, low: price, close: price, closed: false, .../** @type {any} */ (UNKNOWN),
      });
    }
    const { high, low } = last;
    return this.#put({ ...last, high: Math.max(high, price), low: Math.min(low, price), close: price });
  }

  /** A candle of the API with newer ticks of the stream applied. @param {Candle} received */
  #withTicks(received) {
    const known = this.all.at(-1);
    if (known?.at !== received.at || received.closed || this.ticked < received.at) return received;
    const { close } = known;
    // The running reference candle is the server's: between two paints this page sees other medians than the minutes have.
    const { high, low } = this.exchange ? known : { high: close, low: close };
    return { ...received, high: Math.max(received.high, high), low: Math.min(received.low, low), close };
  }

  /** @param {Candle} received */
  #put(candle) {
    const place = this.all.findLastIndex((other) => other.at <= candle.at);
    if (this.all[place]?.at === candle.at) this.all[place] = candle;
    else this.all.splice(place + 1, 0, candle);
    return candle;
  }

  /** @param {{from?: number, to?: number, limit: number}} query @param {AbortSignal} signal @returns {Promise<Candle[]>} */
  async #ask(query, signal) {
    const parameters = new URLSearchParams({ interval: this.interval });
    for (const [name, value] of Object.entries(query)) parameters.set(name, String(value));
    const answer = await ask(`${this.pathOf}?${parameters}`, { signal });
    return answer.candles.map((/** @type {any} */ { time, ...candle }) => this.#withFilled({ at: Date.parse(time), ...candle }));
  }

  /** @param {any} candle @returns {Candle} */
  #withFilled(candle) {
    return { ...candle, filled: this.filled.some(({ from, to }) => from < candle.at + this.length && to >= candle.at) };
  }

  /** @param {AbortSignal} signal */
  async #askHoles(signal) {
    const parameters = new URLSearchParams({ symbol: this.symbol, state: "filled", limit: String(HOLES) });
    if (this.exchange) parameters.set("exchange", this.exchange);
    try {
      const { holes } = await ask(`holes?${parameters}`, { signal });
      this.filled = holes.map((/** @type {any} */ { from, to }) => ({ from: Date.parse(from), to: Date.parse(to) }));
    } catch (problem) {
      if (signal.aborted) throw problem;
      // Without an answer those that are known stay: the candles are shown all the same.
    }
  }
}

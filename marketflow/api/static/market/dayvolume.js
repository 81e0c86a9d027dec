/** What was traded of the chosen series in the last 24 hours, to the minute, asked for again and again. */

import { ask, pathOf } from "./api.js";
import { byId, sayTime } from "./dom.js";
import { amount, decimalsFor, minute, price, utc } from "./format.js";

const MINUTE_MS = 60_000;
const HOUR_MS = 60 * MINUTE_MS;
const DAY_MS = 24 * HOUR_MS;

const PAUSE_MS = 10_000;

/** A first candle that opens later than this after the beginning is said to be where the figures begin. */
const LATE_MS = 10 * MINUTE_MS;

const NAMES = ["volume", "turnover", "vwap"];

/** @typedef {{volume: number | null, turnover: number | null, vwap: number | null, from: number, to: number, candles: number}} Traded */

export class DayVolume {
  /**
   * @param {import("./market.js").Market} market
   * @param {import("./choice.js").Choice} choice
   */
  constructor(market, choice) {
    this.market = market;
    this.choice = choice;
    this.abort = new AbortController();
    this.timer = 0;
    /** @type {Traded | null} */
    this.traded = null;
    choice.addEventListener("change", (event) => {
      if (["symbol", "exchange"].some((name) => event.detail.has(name))) this.restart();
    });
    document.addEventListener("visibilitychange", () => document.hidden || this.#ask());
    this.show(null);
  }

  /** Clear the figures, and request them. */
  restart() {
    this.show(null);
    this.#ask();
  }

  async #ask() {
    clearTimeout(this.timer);
    this.abort.abort();
    if (document.hidden || !this.choice.symbol) return;
    this.abort = new AbortController();
    const { signal } = this.abort;
    try {
      this.show(await this.#traded(signal));
    } catch {
      // What was known stays; the banner and the chart report what fails.
    }
    if (!signal.aborted) this.timer = setTimeout(() => this.#ask(), PAUSE_MS);
  }

  /** Whole hours, and the minutes of the hour in which the 24 began. @param {AbortSignal} signal @returns {Promise<Traded>} */
  async #traded(signal) {
    const from = Math.ceil((this.market.now() - DAY_MS) / MINUTE_MS) * MINUTE_MS;
    const hour = Math.ceil(from / HOUR_MS) * HOUR_MS;
    const path = pathOf("candles", this.choice.symbol, this.choice.exchange);
    const asked = [ask(`${path}?interval=1h&from=${hour}`, { signal })];
    if (from < hour) asked.push(ask(`${path}?interval=1m&from=${from}&to=${hour}`, { signal }));
    const candles = (await Promise.all(asked)).flatMap((answer) => answer.candles);
    const sum = (/** @type {string} */ name) => candles.length > 0 && candles.every((candle) => candle[name] !== null)
      ? candles.reduce((total, candle) => total + candle[name], 0) : null;
    const [volume, turnover] = [sum("volume"), sum("turnover")];
    const first = Math.min(...candles.map(({ time }) => Date.parse(time)));
    return {
      volume, turnover, vwap: volume && turnover ? turnover / volume : null,
      from: Math.max(from, first), to: this.market.now(), candles: candles.length,
    };
  }

  /** @param {Traded | null} [traded] what is known already if left out */
  show(traded = this.traded) {
    this.traded = traded;
    const shown = {
      volume: amount(traded?.volume), turnover: amount(traded?.turnover),
      vwap: price(traded?.vwap, traded?.vwap ? decimalsFor(traded.vwap) : 0),
    };
    const unknown = traded?.candles ? "Unknown, which is not 0: not all candles of these 24 hours have one" : "Nothing is on record";
    for (const name of NAMES) {
      const place = document.querySelector(`[data-traded=${name}]`);
      sayTime(/** @type {HTMLElement} */ (place), shown[name], shown[name] === "–" ? unknown : "");
    }
    const note = byId("traded-from");
    const whole = traded !== null && traded.to - traded.from > DAY_MS - LATE_MS;
    if (traded === null || traded.volume === null || whole) sayTime(note, "", "");
    else sayTime(note, `since ${minute(traded.from)}`, `${utc(traded.from)} to ${utc(traded.to)}`);
  }
}

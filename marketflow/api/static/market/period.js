/** Highest, lowest and average of the chosen series over the chosen period, asked for again and again. */

import { ask, pathOf } from "./api.js";
import { byId, make, say, sayTime } from "./dom.js";
import { count, decimalsFor, moment, periodMs, price, utc } from "./format.js";

const PERIODS = {
  "10s": "10 seconds", "30s": "30 seconds", "1m": "1 minute", "5m": "5 minutes", "15m": "15 minutes", "1h": "1 hour",
  "4h": "4 hours", "24h": "24 hours", "7d": "7 days", "30d": "30 days", "366d": "a year", all: "all on record",
};
const QUESTIONS = ["highest", "average", "lowest"];

const NOTHING = "No tick in this period.";

/** How long until it is asked again; what is long ago moves slowly. */
const PAUSE_MS = 2_000;
const LONG_PAUSE_MS = 10_000;
const LONG_MS = 15 * 60_000;

export class Period {
  /**
   * @param {import("./market.js").Market} market
   * @param {import("./choice.js").Choice} choice
   */
  constructor(market, choice) {
    this.market = market;
    this.choice = choice;
    this.panel = document.querySelector(".period");
    this.select = byId("period");
    this.timer = 0;
    /** @type {Record<string, any> | null} */
    this.answers = null;
    this.empty = false; // there was no tick in the period when it was last looked at
    for (const [value, text] of Object.entries(PERIODS)) this.select.append(make("option", { value }, text));
    this.select.addEventListener("change", () => choice.choose({ period: this.select.value }));
    choice.addEventListener("change", (event) => {
      if (["symbol", "exchange", "period"].some((name) => event.detail.has(name))) this.restart();
    });
    document.addEventListener("visibilitychange", () => document.hidden || this.restart());
    this.#select();
    this.show();
  }

  /** Clear the figures, and request them. */
  restart() {
    this.abort?.abort();
    this.answers = null;
    this.#select();
    this.show();
    this.#ask();
  }

  /** Moves the mark of the newest price; asks at once if that is the first in the period. */
  showNow() {
    if (this.empty && this.#anyTicks(periodMs(this.period))) this.#ask();
    this.#showRange();
  }

  get period() {
    return periodMs(this.choice.period) === null ? "5m" : this.choice.period;
  }

  #select() {
    const { period } = this;
    if (!(period in PERIODS) && ![...this.select.options].some((option) => option.value === period)) {
      this.select.append(make("option", { value: period }, period));
    }
    this.select.value = period;
  }

  async #ask() {
    clearTimeout(this.timer);
    const length = periodMs(this.period);
    if (document.hidden || !this.choice.symbol) return;
    const abort = new AbortController();
    this.abort = abort;
    this.empty = !this.#anyTicks(length);
    try {
      this.answers = this.empty ? null : await this.#answers(abort.signal);
      this.#say(this.empty ? NOTHING : "");
    } catch (problem) {
      if (abort.signal.aborted) return;
      if (problem.code === "no_data") this.answers = null;
      this.#say(problem.code === "no_data" ? NOTHING : problem.message);
    }
    this.show();
    this.timer = setTimeout(() => this.#ask(), length > LONG_MS ? LONG_PAUSE_MS : PAUSE_MS);
  }

  /** Whether the newest tick lies in the period; where it does not, no other does. @param {number} length */
  #anyTicks(length) {
    const newest = this.market.newest(this.choice.symbol, this.choice.exchange);
    return newest !== null && this.market.now() - newest.at < length;
  }

  /** @param {AbortSignal} signal */
  async #answers(signal) {
    const { symbol, exchange } = this.choice;
    const query = this.period === "all" ? "" : `?period=${encodeURIComponent(this.period)}`;
    const asked = QUESTIONS.map((name) => ask(pathOf(`prices/${name}`, symbol, exchange) + query, { signal }));
    const [highest, average, lowest] = await Promise.all(asked);
    return { highest, average, lowest };
  }

  /** @param {string} problem */
  #say(problem) {
    const place = byId("period-problem");
    place.hidden = problem === "";
    say(place, problem);
  }

  show() {
    const decimals = this.answers ? decimalsFor(this.answers.average.price) : 0;
    for (const name of QUESTIONS) {
      const answer = this.answers?.[name];
      say(this.panel.querySelector(`[data-figure=${name}]`), price(answer?.price, decimals));
      const note = this.panel.querySelector(`[data-note=${name}]`);
      if (!answer) sayTime(note, "", "");
      else if (name === "average") sayTime(note, `${count(answer.ticks)} ticks`, `${utc(Date.parse(answer.from))} to ${utc(Date.parse(answer.to))}`);
      else sayTime(note, `${moment(Date.parse(answer.timestamp))} ${answer.exchange}`, `${utc(Date.parse(answer.timestamp))}, ${answer.exchange}`);
    }
    this.#showRange();
  }

  #showRange() {
    const now = this.market.shown(this.choice.symbol, this.choice.exchange);
    const range = byId("range");
    const known = this.answers !== null && now !== null;
    range.hidden = !byId("period-problem").hidden;
    range.classList.toggle("blank", !known);
    if (!known) return;
    const lowest = Math.min(this.answers.lowest.price, now.price);
    const highest = Math.max(this.answers.highest.price, now.price);
    const share = (/** @type {number} */ value) => (highest > lowest ? (value - lowest) / (highest - lowest) : 0.5);
    range.querySelector(".now").style.left = `${share(now.price) * 100}%`;
    range.querySelector(".average").style.left = `${share(this.answers.average.price) * 100}%`;
    say(byId("range-text"), `Now at ${Math.round(share(now.price) * 100)} % of the way from lowest to highest; the thin mark is the average.`);
  }
}

/** The chart with its choices: loads what is chosen, keeps it running, and says so while there is nothing to show. */

import { byId, drawNow, inFrames, make, say } from "./dom.js";
import { Candles, INTERVALS } from "./candles.js";
import { Chart } from "./chart.js";
import { count, decimalsFor, minute, percent, price } from "./format.js";
import { inOrder } from "./market.js";

/** How often the API is asked for what the stream has left out. */
const REFRESH_MS = 5_000;

/** How long after the end of a minute it is asked for. */
const GRACE_MS = 300;

export class ChartPanel {
  /**
   * @param {import("./market.js").Market} market
   * @param {import("./choice.js").Choice} choice
   */
  constructor(market, choice) {
    this.market = market;
    this.choice = choice;
    this.symbol = byId("symbol");
    this.exchange = byId("exchange");
    this.intervals = byId("intervals");
    this.newest = byId("chart-newest");
    this.legend = new Legend(byId("legend"));
    this.chart = new Chart(byId("chart"), {
      older: () => this.#older(),
      hovered: (index) => this.#hover(index),
      moved: (behind) => { this.newest.hidden = !behind; },
    });
    /** @type {Candles | null} */
    this.candles = null;
    this.wanted = ""; // what is shown or being loaded
    this.abort = new AbortController();
    this.loading = false;
    this.timer = 0;
    /** @type {number | null} */
    this.hovered = null;
    /** @type {Map<number, import("./candles.js").Candle>} candles that are to be drawn, by their opening */
    this.moved = new Map();
    this.draw = inFrames(() => this.#draw());
    this.#offerIntervals();
    this.symbol.addEventListener("change", () => choice.choose({ symbol: this.symbol.value }));
    this.exchange.addEventListener("change", () => choice.choose({ exchange: this.exchange.value }));
    this.newest.addEventListener("click", () => this.chart.toNewest());
    byId("chart-again").addEventListener("click", () => this.load());
    market.addEventListener("prices", (event) => this.#prices(event.detail));
    choice.addEventListener("change", (event) => {
      if (["symbol", "exchange", "interval"].some((name) => event.detail.has(name))) this.load();
    });
    document.addEventListener("visibilitychange", () => document.hidden || this.#refresh());
  }

  get interval() {
    return this.choice.interval in INTERVALS ? this.choice.interval : "1m";
  }

  /** Offers what there is to choose from. */
  offer() {
    fill(this.symbol, this.market.symbols.map((name) => [name, name]));
    fill(this.exchange, [["", "all"], ...this.market.exchanges.map((name) => [name, name])]);
  }

  colour() {
    this.chart.colour();
  }

  /** After a lost connection: what is missing comes in where it belongs, and the chart stays where it was scrolled to. */
  resume() {
    if (this.wanted !== this.#wanted() || (this.candles === null && !this.loading)) {
      this.load();
      return;
    }
    this.#showChoice();
    this.#refresh();
  }

  /** Loads the chosen candles anew. */
  async load() {
    const { symbol, exchange } = this.choice;
    if (!symbol) return;
    this.#stop();
    const { signal } = this.abort;
    const candles = new Candles(symbol, exchange, this.interval);
    const asked = this.market.now();
    this.candles = null;
    this.wanted = this.#wanted();
    this.#showChoice();
    this.#cover("Loading candles", false);
    this.loading = true;
    try {
      await candles.load(signal);
    } catch (problem) {
      if (!signal.aborted) this.#cover(`The candles could not be loaded. ${problem.message}`, true);
      return;
    } finally {
      if (!signal.aborted) this.loading = false;
    }
    this.candles = candles;
    this.#catchUp(asked);
    this.chart.show(candles.all, candles.length);
    this.#uncover();
    drawNow();
    this.#later();
  }

  /** Takes the prices that came while candles were loaded. @param {number} since Unix ms */
  #catchUp(since) {
    const quotes = [...(this.market.quotes.get(this.choice.symbol)?.values() ?? [])].filter(({ at }) => at >= since);
    for (const quote of inOrder(quotes)) this.candles.take(quote);
  }

  #wanted() {
    const { symbol, exchange } = this.choice;
    return JSON.stringify([this.market.mode, symbol, exchange, this.interval]);
  }

  #stop() {
    this.abort.abort();
    this.abort = new AbortController();
    clearTimeout(this.timer);
    this.moved.clear();
    this.hovered = null;
    this.loading = false;
  }

  /** Takes what the API knows better, at the new minute or in a while, whichever is sooner. */
  #later() {
    clearTimeout(this.timer);
    const untilMinute = 60_000 - (this.market.now() % 60_000) + GRACE_MS;
    this.timer = setTimeout(() => this.#refresh(), Math.min(REFRESH_MS, untilMinute));
  }

  async #refresh() {
    const { candles } = this;
    const { signal } = this.abort;
    clearTimeout(this.timer);
    if (candles === null || document.hidden) return;
    try {
      const changed = await candles.refresh(signal);
      if (changed === null) {
        this.load();
        return;
      }
      for (const candle of changed) this.moved.set(candle.at, candle);
      this.draw();
    } catch {
      // The candles stay; the banner reports a lost connection.
    }
    if (!signal.aborted) this.#later();
  }

  async #older() {
    const { candles } = this;
    const { signal } = this.abort;
    if (candles === null || this.loading || candles.complete || candles.all.length === 0) return;
    this.loading = true;
    try {
      await candles.loadOlder(signal);
      if (!signal.aborted) this.chart.extend(candles.all);
    } catch {
      // It is asked for again with the next move to the left.
    } finally {
      if (!signal.aborted) this.loading = false;
    }
  }

  /** @param {import("./market.js").Quote[]} quotes */
  #prices(quotes) {
    if (this.candles === null) return;
    for (const quote of inOrder(quotes)) {
      const candle = this.candles.take(quote);
      if (candle) this.moved.set(candle.at, candle);
    }
    if (this.moved.size) this.draw();
  }

  #draw() {
    if (this.candles === null) return;
    this.chart.update([...this.moved.values()].sort((one, other) => one.at - other.at), this.candles.all);
    this.moved.clear();
    this.#uncover();
  }

  #offerIntervals() {
    for (const interval of Object.keys(INTERVALS)) {
      const button = make("button", { type: "button", "data-interval": interval }, interval);
      button.addEventListener("click", () => this.choice.choose({ interval }));
      this.intervals.append(button);
    }
  }

  #showChoice() {
    this.symbol.value = this.choice.symbol;
    this.exchange.value = this.choice.exchange;
    for (const button of this.intervals.children) {
      button.setAttribute("aria-pressed", String(button.dataset.interval === this.interval));
    }
    const where = this.choice.exchange || "all exchanges";
    byId("chart").setAttribute("aria-label", `Candles of ${this.interval} of ${this.choice.symbol}, ${where}. Arrow keys scroll, plus and minus zoom, End shows the newest.`);
  }

  /** @param {string} text @param {boolean} failed */
  #cover(text, failed) {
    byId("chart-panel").dataset.state = failed ? "failed" : "waiting";
    byId("chart-cover").hidden = false;
    byId("chart-again").hidden = !failed;
    say(byId("chart-cover-text"), text);
    this.legend.show(null, "");
  }

  #uncover() {
    const empty = this.candles.all.length === 0;
    if (empty) {
      this.#cover(`No candles of ${this.choice.symbol} yet. The first one begins with the next tick.`, false);
      return;
    }
    byId("chart-panel").dataset.state = "shown";
    byId("chart-cover").hidden = true;
    this.#showLegend();
  }

  /** @param {number | null} index */
  #hover(index) {
    this.hovered = index;
    this.#showLegend();
  }

  #showLegend() {
    const all = this.candles?.all ?? [];
    this.legend.show((this.hovered === null ? null : all[this.hovered]) ?? all.at(-1) ?? null, this.interval);
  }
}

const NAMES = { average: "avg" };

/** The figures of a candle, in words. */
class Legend {
  /** @param {HTMLElement} place */
  constructor(place) {
    const names = ["time", "open", "high", "low", "close", "change", "average", "ticks"];
    this.values = Object.fromEntries(names.map((name) => [name, make("span", { class: `value ${name}` })]));
    for (const name of names) {
      const label = ["time", "change"].includes(name) ? "" : make("span", { class: "name" }, NAMES[name] ?? name);
      place.append(make("span", { class: "pair" }, label, this.values[name]));
    }
    this.place = place;
  }

  /** @param {import("./candles.js").Candle | null} candle @param {string} interval */
  show(candle, interval) {
    this.place.classList.toggle("blank", candle === null);
    if (candle === null) return;
    const decimals = decimalsFor(candle.close);
    for (const name of ["open", "high", "low", "close"]) say(this.values[name], price(candle[name], decimals));
    say(this.values.time, interval === "1d" ? new Date(candle.at).toISOString().slice(0, 10) : minute(candle.at));
    say(this.values.change, percent(candle.close / candle.open - 1));
    this.values.change.dataset.move = candle.close < candle.open ? "down" : "up";
    say(this.values.average, price(candle.average, decimals));
    say(this.values.ticks, candle.ticks === null ? "–" : count(candle.ticks));
  }
}

/** @param {HTMLSelectElement} select @param {string[][]} options */
function fill(select, options) {
  const values = options.map(([value]) => value);
  if (values.join() === [...select.options].map(({ value }) => value).join()) return;
  select.replaceChildren(...options.map(([value, text]) => make("option", { value }, text)));
}

/** The chart with its choices: loads what is chosen, keeps it running, and says so while there is nothing to show. */

import { byId, drawNow, inFrames, make, say } from "./dom.js";
import { Candles, INTERVALS } from "./candles.js";
import { Chart } from "./chart.js";
import { ChartKey } from "./chartkey.js";
import { inWords, Legend } from "./legend.js";
import { statesOf } from "./marks.js";
import { inOrder } from "./market.js";
import { OVERLAYS, overlayAt } from "./overlays.js";

/** How often the API is asked for what the stream has left out. */
const REFRESH_MS = 5_000;

/** How often it is asked for candles that were corrected or verified. */
const CORRECTIONS_MS = 20_000;

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
    this.legend = new Legend();
    this.key = new ChartKey((state) => this.#selectMarked(state));
    this.chart = new Chart(byId("chart"), {
      older: () => this.#older(),
      hovered: (at) => this.#hover(at),
      stepped: (by) => this.#step(by),
      moved: (behind) => { this.newest.hidden = !behind; },
    });
    /** @type {Candles | null} */
    this.candles = null;
    this.wanted = ""; // what is shown or being loaded
    this.abort = new AbortController();
    this.loading = false;
    this.timer = 0;
    /** @type {number | null} opening of the candle under the mouse, Unix ms */
    this.hovered = null;
    this.selected = 0; // opening of the candle that was selected by keyboard, Unix ms; 0 is none
    this.correctedAt = 0; // when corrections were last asked for, ms of performance.now
    /** @type {Map<number, import("./candles.js").Candle>} candles that are to be drawn, by their opening */
    this.moved = new Map();
    this.draw = inFrames(() => this.#draw());
    this.#offerIntervals();
    this.#offerOverlays();
    this.symbol.addEventListener("change", () => choice.choose({ symbol: this.symbol.value }));
    this.exchange.addEventListener("change", () => choice.choose({ exchange: this.exchange.value }));
    this.newest.addEventListener("click", () => this.chart.toNewest());
    byId("chart-again").addEventListener("click", () => this.load());
    market.addEventListener("prices", (event) => this.#prices(event.detail));
    choice.addEventListener("change", (event) => {
      if (["symbol", "exchange", "interval"].some((name) => event.detail.has(name))) this.load();
      else if (event.detail.has("overlays")) this.#showOverlays();
    });
    document.addEventListener("visibilitychange", () => document.hidden || this.#refresh());
    setInterval(this.draw, 1000);
  }

  get interval() {
    return this.choice.interval in INTERVALS ? this.choice.interval : "1m";
  }

  /** Offers what there is to choose from. */
  offer() {
    fill(this.symbol, this.market.symbols.map((name) => [name, name]));
    fill(this.exchange, [["", "reference"], ...this.market.exchanges.map((name) => [name, name])]);
  }

  colour() {
    this.chart.colour();
  }

  /** Takes the chosen time zone. */
  showZone() {
    this.chart.showZone();
    this.#showLegend();
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
    this.correctedAt = performance.now();
    this.#catchUp(asked);
    this.moved.clear();
    this.chart.show(candles.all, candles.length, candles.complete);
    this.#showOverlays();
    this.#uncover();
    drawNow();
    this.#later();
  }

  /** Takes the prices that came while candles were loaded. @param {number} since Unix ms */
  #catchUp(since) {
    const now = this.market.shown(this.candles.symbol, this.candles.exchange);
    if (now && now.at >= since) this.#take(now);
  }

  /** @param {import("./market.js").Shown | null} now */
  #take(now) {
    if (this.candles === null || now === null || now.stale) return;
    const { symbol, exchange } = this.candles;
    const candle = this.candles.take({ symbol, exchange, price: now.price, at: now.at });
    if (candle) this.moved.set(candle.at, candle);
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
    this.selected = 0;
    this.chart.point(null);
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
    const corrected = performance.now() - this.correctedAt > CORRECTIONS_MS;
    if (corrected) this.correctedAt = performance.now();
    try {
      const changed = await candles.refresh(signal, corrected);
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
      if (!signal.aborted) this.chart.extend(candles.all, candles.complete);
    } catch {
      // It is asked for again with the next move to the left.
    } finally {
      if (!signal.aborted) this.loading = false;
    }
  }

  /** @param {import("./market.js").Quote[]} quotes */
  #prices(quotes) {
    if (this.candles === null) return;
    if (this.candles.exchange) {
      for (const quote of inOrder(quotes)) {
        const candle = this.candles.take(quote);
        if (candle) this.moved.set(candle.at, candle);
      }
    } else if (quotes.some(({ symbol }) => symbol === this.candles.symbol)) {
      this.#take(this.market.reference(this.candles.symbol));
    }
    if (this.moved.size) this.draw();
  }

  #draw() {
    if (this.candles === null) return;
    // With time alone prices become stale, and the median another.
    if (!this.candles.exchange) this.#take(this.market.reference(this.candles.symbol));
    if (this.moved.size === 0) return;
    this.chart.update([...this.moved.values()].sort((one, other) => one.at - other.at), this.candles.all, this.candles.complete);
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
    const where = this.choice.exchange || "reference price";
    byId("chart").setAttribute("aria-label", `Candles of ${this.interval} of ${this.choice.symbol}, ${where}. Arrow keys scroll, comma and full stop select a candle, plus and minus zoom, End shows the newest.`);
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
    this.key.show(this.candles.all);
    if (empty) {
      this.#cover(`No candles of ${this.choice.symbol} yet. The first one begins with the next tick.`, false);
      return;
    }
    byId("chart-panel").dataset.state = "shown";
    byId("chart-cover").hidden = true;
    this.#showLegend();
  }

  #offerOverlays() {
    for (const [name, { label, title }] of Object.entries(OVERLAYS)) {
      const button = make("button", { type: "button", "data-overlay": name, title }, label);
      button.addEventListener("click", () => {
        const others = this.#overlays().filter((each) => each !== name);
        const chosen = others.length < this.#overlays().length ? others : [...others, name];
        this.choice.choose({ overlays: chosen.join(".") });
      });
      byId("overlays").append(button);
    }
    this.#showOverlays();
  }

  #overlays() {
    return this.choice.overlays.filter((name) => name in OVERLAYS);
  }

  #showOverlays() {
    const names = this.#overlays();
    for (const button of byId("overlays").children) button.setAttribute("aria-pressed", String(names.includes(button.dataset.overlay)));
    if (this.candles === null) return;
    this.chart.chooseOverlays(names, this.candles.all);
    // The average of a day begins with the day.
    if (names.includes("vwap") && overlayAt("vwap", this.candles.all, this.candles.all.length - 1, this.candles.complete) === null) this.#older();
    this.#showLegend();
  }

  /** @param {number | null} at */
  #hover(at) {
    this.hovered = at;
    this.#showLegend();
  }

  /** Selects the candle beside the selected or newest one, or none. @param {number | null} by */
  #step(by) {
    const all = this.candles?.all ?? [];
    if (by === null || all.length === 0) {
      this.#select(null);
      return;
    }
    const here = this.#selected() ?? all.length;
    this.#select(Math.min(Math.max(0, here + by), all.length - 1));
  }

  /** Selects the next older candle with a mark; from the oldest on it begins anew. @param {string} mark */
  #selectMarked(mark) {
    const all = this.candles?.all ?? [];
    const marked = all.flatMap((candle, index) => (statesOf(candle).some((state) => state === mark) ? [index] : []));
    const here = this.#selected() ?? all.length;
    this.#select(marked.findLast((index) => index < here) ?? marked.at(-1) ?? null);
  }

  /** The index of the selected candle; others may have come in before it. @returns {number | null} */
  #selected() {
    const index = this.selected === 0 ? -1 : (this.candles?.all ?? []).findIndex(({ at }) => at === this.selected);
    return index < 0 ? null : index;
  }

  /** @param {number | null} index */
  #select(index) {
    const candle = index === null ? undefined : this.candles.all[index];
    this.selected = candle?.at ?? 0;
    this.chart.point(candle ?? null);
    this.#showLegend();
    say(byId("chart-said"), candle ? inWords(candle, this.interval) : "");
  }

  #showLegend() {
    const all = this.candles?.all ?? [];
    const chosen = all.findLast(({ at }) => at === (this.selected || this.hovered));
    const shown = chosen ?? all.at(-1) ?? null;
    this.legend.show(shown, this.interval, chosen !== undefined);
    const index = shown === null ? -1 : all.lastIndexOf(shown);
    const values = this.#overlays().map((name) => [name, index < 0 ? null : overlayAt(name, all, index, this.candles.complete)]);
    this.legend.showOverlays(Object.fromEntries(values));
  }
}

/** @param {HTMLSelectElement} select @param {string[][]} options */
function fill(select, options) {
  const values = options.map(([value]) => value);
  if (values.join() === [...select.options].map(({ value }) => value).join()) return;
  select.replaceChildren(...options.map(([value, text]) => make("option", { value }, text)));
}

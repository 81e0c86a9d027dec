/** The table of all symbols: a row each, a column for each exchange. Only what changed and can be seen is drawn. */

import { byId, drawNow, inFrames, make, say, wrapping } from "./dom.js";
import { age, basisPoints, decimalsFor, moment, percent, price, utc } from "./format.js";
import { STALE_MS } from "./reference.js";
import { Sparkline } from "./sparkline.js";
import { Trends } from "./trends.js";

/** How long digits that changed keep the colour of their move, at least. */
const FLASH_MS = 600;

const HOUR_MS = 3_600_000;

/** Event `drawn`: the rows that came into view show their prices. */
export class Table extends EventTarget {
  /**
   * @param {import("./market.js").Market} market
   * @param {import("./choice.js").Choice} choice
   */
  constructor(market, choice) {
    super();
    this.market = market;
    this.choice = choice;
    this.table = byId("market");
    [this.head, this.body] = this.table.children;
    this.filter = byId("filter");
    this.blank = byId("market-blank");
    this.empty = byId("market-empty");
    this.scroller = this.table.parentElement;
    this.trends = new Trends(market);
    this.trends.addEventListener("changed", (event) => this.#changed([{ symbol: event.detail }]));
    /** @type {Map<string, Row>} */
    this.rows = new Map();
    /** @type {Set<Row>} rows whose prices are other than what they show */
    this.dirty = new Set();
    this.draw = inFrames(() => this.#draw());
    this.seen = new IntersectionObserver((entries) => this.#seen(entries), { rootMargin: "200px", scrollMargin: "200px" });

    market.addEventListener("replaced", () => this.#build());
    market.addEventListener("prices", (event) => this.#changed(event.detail));
    choice.addEventListener("change", (event) => {
      this.#markChosen();
      if (event.detail.has("symbol")) this.#reveal();
    });
    this.filter.addEventListener("input", () => {
      this.#filter();
      if (!this.filter.value) this.#reveal();
    });
    this.filter.addEventListener("keydown", (event) => this.#leaveFilter(event));
    this.body.addEventListener("click", (event) => this.#choose(event.target));
    this.body.addEventListener("keydown", (event) => this.#move(event));
    document.addEventListener("keydown", (event) => this.#findFilter(event));
    // With time alone ages change, and prices become stale.
    setInterval(() => {
      for (const row of this.rows.values()) this.dirty.add(row);
      this.draw();
    }, 1000);
  }

  #build() {
    const { symbols, exchanges } = this.market;
    const shape = JSON.stringify([symbols, exchanges]);
    const other = shape !== this.shape;
    if (other) {
      this.shape = shape;
      this.#head(exchanges);
      this.seen.disconnect();
      this.rows = new Map(symbols.map((symbol) => [symbol, new Row(symbol, exchanges)]));
      this.body.replaceChildren(...[...this.rows.values()].map((row) => row.element));
      for (const row of this.rows.values()) this.seen.observe(row.element);
    }
    for (const row of this.rows.values()) row.clear();
    this.trends.restart();
    this.#markChosen();
    this.#filter();
    if (other) this.#reveal();
    this.dirty = new Set(this.rows.values());
    this.draw();
    if (this.rows.size === 0) this.dispatchEvent(new Event("drawn"));
  }

  /** @param {string[]} exchanges */
  #head(exchanges) {
    const names = ["Symbol", "Reference", "24 h", ...exchanges, "Gap", "Age"];
    const cells = names.map((name) => make("th", { scope: "col", role: "columnheader", title: name }, ...wrapping(name)));
    cells[1].title = "Median of the exchanges whose price is not stale";
    cells[2].title = "Change of the reference price in 24 hours, from the first full hour on";
    cells.at(-2).title = "Between the highest and the lowest of the exchanges whose price is not stale, in basis points (hundredths of a percent)";
    cells.at(-1).title = "Time since the newest tick";
    this.head.replaceChildren(make("tr", { role: "row" }, ...cells));
  }

  /** @param {{symbol: string}[]} quotes */
  #changed(quotes) {
    for (const { symbol } of quotes) {
      const row = this.rows.get(symbol);
      if (row) this.dirty.add(row);
    }
    this.draw();
  }

  #draw() {
    for (const row of this.dirty) {
      if (!row.visible) continue;
      row.show(this.market, this.trends);
      this.dirty.delete(row);
    }
    this.#showEmpty();
  }

  #showEmpty() {
    this.empty.hidden = this.rows.size === 0 || [...this.market.quotes.values()].some((quotes) => quotes.size > 0);
  }

  /** @param {IntersectionObserverEntry[]} entries */
  #seen(entries) {
    for (const entry of entries) {
      const row = this.rows.get(/** @type {any} */ (entry.target).dataset.symbol);
      if (row) row.visible = entry.isIntersecting;
    }
    this.draw();
    drawNow();
    this.dispatchEvent(new Event("drawn"));
  }

  #markChosen() {
    for (const row of this.rows.values()) row.mark(row.symbol === this.choice.symbol, this.choice.exchange);
    this.#oneStop();
  }

  /** Scrolls the list, and nothing around it, until the chosen row can be seen. */
  #reveal() {
    const row = this.rows.get(this.choice.symbol)?.element;
    if (!row || row.hidden) return;
    const [seen, place] = [this.scroller.getBoundingClientRect(), row.getBoundingClientRect()];
    const above = seen.top + this.head.offsetHeight - place.top;
    const below = place.bottom - seen.bottom;
    if (above > 0) this.scroller.scrollTop -= above;
    else if (below > 0) this.scroller.scrollTop += below;
  }

  /** One row is a stop of the Tab key; arrow keys go to the others. */
  #oneStop() {
    const shown = this.#shown();
    const stop = shown.find((row) => row.symbol === this.choice.symbol) ?? shown[0];
    for (const row of this.rows.values()) row.button.tabIndex = row === stop ? 0 : -1;
  }

  #shown() {
    return [...this.rows.values()].filter((row) => !row.element.hidden);
  }

  #filter() {
    const wanted = this.filter.value.trim();
    for (const row of this.rows.values()) {
      row.element.hidden = !row.symbol.toUpperCase().includes(wanted.toUpperCase());
    }
    const shown = this.#shown().length;
    const all = this.rows.size;
    say(byId("market-count"), shown === all ? String(all) : `${shown} of ${all}`);
    this.blank.hidden = shown > 0;
    this.table.hidden = shown === 0;
    say(this.blank, wanted ? `No symbol has “${wanted}” in its name` : "No symbols are configured");
    this.#oneStop();
  }

  /** @param {KeyboardEvent} event */
  #findFilter(event) {
    const writing = /** @type {Element} */ (event.target).closest?.("input, select, dialog");
    if (event.key !== "/" || event.ctrlKey || event.metaKey || event.altKey || writing) return;
    event.preventDefault();
    this.filter.focus();
  }

  /** @param {KeyboardEvent} event */
  #leaveFilter(event) {
    const first = this.#shown()[0];
    if (event.key === "ArrowDown") first?.button.focus();
    else if (event.key === "Enter" && first) this.choice.choose({ symbol: first.symbol });
    else if (event.key === "Escape" && this.filter.value) {
      this.filter.value = "";
      this.#filter();
      this.#reveal();
    } else return;
    event.preventDefault();
  }

  /** @param {any} target */
  #choose(target) {
    const symbol = target.closest("tr")?.dataset.symbol;
    const exchange = target.closest("[data-exchange]")?.dataset.exchange ?? this.choice.exchange;
    if (symbol) this.choice.choose({ symbol, exchange });
  }

  /** @param {KeyboardEvent} event */
  #move(event) {
    const shown = this.#shown();
    const here = shown.findIndex((row) => row.button === event.target);
    const goals = { ArrowDown: here + 1, ArrowUp: here - 1, Home: 0, End: shown.length - 1 };
    const goal = shown[goals[event.key]];
    if (here < 0 || !(event.key in goals)) return;
    event.preventDefault();
    if (!goal) return;
    shown[here].button.tabIndex = -1;
    goal.button.tabIndex = 0;
    goal.button.focus();
  }
}

/** A symbol's row. */
class Row {
  /** @param {string} symbol @param {string[]} exchanges */
  constructor(symbol, exchanges) {
    this.symbol = symbol;
    this.visible = false;
    this.button = make("button", { type: "button", class: "symbol", tabindex: "-1", title: symbol }, symbol);
    this.reference = new Cell("Reference", "reference", "");
    this.spark = new Sparkline();
    this.change = make("span", { class: "percent" });
    this.since = make("span", { class: "since" });
    this.trend = make("td", { role: "cell", class: "trend", "data-label": "24 h" }, this.spark.element, this.change, this.since);
    this.cells = exchanges.map((exchange) => new Cell(exchange, "quote", exchange));
    this.gap = make("span");
    const [long, longer] = [...exchanges, "", ""].sort((one, other) => other.length - one.length);
    this.sides = make("span", { class: "sides", "data-longest": sidesOf(long, longer) });
    this.gapCell = make("td", { role: "cell", class: "gap", "data-label": "Gap" }, this.gap, this.sides);
    this.age = make("td", { role: "cell", class: "age", "data-label": "Age" });
    this.element = make(
      "tr",
      { role: "row", "data-symbol": symbol },
      make("th", { scope: "row", role: "rowheader" }, this.button),
      this.reference.element,
      this.trend,
      ...this.cells.map((cell) => cell.element),
      this.gapCell,
      this.age,
    );
  }

  clear() {
    for (const cell of [this.reference, ...this.cells]) cell.clear();
  }

  /** @param {boolean} chosen @param {string} exchange */
  mark(chosen, exchange) {
    this.element.classList.toggle("chosen", chosen);
    if (chosen) this.button.setAttribute("aria-current", "true");
    else this.button.removeAttribute("aria-current");
    for (const cell of [this.reference, ...this.cells]) {
      cell.element.classList.toggle("chosen", chosen && cell.exchange === exchange);
    }
  }

  /** @param {import("./market.js").Market} market @param {Trends} trends */
  show(market, trends) {
    const reference = market.reference(this.symbol);
    const decimals = reference ? decimalsFor(reference.price) : 0;
    for (const cell of this.cells) {
      const quote = market.newest(this.symbol, cell.exchange);
      cell.show(quote, decimals, quote?.move ?? 0);
    }
    this.reference.show(reference, decimals, market.references.get(this.symbol)?.move ?? 0);
    const now = market.now();
    const newest = market.newest(this.symbol);
    const gap = market.gap(this.symbol);
    for (const cell of [this.reference, ...this.cells]) cell.calm();
    const stale = newest !== null && now - newest.at > STALE_MS;
    this.element.classList.toggle("stale", stale);
    this.element.classList.toggle("blank", newest === null);
    for (const cell of this.cells) {
      const quote = market.newest(this.symbol, cell.exchange);
      cell.element.classList.toggle("stale", quote !== null && now - quote.at > STALE_MS);
      cell.element.classList.toggle("highest", gap !== null && gap.size > 0 && gap.highest === quote);
      cell.element.classList.toggle("lowest", gap !== null && gap.size > 0 && gap.lowest === quote);
    }
    say(this.age, newest ? age(now - newest.at) : "–");
    title(this.age, newest ? `${newest.exchange}, ${utc(newest.at)}${stale ? "; stale" : ""}` : "No tick yet");
    title(this.reference.element, reference ? `Median of ${reference.exchanges} of ${this.cells.length} exchanges` : "No tick yet");
    this.#showGap(gap);
    // Without a price there is nothing to show, and no candle to ask for yet.
    this.#showTrend(reference, reference && trends.of(this.symbol), now);
  }

  /** @param {import("./market.js").Gap | null} gap */
  #showGap(gap) {
    const sides = gap !== null && gap.size > 0 ? sidesOf(gap.lowest.exchange, gap.highest.exchange) : "";
    say(this.gap, gap ? `${basisPoints(gap.basisPoints)} bp` : "–");
    say(this.sides, sides);
    const size = gap ? price(gap.size, decimalsFor(gap.highest.price)) : "";
    title(this.gapCell, sides ? `B${sides.slice(1)}: ${size}` : "");
  }

  /** @param {import("./market.js").Shown | null} reference @param {import("./trends.js").Trend | null} trend @param {number} now */
  #showTrend(reference, trend, now) {
    const known = reference !== null && trend !== null;
    const change = known ? reference.price / trend.opening - 1 : 0;
    say(this.change, known ? percent(change) : "–");
    this.trend.dataset.move = change > 0 ? "up" : change < 0 ? "down" : "";
    // Of less than 24 hours it says how much; those begin with a full hour.
    const short = known && now - trend.from < 23 * HOUR_MS;
    say(this.since, short ? age(now - trend.from) : "");
    title(this.trend, known ? `Since ${moment(trend.from)}, ${utc(trend.from)}${short ? "; there is nothing older" : ""}` : "");
    this.spark.show(known ? [trend.opening, ...trend.closes.slice(0, -1), reference.price] : []);
  }
}

/** @param {string} buy @param {string} sell names of exchanges */
const sidesOf = (buy, sell) => `buy on ${buy}, sell on ${sell}`;

/** @param {HTMLElement} element @param {string} text */
function title(element, text) {
  if (element.title !== text) element.title = text;
}

/** A price, of which the digits that changed flash. */
class Cell {
  /** @param {string} label @param {string} kind @param {string} [exchange] */
  constructor(label, kind, exchange) {
    this.exchange = exchange;
    this.kept = make("span");
    this.moved = make("span", { class: "moved" });
    const named = exchange === undefined ? {} : { "data-exchange": exchange };
    this.element = make("td", { role: "cell", class: kind, "data-label": label, ...named }, this.kept, this.moved);
    this.clear();
  }

  clear() {
    this.text = "";
    this.flashedAt = 0;
    this.element.removeAttribute("data-move");
    this.calm();
  }

  /** @param {{price: number} | null} quote @param {number} decimals @param {number} move */
  show(quote, decimals, move) {
    const text = price(quote?.price, decimals);
    if (text === this.text) return;
    const first = this.text === "";
    let same = 0;
    while (!first && same < text.length && text[same] === this.text[same]) same += 1;
    say(this.kept, text.slice(0, same));
    say(this.moved, text.slice(same));
    this.text = text;
    if (first || move === 0) return;
    this.element.dataset.move = move > 0 ? "up" : "down";
    this.moved.dataset.flash = this.element.dataset.move;
    this.flashedAt = performance.now();
  }

  /** Ends a flash. It is no animation: those would be painted anew with every frame, in every cell. */
  calm() {
    if (performance.now() - this.flashedAt > FLASH_MS) this.moved.removeAttribute("data-flash");
  }
}

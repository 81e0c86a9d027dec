/** The chosen symbol on each exchange over the last minutes, as this page has seen them: lines beside each other. */

import { createChart, LineSeries, LineStyle } from "../lightweight-charts/lightweight-charts.js";
import { byId, inFrames } from "./dom.js";
import { decimalsFor, price } from "./format.js";
import { STALE_MS } from "./reference.js";

/** How much is kept of each series, a point a second. */
const KEPT = 180;

/** There are as many colours; with more exchanges they come again, and lines are dashed from the seventh on. */
const COLOURS = 12;
const DASHED_FROM = 6;

/** @param {number} index of an exchange */
export const colourOf = (index) => `--line-${(index % COLOURS) + 1}`;

export class Lines {
  /**
   * @param {import("./market.js").Market} market
   * @param {import("./choice.js").Choice} choice
   */
  constructor(market, choice) {
    this.market = market;
    this.choice = choice;
    this.place = byId("lines");
    /** @type {Map<string, Map<string, {time: number, value: number}[]>>} points by symbol and exchange */
    this.points = new Map();
    /** @type {Map<string, any>} a line for each exchange */
    this.series = new Map();
    this.decimals = -1; // of the prices on the axis
    this.chart = createChart(this.place, {
      autoSize: true,
      handleScroll: false,
      handleScale: false,
      layout: { attributionLogo: false, fontFamily: getComputedStyle(this.place).fontFamily, fontSize: 11 },
      crosshair: { vertLine: { visible: false, labelVisible: false }, horzLine: { visible: false, labelVisible: false } },
      rightPriceScale: { borderVisible: false, scaleMargins: { top: 0.08, bottom: 0.08 } },
      timeScale: { visible: false, rightOffset: 0, minBarSpacing: 0.1 },
    });
    this.draw = inFrames(() => this.#draw());
    market.addEventListener("replaced", () => this.#begin());
    market.addEventListener("prices", (event) => this.#take(event.detail));
    choice.addEventListener("change", (event) => event.detail.has("symbol") && this.draw());
    // As often as there is another point.
    setInterval(this.draw, 1000);
    this.colour();
  }

  /** Takes the colours of the page. */
  colour() {
    const style = getComputedStyle(document.documentElement);
    this.chart.applyOptions({
      layout: { background: { color: "transparent" }, textColor: style.getPropertyValue("--dim") },
      grid: { vertLines: { visible: false }, horzLines: { color: style.getPropertyValue("--grid") } },
    });
    [...this.series.values()].forEach((series, index) => {
      series.applyOptions({ color: style.getPropertyValue(colourOf(index)) });
    });
  }

  #begin() {
    const { mode, symbols, exchanges } = this.market;
    const shape = JSON.stringify([mode, symbols, exchanges]);
    // After a lost connection the lines go on, over the gap.
    if (shape !== this.shape) {
      this.shape = shape;
      for (const series of this.series.values()) this.chart.removeSeries(series);
      const options = { lineWidth: /** @type {const} */ (2), priceLineVisible: false, crosshairMarkerVisible: false };
      this.decimals = -1;
      this.series = new Map(exchanges.map((name, index) => {
        const lineStyle = index % COLOURS < DASHED_FROM ? LineStyle.Solid : LineStyle.Dashed;
        return [name, this.chart.addSeries(LineSeries, { ...options, lineStyle })];
      }));
      this.points = new Map(symbols.map((name) => [name, new Map(exchanges.map((exchange) => [exchange, []]))]));
      this.colour();
    }
    this.#take([...this.market.quotes.values()].flatMap((quotes) => [...quotes.values()]));
    this.draw();
  }

  /** @param {import("./market.js").Quote[]} quotes */
  #take(quotes) {
    const oldest = this.market.now() / 1000 - KEPT;
    for (const { symbol, exchange, price: value, at } of quotes) {
      const time = Math.floor(at / 1000);
      const points = this.points.get(symbol)?.get(exchange);
      if (!points || time < oldest || points.at(-1)?.time > time) continue;
      if (points.at(-1)?.time === time) points.pop();
      points.push({ time, value });
      while (points[0].time < oldest) points.shift();
    }
  }

  #draw() {
    this.#format();
    for (const [exchange, series] of this.series) {
      series.setData(this.#upToNow(this.points.get(this.choice.symbol)?.get(exchange) ?? []));
    }
    this.chart.timeScale().fitContent();
  }

  /** Options make the library draw twice, so they are set when they change. */
  #format() {
    const newest = this.market.newest(this.choice.symbol);
    const decimals = newest ? decimalsFor(newest.price) : 2;
    if (decimals === this.decimals) return;
    this.decimals = decimals;
    const formatter = (/** @type {number} */ value) => price(value, decimals);
    const priceFormat = { type: /** @type {const} */ ("custom"), minMove: 10 ** -decimals, formatter };
    for (const series of this.series.values()) series.applyOptions({ priceFormat });
  }

  /** A price holds until the next one, or until it is stale: there the line ends. @param {{time: number, value: number}[]} points */
  #upToNow(points) {
    const now = Math.floor(this.market.now() / 1000);
    const last = points.at(-1);
    const held = last && last.time < now && !isStale(last.time, now) ? [...points, { time: now, value: last.value }] : points;
    // The library joins neighbours, also over a gap; a colour is that of the line which begins there.
    return held.map((point, index) => (isStale(point.time, held[index + 1]?.time ?? point.time) ? { ...point, color: "transparent" } : point));
  }
}

/** Whether a price is stale by then. @param {number} time of it, in s @param {number} then in s */
const isStale = (time, then) => (then - time) * 1000 > STALE_MS;

/** Lines over the candles: moving averages of the close, and the volume-weighted average price of the UTC day. */

import { LineSeries, LineStyle } from "../lightweight-charts/lightweight-charts.js";

const DAY_MS = 86_400_000;

/** Each with a style of its own, so that they can be told apart without colours. */
export const OVERLAYS = {
  ma20: { label: "MA 20", title: "Mean of the last 20 closes", colour: "--line-2", style: LineStyle.Solid, count: 20 },
  ma50: { label: "MA 50", title: "Mean of the last 50 closes", colour: "--line-3", style: LineStyle.Dashed, count: 50 },
  vwap: { label: "VWAP", title: "Turnover by volume since the beginning of the UTC day", colour: "--line-1", style: LineStyle.Dotted, count: 0 },
};

const OPTIONS = { lineWidth: /** @type {const} */ (2), lastValueVisible: false, priceLineVisible: false, crosshairMarkerVisible: false };

/**
 * The value of an overlay at a candle, null where it is unknown.
 * @param {string} name @param {import("./candles.js").Candle[]} candles oldest first @param {number} index
 * @param {boolean} complete there is nothing older than the first
 */
export function overlayAt(name, candles, index, complete) {
  const { count } = OVERLAYS[name];
  return count ? averageAt(candles, index, count) : vwapAt(candles, index, complete);
}

/** @param {import("./candles.js").Candle[]} candles @param {number} index @param {number} count */
function averageAt(candles, index, count) {
  if (index < count - 1) return null;
  let sum = 0;
  for (let at = index - count + 1; at <= index; at += 1) sum += candles[at].close;
  return sum / count;
}

/** @param {import("./candles.js").Candle[]} candles @param {number} index @param {boolean} complete */
function vwapAt(candles, index, complete) {
  const midnight = Math.floor(candles[index].at / DAY_MS) * DAY_MS;
  if (candles[0].at > midnight && !complete) return null;
  let [volume, turnover] = [0, 0];
  for (let at = index; at >= 0 && candles[at].at >= midnight; at -= 1) {
    if (candles[at].volume == null || candles[at].turnover == null) return null;
    volume += candles[at].volume;
    turnover += candles[at].turnover;
  }
  return volume > 0 ? turnover / volume : null;
}

/** All values of an overlay, in one pass. @returns {(number | null)[]} */
function valuesOf(/** @type {string} */ name, /** @type {import("./candles.js").Candle[]} */ candles, /** @type {boolean} */ complete) {
  if (OVERLAYS[name].count) return candles.map((_, index) => averageAt(candles, index, OVERLAYS[name].count));
  let [day, volume, turnover, known] = [-1, 0, 0, true];
  return candles.map((candle) => {
    const today = Math.floor(candle.at / DAY_MS);
    if (today !== day) [day, volume, turnover, known] = [today, 0, 0, candles[0].at <= today * DAY_MS || complete];
    known &&= candle.volume != null && candle.turnover != null;
    volume += candle.volume ?? 0;
    turnover += candle.turnover ?? 0;
    return known && volume > 0 ? turnover / volume : null;
  });
}

export class Overlays {
  /** @param {import("../lightweight-charts/lightweight-charts.js").IChartApi} chart */
  constructor(chart) {
    this.chart = chart;
    /** @type {Map<string, any>} */
    this.series = new Map();
    /** @type {CSSStyleDeclaration | null} */
    this.style = null;
    this.length = 60_000; // of a candle in ms
  }

  /** Takes the colours of the page. @param {CSSStyleDeclaration} style */
  colour(style) {
    this.style = style;
    for (const [name, series] of this.series) series.applyOptions({ color: style.getPropertyValue(OVERLAYS[name].colour).trim() });
  }

  /** @param {string[]} names those that are shown from now on */
  choose(names) {
    for (const [name, series] of this.series) {
      if (names.includes(name)) continue;
      this.chart.removeSeries(series);
      this.series.delete(name);
    }
    for (const name of names) {
      if (this.series.has(name)) continue;
      const color = this.style?.getPropertyValue(OVERLAYS[name].colour).trim();
      this.series.set(name, this.chart.addSeries(LineSeries, { ...OPTIONS, color, lineStyle: OVERLAYS[name].style }));
    }
  }

  /** @param {import("./candles.js").Candle[]} candles all @param {number} length of each in ms @param {boolean} complete */
  set(candles, length, complete) {
    this.length = length;
    for (const [name, series] of this.series) {
      const values = valuesOf(name, candles, complete);
      series.setData(candles.map((_, index) => this.#point(candles, index, values[index])));
    }
  }

  /** The newest candle has changed, or has come. @param {import("./candles.js").Candle[]} candles all @param {boolean} complete */
  update(candles, complete) {
    const index = candles.length - 1;
    for (const [name, series] of this.series) {
      series.update(this.#point(candles, index, overlayAt(name, candles, index, complete)));
    }
  }

  /** @param {import("./candles.js").Candle[]} candles @param {number} index @param {number | null} value */
  #point(candles, index, value) {
    const time = /** @type {any} */ (candles[index].at / 1000);
    if (value === null) return { time };
    // The library joins neighbours, also over a gap; the colour is that of the line which begins here.
    const missing = index + 1 < candles.length && Math.round((candles[index + 1].at - candles[index].at) / this.length) > 1;
    return missing ? { time, value, color: "transparent" } : { time, value };
  }
}

/** The volume below the candles: a bar for each, whose lower part is what takers bought, where that is known. */

import { HistogramSeries } from "../lightweight-charts/lightweight-charts.js";
import { amount } from "./format.js";

/** The pane of the bars, and its share of the height: candles have four parts, bars have one. */
const PANE = 1;
const PARTS = [4, 1];

const OPTIONS = {
  priceFormat: { type: /** @type {const} */ ("custom"), minMove: 1e-9, formatter: amount },
  lastValueVisible: false,
  priceLineVisible: false,
};

export class VolumeBars {
  /** @param {import("../lightweight-charts/lightweight-charts.js").IChartApi} chart */
  constructor(chart) {
    this.chart = chart;
    /** @type {any[]} of the whole and of the bought part; none while no volume is known, and there is no pane then */
    this.series = [];
    this.colours = { buy: "", sell: "", unsided: "" };
    /** @type {import("./candles.js").Candle[]} */
    this.candles = [];
  }

  /** Takes the colours of the page. @param {CSSStyleDeclaration} style */
  colour(style) {
    for (const name of Object.keys(this.colours)) this.colours[name] = style.getPropertyValue(`--${name}`).trim();
    this.set(this.candles);
  }

  /** Shows the volumes of other candles. @param {import("./candles.js").Candle[]} candles all, oldest first */
  set(candles) {
    this.candles = candles;
    this.#arrange(candles.some(isKnown));
    this.series.forEach((series, index) => series.setData(candles.map((candle) => this.#bars(candle)[index])));
  }

  /**
   * Shows a volume that has changed.
   * @param {import("./candles.js").Candle} candle @param {boolean} past it is not the newest
   * @param {import("./candles.js").Candle[]} candles all, oldest first
   */
  update(candle, past, candles) {
    this.candles = candles;
    if (this.series.length === 0 && isKnown(candle)) this.set(candles);
    else this.series.forEach((series, index) => series.update(this.#bars(candle)[index], past));
  }

  /** @param {boolean} known any volume is */
  #arrange(known) {
    if (known === this.series.length > 0) return;
    if (!known) {
      for (const series of this.series.splice(0)) this.chart.removeSeries(series);
      return;
    }
    // The second is drawn over the first.
    this.series = [this.chart.addSeries(HistogramSeries, OPTIONS, PANE), this.chart.addSeries(HistogramSeries, OPTIONS, PANE)];
    this.chart.priceScale("right", PANE).applyOptions({ scaleMargins: { top: 0.15, bottom: 0 } });
    this.chart.panes().forEach((pane, index) => pane.setStretchFactor(PARTS[index]));
  }

  /** @param {import("./candles.js").Candle} candle */
  #bars({ at, volume, buy_volume: bought }) {
    const time = /** @type {any} */ (at / 1000);
    const { buy, sell, unsided } = this.colours;
    const whole = volume == null ? { time } : { time, value: volume, color: bought == null ? unsided : sell };
    return [whole, bought == null ? { time } : { time, value: bought, color: buy }];
  }
}

/** @param {import("./candles.js").Candle} candle */
const isKnown = ({ volume }) => volume != null;

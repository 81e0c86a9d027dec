/** The drawing of candles: Lightweight Charts in the colours of the page, with local times, and by keyboard. */

import { CandlestickSeries, CrosshairMode, createChart, LineStyle, TickMarkType } from "../lightweight-charts/lightweight-charts.js";
import { decimalsFor, price } from "./format.js";
import { Marks } from "./marks.js";
import { Overlays } from "./overlays.js";
import { slotsOf } from "./slots.js";
import { VolumeBars } from "./volumebars.js";
import { zone } from "./zone.js";

const DAY_MS = 86_400_000;

/** How many places of candles are shown at first, and left blank at the right. */
const FEWEST_SHOWN = 12;
const MOST_SHOWN = 110;
const MARGIN = 4;

/** How near to the oldest candle older ones are asked for. */
const NEAR = 30;

export class Chart {
  /**
   * @param {HTMLElement} place
   * @param {{older: () => void, hovered: (at: number | null) => void, stepped: (by: number | null) => void,
   *   moved: (behind: boolean) => void}} callbacks `stepped`: to another candle by keyboard, null from all of them
   */
  constructor(place, callbacks) {
    this.place = place;
    this.length = 60_000;
    this.decimals = -1;
    /** @type {import("./slots.js").Slot[]} what is drawn */
    this.slots = [];
    this.complete = false; // there is nothing older than the first
    this.count = 0; // of the candles that are drawn
    this.fitting = true; // all is kept in sight until the user scrolls, or it is too much
    this.newest = 0; // opening of the last of them, Unix ms
    this.chart = createChart(place, {
      autoSize: true,
      // Its logo brings a <style> with it; the notice is at the foot of the page.
      layout: { attributionLogo: false, fontFamily: getComputedStyle(place).fontFamily, panes: { enableResize: false } },
      crosshair: { mode: CrosshairMode.Normal },
      rightPriceScale: { borderVisible: false, entireTextOnly: true },
      timeScale: {
        borderVisible: false,
        timeVisible: true,
        secondsVisible: false,
        rightOffset: MARGIN,
        minBarSpacing: 0.8,
      },
    });
    this.showZone();
    this.series = this.chart.addSeries(CandlestickSeries, {
      // Its label would be the last candle's that can be seen.
      lastValueVisible: false,
      priceLineVisible: false,
    });
    this.volumes = new VolumeBars(this.chart);
    this.overlays = new Overlays(this.chart);
    this.marks = new Marks();
    this.series.attachPrimitive(this.marks);
    /** @type {import("./candles.js").Candle | undefined} */
    this.last = undefined;
    /** @type {any} the line of the newest price; none while there are no candles */
    this.line = null;
    this.scale = this.chart.timeScale();
    this.scale.subscribeVisibleLogicalRangeChange((range) => {
      if (range && range.from < NEAR) callbacks.older();
      callbacks.moved(this.scale.scrollPosition() < -1);
    });
    this.chart.subscribeCrosshairMove(({ logical, point }) => callbacks.hovered(point ? (this.slots[logical ?? -1]?.candle?.at ?? null) : null));
    for (const name of ["pointerdown", "wheel", "touchstart"]) place.addEventListener(name, () => { this.fitting = false; }, { passive: true });
    place.addEventListener("keydown", (event) => this.#key(event, callbacks.stepped));
    this.colour();
  }

  /** Takes the colours of the page. */
  colour() {
    const style = getComputedStyle(document.documentElement);
    const [text, grid, up, down, line, surface] = ["dim", "grid", "up", "down", "faint", "raised"].map((name) =>
      style.getPropertyValue(`--${name}`).trim(),
    );
    this.chart.applyOptions({
      layout: { background: { color: "transparent" }, textColor: text, panes: { separatorColor: grid } },
      grid: { vertLines: { color: grid }, horzLines: { color: grid } },
      crosshair: {
        vertLine: { color: line, labelBackgroundColor: surface },
        horzLine: { color: line, labelBackgroundColor: surface },
      },
    });
    // Rising ones are hollow, so that colour is not all that tells.
    this.series.applyOptions({
      upColor: "transparent", downColor: down, borderUpColor: up, borderDownColor: down, wickUpColor: up, wickDownColor: down,
    });
    this.colours = { up, down };
    this.volumes.colour(style);
    this.overlays.colour(style);
    this.marks.colour(style);
    this.#markNewest(this.last);
  }

  /** Takes the chosen time zone. */
  showZone() {
    this.chart.applyOptions({
      timeScale: { tickMarkFormatter: (/** @type {number} */ time, /** @type {number} */ type) => this.#mark(time * 1000, type) },
      localization: { timeFormatter: (/** @type {number} */ time) => this.#moment(time * 1000) },
    });
  }

  /**
   * Shows other candles, the newest at the right.
   * @param {import("./candles.js").Candle[]} candles @param {number} length of each in ms @param {boolean} complete there are none older
   */
  show(candles, length, complete) {
    this.length = length;
    this.fitting = false;
    this.extend(candles, complete);
    this.series.priceScale().applyOptions({ autoScale: true });
    this.fitting = true;
    this.#fit();
  }

  #fit() {
    if (!this.fitting) return;
    const { length } = this.slots;
    const shown = Math.min(Math.max(length, FEWEST_SHOWN), MOST_SHOWN);
    // From the left as long as there are few, with room for those that come.
    const from = Math.max(-0.5, length - shown);
    this.scale.setVisibleLogicalRange({ from, to: from + shown + MARGIN });
  }

  /** Shows other overlays. @param {string[]} names @param {import("./candles.js").Candle[]} candles */
  chooseOverlays(names, candles) {
    this.overlays.choose(names);
    this.overlays.set(candles, this.length, this.complete);
  }

  /**
   * Shows more of the same, and stays where it is.
   * @param {import("./candles.js").Candle[]} candles @param {boolean} complete there are none older
   */
  extend(candles, complete) {
    const before = this.slots.length;
    this.complete = complete;
    this.#format(candles);
    this.slots = slotsOf(candles, this.length);
    this.series.setData(this.slots.map(bar));
    this.volumes.set(candles);
    this.overlays.set(candles, this.length, complete);
    this.marks.set(this.slots);
    if (before < MOST_SHOWN && before !== this.slots.length) this.#fit();
    this.count = candles.length;
    this.newest = candles.at(-1)?.at ?? 0;
    this.#markNewest(candles.at(-1));
  }

  /**
   * Shows what has changed.
   * @param {import("./candles.js").Candle[]} changed oldest first @param {import("./candles.js").Candle[]} candles all
   * @param {boolean} complete there are none older
   */
  update(changed, candles, complete) {
    const newer = changed.filter(({ at }) => at > this.newest);
    const next = this.newest + this.length;
    if (this.count + newer.length !== candles.length || complete !== this.complete || newer.some(({ at }, index) => at !== next + index * this.length)) {
      // One has come in between, or after a gap, which the library takes only with all of them.
      this.extend(candles, complete);
      return;
    }
    this.#format(candles);
    for (const candle of changed) {
      const past = candle.at < this.newest;
      const slot = { at: candle.at, candle };
      if (candle.at > this.newest) this.slots.push(slot);
      else this.slots[this.#indexOf(candle.at)] = slot;
      this.series.update(bar(slot), past);
      this.volumes.update(candle, past, candles);
      this.newest = Math.max(this.newest, candle.at);
    }
    this.count = candles.length;
    this.marks.set(this.slots);
    if (changed.some(({ at }) => at < this.newest)) this.overlays.set(candles, this.length, complete);
    else this.overlays.update(candles, complete);
    if (newer.length && this.slots.length <= MOST_SHOWN) this.#fit();
    this.#markNewest(candles.at(-1));
  }

  /** @param {number} at opening of a candle, Unix ms */
  #indexOf(at) {
    let [low, high] = [0, this.slots.length - 1];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.slots[middle].at < at) low = middle + 1;
      else high = middle;
    }
    return low;
  }

  /** Points at a candle, and scrolls to it where it is out of sight; at none for null. @param {import("./candles.js").Candle | null} candle */
  point(candle) {
    if (candle === null) {
      this.chart.clearCrosshairPosition();
      return;
    }
    const index = this.#indexOf(candle.at);
    const range = this.scale.getVisibleLogicalRange();
    if (range && (index < range.from + 1 || index > range.to - 1)) {
      this.fitting = false;
      const half = (range.to - range.from) / 2;
      this.scale.setVisibleLogicalRange({ from: index - half, to: index + half });
    }
    this.chart.setCrosshairPosition(candle.close, /** @type {any} */ (candle.at / 1000), this.series);
  }

  /** The newest price on the axis, wherever the chart has been scrolled to. @param {import("./candles.js").Candle} [last] */
  #markNewest(last) {
    this.last = last;
    if (last === undefined) {
      if (this.line) this.series.removePriceLine(this.line);
      this.line = null;
      return;
    }
    const options = { price: last.close, color: last.close < last.open ? this.colours.down : this.colours.up };
    if (this.line) this.line.applyOptions(options);
    else this.line = this.series.createPriceLine({ ...options, lineWidth: 1, lineStyle: LineStyle.Dashed, axisLabelVisible: true });
  }

  toNewest() {
    // Without animation: an update would stop it before its end.
    this.scale.scrollToPosition(MARGIN, false);
  }

  /** @param {import("./candles.js").Candle[]} candles */
  #format(candles) {
    const newest = candles.at(-1);
    const decimals = newest ? decimalsFor(newest.close) : 2;
    if (decimals === this.decimals) return;
    this.decimals = decimals;
    const formatter = (/** @type {number} */ value) => price(value, decimals);
    this.series.applyOptions({ priceFormat: { type: "custom", minMove: 10 ** -decimals, formatter } });
  }

  /** What stands below the chart: days are UTC's, as their candles are; everything shorter is of the chosen zone. */
  #mark(ms, type) {
    const at = new Date(ms);
    const days = this.length >= DAY_MS;
    const shown = { timeZone: days ? "UTC" : zone() };
    if (type === TickMarkType.Year) return at.toLocaleDateString(undefined, { year: "numeric", ...shown });
    if (type === TickMarkType.Month) return at.toLocaleDateString(undefined, { month: "short", ...shown });
    const [hours, minutes] = zone() ? [at.getUTCHours(), at.getUTCMinutes()] : [at.getHours(), at.getMinutes()];
    const midnight = days || (hours === 0 && minutes === 0);
    if (midnight || (type === TickMarkType.DayOfMonth && this.length >= 3_600_000)) {
      return at.toLocaleDateString(undefined, { day: "numeric", month: "short", ...shown });
    }
    return at.toLocaleTimeString(undefined, { hour: "2-digit", minute: "2-digit", hourCycle: "h23", ...shown });
  }

  /** @param {number} ms */
  #moment(ms) {
    const day = { day: "numeric", month: "short", year: "numeric" };
    if (this.length >= DAY_MS) return new Date(ms).toLocaleDateString(undefined, { ...day, timeZone: "UTC" });
    return new Date(ms).toLocaleString(undefined, { ...day, hour: "2-digit", minute: "2-digit", hourCycle: "h23", timeZone: zone() });
  }

  /** @param {KeyboardEvent} event @param {(by: number | null) => void} stepped */
  #key(event, stepped) {
    const range = this.scale.getVisibleLogicalRange();
    if (!range || event.ctrlKey || event.metaKey || event.altKey) return;
    const width = range.to - range.from;
    const by = (/** @type {number} */ from, /** @type {number} */ to) => ({ from: range.from + from, to: range.to + to });
    const step = event.shiftKey ? width / 2 : Math.max(1, width / 20);
    const goals = {
      ArrowLeft: by(-step, -step), ArrowRight: by(step, step), "+": by(width / 8, 0), "=": by(width / 8, 0), "-": by(-width / 6, 0),
    };
    const steps = { ",": -1, ".": 1, Escape: null };
    this.fitting &&= !(event.key in goals);
    if (event.key === "End") this.toNewest();
    else if (event.key in steps) stepped(steps[event.key]);
    else if (event.key in goals) this.scale.setVisibleLogicalRange(goals[event.key]);
    else return;
    event.preventDefault();
  }
}

/** A candle as it is drawn, or the place of none. @param {import("./slots.js").Slot} slot */
function bar({ at, candle }) {
  const time = /** @type {any} */ (at / 1000);
  if (candle === null) return { time };
  const { open, high, low, close } = candle;
  return { time, open, high, low, close };
}

/** The values of a candle: its prices, what was traded, and what the venue says of it. */

import { byId, make, say } from "./dom.js";
import { amount, count, decimalsFor, minute, percent, price } from "./format.js";
import { statesOf } from "./marks.js";
import { OVERLAYS } from "./overlays.js";

const PRICES = ["time", "open", "high", "low", "close", "change", "average"];
const TRADED = ["ticks", "volume", "bought", "turnover", "vwap", "state"];
const LABELS = { time: "", change: "", average: "avg", state: "" };

const TITLES = {
  volume: "What was traded, in the base currency",
  bought: "The part of the volume that takers bought",
  turnover: "What was traded, in the quote currency",
  vwap: "Turnover by volume: the mean price of what was traded",
};

/** Take the room of values while there are none. */
const TYPICAL = { time: "00:00", change: "+0.00 %", ticks: "000", volume: "00.00", bought: "00 %", state: "" };
const TYPICAL_PRICE = "00,000.00";

/** What the venue says, as a word, and as a sentence. */
const WORDS = { verified: "verified", differs: "different", incomplete: "incomplete", filled: "filled", venue: "venue's candle" };
const SENTENCES = {
  verified: "The venue's own candle is the same.",
  differs: "The venue's own candle differs.",
  incomplete: "Incomplete: trades of it were not received.",
  filled: "Filled: trades of it were missing, and have been fetched from the venue.",
  venue: "The venue's own candle, for want of ticks.",
};

const COMPARED = ["open", "high", "low", "close", "volume", "turnover", "ticks"];

export class Legend {
  constructor() {
    this.place = byId("legend");
    this.note = byId("chart-note");
    const names = [...PRICES, ...TRADED];
    this.values = Object.fromEntries(names.map((name) => [name, make("span", { class: `value ${name}`, "data-typical": TYPICAL[name] ?? TYPICAL_PRICE })]));
    /** @type {Map<string, {pair: HTMLElement, value: HTMLElement}>} */
    this.overlays = new Map(Object.entries(OVERLAYS).map(([name, { label, title, colour }]) => {
      const value = make("span", { class: "value" });
      const pair = make("span", { class: "pair", title }, make("span", { class: "name" }, label), value);
      pair.style.setProperty("--line", `var(${colour})`);
      pair.hidden = true;
      return [name, { pair, value }];
    }));
    for (const line of [PRICES, TRADED]) this.place.append(make("span", { class: "line" }, ...line.map((name) => this.#pair(name))));
    this.place.append(make("span", { class: "line overlays" }, ...[...this.overlays.values()].map(({ pair }) => pair)));
  }

  /** @param {string} name */
  #pair(name) {
    const label = LABELS[name] ?? name;
    const pair = make("span", { class: "pair" }, ...(label ? [make("span", { class: "name" }, label)] : []), this.values[name]);
    if (name in TITLES) pair.title = TITLES[name];
    return pair;
  }

  /**
   * Shows a candle; of one that was pointed at or selected, also what the venue says.
   * @param {import("./candles.js").Candle | null} candle @param {string} interval @param {boolean} [chosen]
   */
  show(candle, interval, chosen = false) {
    this.place.classList.toggle("blank", candle === null);
    this.#showNote(chosen ? candle : null);
    if (candle === null) return;
    const decimals = decimalsFor(candle.close);
    for (const name of ["open", "high", "low", "close", "average", "vwap"]) say(this.values[name], price(candle[name], decimals));
    say(this.values.time, opening(candle, interval));
    say(this.values.change, percent(candle.close / candle.open - 1));
    this.values.change.dataset.move = candle.close < candle.open ? "down" : "up";
    say(this.values.ticks, candle.ticks === null ? "–" : count(candle.ticks));
    say(this.values.volume, amount(candle.volume));
    say(this.values.turnover, amount(candle.turnover));
    say(this.values.bought, boughtShare(candle));
    for (const name of ["average", ...TRADED.slice(0, -1)]) this.#explainUnknown(name);
    const marks = marksOf(candle);
    say(this.values.state, marks.map((mark) => WORDS[mark]).join(", "));
    this.values.state.dataset.state = ["incomplete", "differs", "verified"].find((mark) => marks.some((each) => each === mark)) ?? "";
  }

  /** Shows the values of the chosen overlays. @param {Record<string, number | null>} values */
  showOverlays(values) {
    for (const [name, { pair, value }] of this.overlays) {
      pair.hidden = !(name in values);
      say(value, price(values[name]));
    }
  }

  /** @param {string} name */
  #explainUnknown(name) {
    const title = this.values[name].textContent === "–" ? "Unknown, which is not 0" : "";
    if (this.values[name].title !== title) this.values[name].title = title;
  }

  /** What the venue says of a candle, over the chart. @param {import("./candles.js").Candle | null} candle */
  #showNote(candle) {
    const lines = candle === null ? [] : noteOf(candle);
    this.note.hidden = lines.length === 0;
    const text = lines.join("\n");
    if (this.note.textContent !== text) this.note.textContent = text;
  }
}

/**
 * A candle in words, for a screen reader.
 * @param {import("./candles.js").Candle} candle @param {string} interval
 */
export function inWords(candle, interval) {
  const decimals = decimalsFor(candle.close);
  const prices = ["open", "high", "low", "close"].map((name) => `${name} ${price(candle[name], decimals)}`);
  const volume = candle.volume === null ? "volume unknown" : `volume ${amount(candle.volume)}`;
  return [`${opening(candle, interval)}: ${[...prices, volume].join(", ")}.`, ...noteOf(candle)].join(" ");
}

/** @param {import("./candles.js").Candle} candle @param {string} interval */
function opening({ at }, interval) {
  return interval === "1d" ? new Date(at).toISOString().slice(0, 10) : minute(at);
}

/** The share that takers bought. @param {import("./candles.js").Candle} candle */
function boughtShare({ volume, buy_volume: bought }) {
  return bought == null || !volume ? "–" : `${Math.round((100 * bought) / volume)}\u202f%`;
}

/** @param {import("./candles.js").Candle} candle */
function marksOf(candle) {
  return statesOf(candle).sort((one, other) => Number(other === "venue") - Number(one === "venue"));
}

/** What the venue says, and how it differs. @param {import("./candles.js").Candle} candle @returns {string[]} */
function noteOf(candle) {
  const { venue } = candle;
  const sentences = marksOf(candle).map((state) => SENTENCES[state]);
  if (venue === null) {
    return candle.verified === false ? [...sentences, "How: see the candles of 1m on one exchange."] : sentences;
  }
  const differences = COMPARED.filter((name) => venue[name] !== null && venue[name] !== candle[name]);
  return [...sentences, ...differences.map((name) => `${name}: ${said(candle[name])} here, ${said(venue[name])} at the venue`)];
}

/** A number to its last digit, so that a difference is one to the eye. @param {number | null} value */
const said = (value) => (value === null ? "unknown" : String(value));

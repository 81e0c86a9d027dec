/** What is drawn in the chart, explained below it, with the number of candles that have each mark. */

import { byId, say } from "./dom.js";
import { count } from "./format.js";
import { statesOf } from "./marks.js";

export class ChartKey {
  /** @param {(state: string) => void} next selects the next older candle with a mark */
  constructor(next) {
    this.place = byId("key");
    for (const button of this.place.querySelectorAll("button[data-key]")) button.addEventListener("click", () => next(button.dataset.key));
    this.explained = this.place.querySelector("details");
    this.explained.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
      if (event.key !== "Escape") return;
      this.explained.open = false;
      this.explained.querySelector("summary").focus();
    });
  }

  /** @param {import("./candles.js").Candle[]} candles all that are loaded */
  show(candles) {
    const counts = { bought: 0, sold: 0, unsided: 0, venue: 0, verified: 0, differs: 0, incomplete: 0, filled: 0 };
    for (const candle of candles) {
      if (candle.volume != null) counts[candle.buy_volume == null ? "unsided" : "bought"] += 1;
      for (const state of statesOf(candle)) counts[state] += 1;
    }
    counts.sold = counts.bought;
    for (const [name, number] of Object.entries(counts)) {
      const item = this.place.querySelector(`[data-key="${name}"]`);
      item.hidden = number === 0;
      const figure = item.querySelector(".number");
      if (figure) say(figure, count(number));
    }
  }
}

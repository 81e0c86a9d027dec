/** The chosen symbol on each exchange: its price, how far it is from the middle of them, and its age. */

import { byId, inFrames, make, say, sayTime } from "./dom.js";
import { age, basisPoints, decimalsFor, price, utc } from "./format.js";
import { colourOf } from "./lines.js";
import { STALE_MS } from "./market.js";

/** @typedef {{element: HTMLElement, price: HTMLElement, offset: HTMLElement, age: HTMLElement, mark: HTMLElement}} Line */

export class Comparison {
  /**
   * @param {import("./market.js").Market} market
   * @param {import("./choice.js").Choice} choice
   */
  constructor(market, choice) {
    this.market = market;
    this.choice = choice;
    this.list = byId("comparison");
    /** @type {Map<string, Line>} */
    this.lines = new Map();
    this.draw = inFrames(() => this.#draw());
    market.addEventListener("replaced", () => this.#build());
    market.addEventListener("prices", (event) => {
      if (event.detail.some((/** @type {any} */ quote) => quote.symbol === choice.symbol)) this.draw();
    });
    choice.addEventListener("change", () => this.draw());
    setInterval(this.draw, 1000);
  }

  #build() {
    const lines = this.market.exchanges.map((exchange, index) => /** @type {[string, Line]} */ ([exchange, line(exchange, index)]));
    this.lines = new Map(lines);
    this.list.replaceChildren(...lines.map(([, { element }]) => element));
    this.draw();
  }

  #draw() {
    const { market, choice } = this;
    const now = market.now();
    const spread = market.spread(choice.symbol);
    const middle = spread ? (spread.highest.price + spread.lowest.price) / 2 : 0;
    for (const [exchange, line] of this.lines) {
      const quote = market.newest(choice.symbol, exchange);
      const stale = quote !== null && now - quote.at > STALE_MS;
      line.element.classList.toggle("stale", stale);
      line.element.classList.toggle("blank", quote === null);
      say(line.price, price(quote?.price, quote ? decimalsFor(quote.price) : 0));
      sayTime(line.age, quote ? age(now - quote.at) : "–", quote ? utc(quote.at) : "No tick yet");
      const compared = spread !== null && quote !== null && !stale;
      const offset = compared ? ((quote.price - middle) / middle) * 1e4 : 0;
      say(line.offset, compared ? `${offset > 0 ? "+" : ""}${basisPoints(offset)} bp` : "");
      line.mark.hidden = !compared;
      if (compared && spread.size > 0) {
        line.mark.style.left = `${((quote.price - spread.lowest.price) / spread.size) * 100}%`;
      }
    }
    const text = spread ? `${price(spread.size, decimalsFor(middle))} · ${basisPoints(spread.basisPoints)} bp` : "";
    say(byId("comparison-spread"), text);
  }
}

/** @param {string} exchange @param {number} index @returns {Line} */
function line(exchange, index) {
  const [amount, offset, past, mark] = ["price", "offset", "age", "mark"].map((name) => make("span", { class: name }));
  const track = make("span", { class: "track", "aria-hidden": "true" }, mark);
  const element = make("li", {}, make("span", { class: "name", title: exchange }, exchange), track, amount, offset, past);
  element.style.setProperty("--line", `var(${colourOf(index)})`);
  return { element, price: amount, offset, age: past, mark };
}

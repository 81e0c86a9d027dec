/** The chosen symbol on each exchange: its price, how far it is from the reference price, and its age; a click shows it in the chart. */

import { byId, inFrames, make, say, sayTime, wrapping } from "./dom.js";
import { age, basisPoints, decimalsFor, price, utc } from "./format.js";
import { colourOf } from "./lines.js";
import { STALE_MS } from "./reference.js";

/** @typedef {{element: HTMLElement, button: HTMLElement, price: HTMLElement, offset: HTMLElement, age: HTMLElement, mark: HTMLElement}} Line */

export class Comparison {
  /**
   * @param {import("./market.js").Market} market
   * @param {import("./choice.js").Choice} choice
   */
  constructor(market, choice) {
    this.market = market;
    this.choice = choice;
    this.list = byId("comparison");
    this.reference = byId("show-reference");
    this.reference.addEventListener("click", () => choice.choose({ exchange: "" }));
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
    for (const [exchange, { button }] of lines) button.addEventListener("click", () => this.choice.choose({ exchange }));
    this.lines = new Map(lines);
    this.list.replaceChildren(...lines.map(([, { element }]) => element));
    this.draw();
  }

  #draw() {
    const { market, choice } = this;
    const now = market.now();
    const gap = market.gap(choice.symbol);
    const reference = market.reference(choice.symbol);
    this.#showReference(reference);
    for (const [exchange, line] of this.lines) {
      const quote = market.newest(choice.symbol, exchange);
      const stale = quote !== null && now - quote.at > STALE_MS;
      line.element.classList.toggle("stale", stale);
      line.element.classList.toggle("blank", quote === null);
      say(line.price, price(quote?.price, quote ? decimalsFor(quote.price) : 0));
      sayTime(line.age, quote ? age(now - quote.at) : "–", quote ? utc(quote.at) : "No tick yet");
      const compared = gap !== null && quote !== null && !stale;
      const offset = compared ? (quote.price / reference.price - 1) * 1e4 : 0;
      line.button.setAttribute("aria-pressed", String(choice.exchange === exchange));
      say(line.offset, compared ? `${offset > 0 ? "+" : ""}${basisPoints(offset)} bp` : "");
      line.mark.hidden = !compared;
      if (compared && gap.size > 0) {
        line.mark.style.left = `${((quote.price - gap.lowest.price) / gap.size) * 100}%`;
      }
    }
    const sides = gap !== null && gap.size > 0 ? `: buy on ${gap.lowest.exchange}, sell on ${gap.highest.exchange}` : "";
    say(byId("comparison-gap"), gap ? `${basisPoints(gap.basisPoints)} bp${sides}` : "–");
  }

  /** @param {import("./market.js").Shown | null} reference */
  #showReference(reference) {
    this.reference.setAttribute("aria-pressed", String(this.choice.exchange === ""));
    say(byId("reference-price"), price(reference?.price, reference ? decimalsFor(reference.price) : 0));
    const counted = `median of ${reference?.exchanges} of ${this.lines.size}`;
    say(byId("reference-count"), reference === null ? "" : reference.stale ? "stale" : counted);
  }
}

/** @param {string} exchange @param {number} index @returns {Line} */
function line(exchange, index) {
  const [amount, offset, past, mark] = ["price", "offset", "age", "mark"].map((name) => make("span", { class: name }));
  const track = make("span", { class: "track", "aria-hidden": "true" }, mark);
  const button = make("button", { type: "button", class: "name", title: exchange, "aria-pressed": "false" }, ...wrapping(exchange));
  const element = make("li", {}, button, track, amount, offset, past);
  element.style.setProperty("--line", `var(${colourOf(index)})`);
  return { element, button, price: amount, offset, age: past, mark };
}

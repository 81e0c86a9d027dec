/** The newest price of each series: a snapshot of the stream with all later events applied. */

import { referencePrice, STALE_MS } from "./reference.js";

/**
 * @typedef {{symbol: string, exchange: string, price: number, at: number, arrival: number, move: number}} Quote
 * `at`: Unix ms by the exchange's clock; `arrival`: number of arrivals before it; `move`: -1, 0 or 1, the direction of the last change.
 * @typedef {{price: number, at: number, exchanges: number, stale: boolean}} Shown a reference price, or the price on one exchange
 * @typedef {{highest: Quote, lowest: Quote, size: number, basisPoints: number}} Gap `lowest` is where to buy, `highest` where to sell
 */

/**
 * Sort by event time, then by arrival, oldest first.
 * @param {Iterable<Quote>} quotes
 */
export function inOrder(quotes) {
  return [...quotes].sort((one, other) => one.at - other.at || one.arrival - other.arrival);
}

/** Events: `replaced` (after a snapshot) and `prices` (`detail`: changed quotes). */
export class Market extends EventTarget {
  constructor() {
    super();
    this.mode = "";
    /** @type {string[]} */
    this.symbols = [];
    /** @type {string[]} */
    this.exchanges = [];
    /** @type {Map<string, Map<string, Quote>>} */
    this.quotes = new Map();
    /** @type {Map<string, {price: number, move: number}>} the last reference price of a symbol, and where it moved */
    this.references = new Map();
    this.arrivals = 0;
    /** Offset of the server's clock against this one, in ms. */
    this.ahead = 0;
  }

  /** @param {{mode: string, symbols: string[], exchanges: string[], prices: any[]}} snapshot */
  replace(snapshot) {
    this.mode = snapshot.mode;
    this.symbols = snapshot.symbols;
    this.exchanges = snapshot.exchanges;
    this.quotes = new Map(snapshot.symbols.map((symbol) => [symbol, new Map()]));
    for (const price of snapshot.prices) this.#put(price);
    this.references = new Map(snapshot.symbols.map((symbol) => [symbol, { price: this.reference(symbol)?.price ?? NaN, move: 0 }]));
    this.dispatchEvent(new CustomEvent("replaced"));
  }

  /** @param {any[]} prices as the stream has them */
  update(prices) {
    const quotes = prices.map((price) => this.#put(price)).filter((quote) => quote !== null);
    for (const symbol of new Set(quotes.map((quote) => quote.symbol))) this.#moveReference(symbol);
    this.dispatchEvent(new CustomEvent("prices", { detail: quotes }));
  }

  /** @param {string} timestamp the server's time, as it was sent */
  setClock(timestamp) {
    this.ahead = Date.parse(timestamp) - Date.now();
  }

  /** The server's time, Unix ms. */
  now() {
    return Date.now() + this.ahead;
  }

  /**
   * The reference price of a symbol. While no price is fresh it is the one at its newest tick, and stale.
   * @param {string} symbol
   * @returns {Shown | null}
   */
  reference(symbol) {
    const quotes = [...(this.quotes.get(symbol)?.values() ?? [])];
    const fresh = referencePrice(quotes, this.now());
    if (fresh) return { ...fresh, stale: false };
    const last = referencePrice(quotes, Math.max(...quotes.map(({ at }) => at)));
    return last && { ...last, stale: true };
  }

  /**
   * What is shown as the price of a series.
   * @param {string} symbol
   * @param {string} exchange the reference price if empty
   * @returns {Shown | null}
   */
  shown(symbol, exchange) {
    if (!exchange) return this.reference(symbol);
    const quote = this.newest(symbol, exchange);
    return quote && { price: quote.price, at: quote.at, exchanges: 1, stale: this.now() - quote.at > STALE_MS };
  }

  /**
   * The newest quote of a symbol, on one exchange or over all.
   * @param {string} symbol
   * @param {string} [exchange] all if empty
   * @returns {Quote | null}
   */
  newest(symbol, exchange = "") {
    const quotes = this.quotes.get(symbol);
    if (!quotes) return null;
    if (exchange) return quotes.get(exchange) ?? null;
    return inOrder(quotes.values()).at(-1) ?? null;
  }

  /**
   * The difference between exchanges, of prices that are not stale; null for fewer than two.
   * @param {string} symbol
   * @returns {Gap | null}
   */
  gap(symbol) {
    const now = this.now();
    const fresh = [...(this.quotes.get(symbol)?.values() ?? [])].filter((quote) => now - quote.at <= STALE_MS);
    if (fresh.length < 2) return null;
    const highest = fresh.reduce((one, other) => (other.price > one.price ? other : one));
    const lowest = fresh.reduce((one, other) => (other.price < one.price ? other : one));
    const size = highest.price - lowest.price;
    return { highest, lowest, size, basisPoints: (size / ((highest.price + lowest.price) / 2)) * 1e4 };
  }

  /** @param {string} symbol */
  #moveReference(symbol) {
    const price = this.reference(symbol)?.price ?? NaN;
    const before = this.references.get(symbol) ?? { price: NaN, move: 0 };
    this.references.set(symbol, { price, move: Math.sign(price - before.price) || before.move });
  }

  /** @returns {Quote | null} */
  #put({ symbol, exchange, price, timestamp }) {
    const quotes = this.quotes.get(symbol);
    const at = Date.parse(timestamp);
    const before = quotes?.get(exchange);
    if (!quotes || (before && before.at > at)) return null;
    const move = before ? Math.sign(price - before.price) || before.move : 0;
    const quote = { symbol, exchange, price, at, arrival: this.arrivals, move };
    this.arrivals += 1;
    quotes.set(exchange, quote);
    return quote;
  }
}

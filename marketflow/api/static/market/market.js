/** The newest price of each series: a snapshot of the stream with all later events applied. */

/** Age from which a price is stale. */
export const STALE_MS = 15_000;

/**
 * @typedef {{symbol: string, exchange: string, price: number, at: number, arrival: number, move: number}} Quote
 * `at`: Unix ms by the exchange's clock; `arrival`: number of arrivals before it; `move`: -1, 0 or 1, the direction of the last change.
 * @typedef {{highest: Quote, lowest: Quote, size: number, basisPoints: number}} Spread
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
    /** @type {Map<string, number>} the last move of the newest price over all exchanges */
    this.moves = new Map();
    this.arrivals = 0;
    /** Offset of the server's clock against this one, in ms. */
    this.ahead = 0;
  }

  /** @param {{mode: string, symbols: string[], exchanges: string[], prices: any[]}} snapshot */
  replace(snapshot) {
    this.mode = snapshot.mode;
    this.symbols = snapshot.symbols;
    this.exchanges = snapshot.exchanges;
    this.moves.clear();
    this.quotes = new Map(snapshot.symbols.map((symbol) => [symbol, new Map()]));
    for (const price of snapshot.prices) this.#put(price);
    this.dispatchEvent(new CustomEvent("replaced"));
  }

  /** @param {any[]} prices as the stream has them */
  update(prices) {
    const quotes = prices.map((price) => this.#put(price)).filter((quote) => quote !== null);
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
   * @returns {Spread | null}
   */
  spread(symbol) {
    const now = this.now();
    const fresh = [...(this.quotes.get(symbol)?.values() ?? [])].filter((quote) => now - quote.at <= STALE_MS);
    if (fresh.length < 2) return null;
    const highest = fresh.reduce((one, other) => (other.price > one.price ? other : one));
    const lowest = fresh.reduce((one, other) => (other.price < one.price ? other : one));
    const size = highest.price - lowest.price;
    return { highest, lowest, size, basisPoints: (size / ((highest.price + lowest.price) / 2)) * 1e4 };
  }

  /** @returns {Quote | null} */
  #put({ symbol, exchange, price, timestamp }) {
    const quotes = this.quotes.get(symbol);
    const at = Date.parse(timestamp);
    const before = quotes?.get(exchange);
    if (!quotes || (before && before.at > at)) return null;
    const move = before ? Math.sign(price - before.price) || before.move : 0;
    const overall = this.newest(symbol);
    if (overall && at >= overall.at) {
      this.moves.set(symbol, Math.sign(price - overall.price) || (this.moves.get(symbol) ?? 0));
    }
    const quote = { symbol, exchange, price, at, arrival: this.arrivals, move };
    this.arrivals += 1;
    quotes.set(exchange, quote);
    return quote;
  }
}

/** What is known of the market: the newest price of each series, by what the stream tells. */

/** Age of a price from which on it is no longer taken for the market's. */
export const STALE_MS = 15_000;

/**
 * @typedef {{symbol: string, exchange: string, price: number, at: number, told: number, move: number}} Quote
 * `at`: Unix ms by the exchange's clock; `told`: how many were told before it; `move`: -1, 0 or 1, against the price before.
 * @typedef {{highest: Quote, lowest: Quote, size: number, basisPoints: number}} Spread
 */

/**
 * Oldest first; of one moment, in the order in which they were told.
 * @param {Iterable<Quote>} quotes
 */
export function inOrder(quotes) {
  return [...quotes].sort((one, other) => one.at - other.at || one.told - other.told);
}

/** Events: `replaced` (everything is new) and `prices` (`detail`: quotes that are new). */
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
    this.told = 0;
    /** How far the server's clock is ahead of this one's, in ms. */
    this.ahead = 0;
  }

  /** @param {{mode: string, symbols: string[], exchanges: string[], prices: any[]}} snapshot */
  replace(snapshot) {
    this.mode = snapshot.mode;
    this.symbols = snapshot.symbols;
    this.exchanges = snapshot.exchanges;
    this.moves.clear();
    this.quotes = new Map(snapshot.symbols.map((symbol) => [symbol, new Map()]));
    for (const told of snapshot.prices) this.#take(told);
    this.dispatchEvent(new CustomEvent("replaced"));
  }

  /** @param {any[]} prices as the stream has them */
  update(prices) {
    const quotes = prices.map((told) => this.#take(told)).filter((quote) => quote !== null);
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
   * @param {string} [exchange] nothing is all
   * @returns {Quote | null}
   */
  newest(symbol, exchange = "") {
    const quotes = this.quotes.get(symbol);
    if (!quotes) return null;
    if (exchange) return quotes.get(exchange) ?? null;
    return inOrder(quotes.values()).at(-1) ?? null;
  }

  /**
   * What lies between the exchanges; only between prices that are not stale, and null below two of those.
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
  #take({ symbol, exchange, price, timestamp }) {
    const quotes = this.quotes.get(symbol);
    const at = Date.parse(timestamp);
    const before = quotes?.get(exchange);
    if (!quotes || (before && before.at > at)) return null;
    const move = before ? Math.sign(price - before.price) || before.move : 0;
    const overall = this.newest(symbol);
    if (overall && at >= overall.at) {
      this.moves.set(symbol, Math.sign(price - overall.price) || (this.moves.get(symbol) ?? 0));
    }
    const quote = { symbol, exchange, price, at, told: this.told, move };
    this.told += 1;
    quotes.set(exchange, quote);
    return quote;
  }
}

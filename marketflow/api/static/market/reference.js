/** The reference price of a symbol: the median of its newest prices on all exchanges that have a fresh one. */

/** Age from which a price is stale, and no longer counts. */
export const STALE_MS = 15_000;

/** @typedef {{price: number, exchanges: number, at: number}} ReferencePrice `at`: newest event time among them, Unix ms */

/**
 * The rule of GET /prices/reference/{symbol}; null if no price is fresh.
 * @param {Iterable<{price: number, at: number}>} quotes one an exchange
 * @param {number} now the server's time, Unix ms
 * @returns {ReferencePrice | null}
 */
export function referencePrice(quotes, now) {
  const fresh = [...quotes].filter(({ at }) => at >= now - STALE_MS);
  if (fresh.length === 0) return null;
  return { price: median(fresh.map(({ price }) => price)), exchanges: fresh.length, at: Math.max(...fresh.map(({ at }) => at)) };
}

/** @param {number[]} prices */
function median(prices) {
  prices.sort((one, other) => one - other);
  const middle = prices.length >> 1;
  if (prices.length % 2) return prices[middle];
  // The mean of two has digits that neither has.
  return Number(((prices[middle - 1] + prices[middle]) / 2).toPrecision(14));
}

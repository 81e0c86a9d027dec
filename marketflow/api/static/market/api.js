/** Requests to the API, and what goes wrong with them. */

const PATIENCE_MS = 15_000;

/** A request that was not answered as asked; `message` is for people, `status` 0 where there was no answer. */
export class Refusal extends Error {
  /** @param {number} status @param {string} code @param {string} detail */
  constructor(status, code, detail) {
    super(detail);
    this.status = status;
    this.code = code;
  }
}

/**
 * The answer, as JSON has it.
 * @param {string} path relative to the page
 * @param {{method?: string, token?: string, signal?: AbortSignal}} [options]
 * @returns {Promise<any>}
 * @throws {Refusal}
 * @throws {DOMException} AbortError, if `signal` says so
 */
export async function ask(path, { method = "GET", token = "", signal } = {}) {
  const patience = AbortSignal.timeout(PATIENCE_MS);
  let answer;
  try {
    answer = await fetch(path, {
      method,
      // Candles may be kept for a minute, in which the mode can have changed: ask whether they are still those.
      cache: "no-cache",
      headers: token ? { Authorization: `Bearer ${token}` } : {},
      signal: signal ? AbortSignal.any([signal, patience]) : patience,
    });
    if (answer.ok) return await answer.json();
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Refusal(0, "unreachable", "MarketFlow does not answer.");
  }
  const problem = await answer.json().catch(() => ({}));
  throw new Refusal(answer.status, problem.code ?? "", problem.detail ?? `The answer was ${answer.status}.`);
}

/**
 * A path of names, on one exchange or over all.
 * @param {string} beginning
 * @param {string} symbol
 * @param {string} exchange nothing is all
 */
export function pathOf(beginning, symbol, exchange) {
  const names = exchange ? [exchange, symbol] : [symbol];
  return [beginning, ...names.map(encodeURIComponent)].join("/");
}

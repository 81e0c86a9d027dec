/** Requests to the API, and their errors. */

const TIMEOUT_MS = 15_000;

/** A failed request; `message` is shown to the user, `status` is 0 without a response. */
export class Refusal extends Error {
  /** @param {number} status @param {string} code @param {string} detail */
  constructor(status, code, detail) {
    super(detail);
    this.status = status;
    this.code = code;
  }
}

/**
 * Request JSON.
 * @param {string} path relative to the page
 * @param {{method?: string, token?: string, body?: object, signal?: AbortSignal}} [options] `body`: sent as JSON
 * @returns {Promise<any>}
 * @throws {Refusal}
 * @throws {DOMException} AbortError, if `signal` is aborted
 */
export async function ask(path, { method = "GET", token = "", body, signal } = {}) {
  const timeout = AbortSignal.timeout(TIMEOUT_MS);
  let answer;
  try {
    answer = await fetch(path, {
      method,
      // Revalidate: candles may be cached for a minute, in which the mode can change.
      cache: "no-cache",
      headers: {
        ...(token ? { Authorization: `Bearer ${token}` } : {}),
        ...(body ? { "Content-Type": "application/json" } : {}),
      },
      body: body ? JSON.stringify(body) : undefined,
      signal: signal ? AbortSignal.any([signal, timeout]) : timeout,
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
 * Path of a symbol, on one exchange or over all.
 * @param {string} beginning
 * @param {string} symbol
 * @param {string} exchange all if empty
 */
export function pathOf(beginning, symbol, exchange) {
  const names = exchange ? [exchange, symbol] : [symbol];
  return [beginning, ...names.map(encodeURIComponent)].join("/");
}

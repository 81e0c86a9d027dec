/** The bearer token that was entered, which lives as long as this tab. */

const KEY = "marketflow.token";

export function rememberedToken() {
  try {
    return sessionStorage.getItem(KEY) ?? "";
  } catch {
    return "";
  }
}

/** @param {string} token */
export function rememberToken(token) {
  try {
    if (token) sessionStorage.setItem(KEY, token);
    else sessionStorage.removeItem(KEY);
  } catch {
    // It is asked for again.
  }
}

/** Why a text is no token, else an empty text. @param {string} text */
export function tokenProblem(text) {
  // No header can hold anything else.
  return /[^\x20-\x7e]/.test(text) ? "A token has only ASCII letters, digits and signs." : "";
}

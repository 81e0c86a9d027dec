/** The mode that runs, and the switch, which asks before it changes what everybody sees. */

import { ask } from "./api.js";
import { byId, make, say } from "./dom.js";
import { rememberedToken, rememberToken, tokenProblem } from "./token.js";

const MEANINGS = {
  test: "Prices are then generated, for all users of this MarketFlow, and the exchanges are disconnected.",
  live: "Prices then come from the configured exchanges, for all users of this MarketFlow.",
};

export class ModeSwitch {
  constructor() {
    this.buttons = [...byId("modes").querySelectorAll("button")];
    this.dialog = byId("switch");
    this.form = this.dialog.querySelector("form");
    this.wanted = "";
    this.busy = false;
    /** @type {AbortController | null} of the question which exchanges answer */
    this.asking = null;
    for (const button of this.buttons) button.addEventListener("click", () => this.#offer(button.dataset.mode));
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#switch();
    });
    byId("switch-cancel").addEventListener("click", () => this.dialog.close());
    this.dialog.addEventListener("click", (event) => {
      if (event.target === this.dialog && !this.busy) this.dialog.close();
    });
    // A request cannot be cancelled. Browsers close a dialog at the second Escape, even if `cancel` is prevented.
    document.addEventListener("keydown", (event) => this.busy && event.key === "Escape" && event.preventDefault());
    this.dialog.addEventListener("cancel", (event) => this.busy && event.preventDefault());
    this.dialog.addEventListener("close", () => this.#clear());
  }

  /** @param {string} mode the one that runs */
  show(mode) {
    for (const button of this.buttons) {
      button.setAttribute("aria-pressed", String(button.dataset.mode === mode));
      button.disabled = false;
    }
    document.body.dataset.mode = mode;
    if (this.dialog.open && mode === this.wanted) this.dialog.close();
  }

  /** @param {string} mode */
  #offer(mode) {
    if (document.body.dataset.mode === mode || this.busy) return;
    this.wanted = mode;
    say(byId("switch-title"), `Switch to ${mode} mode?`);
    say(byId("switch-text"), MEANINGS[mode]);
    say(byId("switch-problem"), "");
    byId("switch-token").hidden = true;
    this.dialog.showModal();
    byId("switch-do").focus();
    this.#showExchanges();
  }

  /** Which exchanges the live mode would get prices from. */
  async #showExchanges() {
    const list = byId("switch-exchanges");
    list.hidden = this.wanted !== "live";
    this.asking?.abort();
    if (list.hidden) return;
    const { signal } = (this.asking = new AbortController());
    list.replaceChildren(make("li", {}, "Asking the exchanges …"));
    const lines = await ask("feeds/reachability", { signal }).then(({ exchanges }) => exchanges.map(answerOf), () => []);
    // Without an answer the switch is possible all the same.
    if (!signal.aborted) list.replaceChildren(...lines);
  }

  async #switch() {
    const written = this.form.elements.token.value.trim();
    const token = written || rememberedToken();
    if (tokenProblem(token)) {
      this.#complain(tokenProblem(token));
      return;
    }
    this.#busy(true);
    say(byId("switch-problem"), "");
    try {
      await ask(`mode/${this.wanted}`, { method: "POST", token });
      rememberToken(token);
      this.dialog.close();
    } catch (problem) {
      this.#refused(problem, token);
    } finally {
      this.#busy(false);
    }
  }

  /** @param {any} problem @param {string} token the one that was sent */
  #refused(problem, token) {
    if (problem.status !== 401) {
      say(byId("switch-problem"), `The mode was not switched. ${problem.message}`);
      return;
    }
    rememberToken("");
    byId("switch-token").hidden = false;
    this.#complain(token ? "This token is not the right one." : "Switching the mode needs the token of this MarketFlow.");
  }

  /** @param {string} problem of the token */
  #complain(problem) {
    say(byId("switch-problem"), problem);
    this.form.elements.token.select();
    this.form.elements.token.focus();
  }

  /** @param {boolean} busy */
  #busy(busy) {
    this.busy = busy;
    const button = byId("switch-do");
    button.disabled = busy;
    byId("switch-cancel").disabled = busy;
    say(button, busy ? "Switching …" : "Switch");
  }

  #clear() {
    this.asking?.abort();
    this.form.reset();
    const pressed = this.buttons.find((button) => button.dataset.mode === this.wanted);
    pressed?.focus();
  }
}

/** @param {{exchange: string, address: string, reachable: boolean, error: string | null}} found */
function answerOf({ exchange, address, reachable, error }) {
  const state = make("span", { class: "state" }, reachable ? "answers" : "does not answer");
  const trouble = make("span", { class: "trouble" }, [address, error].filter(Boolean).join(" · "));
  return make("li", { "data-level": reachable ? "good" : "bad" }, make("span", { class: "name" }, exchange), state, trouble);
}

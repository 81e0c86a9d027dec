/** Alerts: events as they come, rules about prices that are made and removed here, and notifications of the browser. */

import { ask } from "./api.js";
import { byId, make, say, sayTime } from "./dom.js";
import { decimalsFor, moment, price, utc } from "./format.js";
import { rememberedToken, rememberToken, tokenProblem } from "./token.js";

/** Events that are shown, and rules. */
const EVENTS = 50;
const RULES = 200;

/** How long until rules and events that could not be read are asked for again. */
const AGAIN_MS = 3_000;

const NOTIFY = "marketflow.notify";

export class Alerts {
  /**
   * @param {import("./market.js").Market} market
   * @param {import("./choice.js").Choice} choice
   * @param {import("./stream.js").Stream} stream
   */
  constructor(market, choice, stream) {
    this.market = market;
    this.choice = choice;
    this.form = byId("alert-form");
    this.events = byId("alert-events");
    /** @type {number | null} number of the newest event that is shown; null before the first look */
    this.newest = null;
    this.unseen = 0;
    this.again = 0;
    this.usable = false; // as far as known PostgreSQL, which has rules and events, can be read
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#add();
    });
    choice.addEventListener("change", (event) => event.detail.has("symbol") && this.#suggest());
    stream.addEventListener("snapshot", ({ detail }) => this.#restartWith(detail.health));
    stream.addEventListener("health", ({ detail }) => this.usable || this.#restartWith(detail));
    stream.addEventListener("alert", ({ detail }) => this.#take([detail]));
    document.querySelector(".alerts .collapse").addEventListener("click", () => this.#seen());
    this.notify = byId("alerts-notify");
    this.notify.hidden = !("Notification" in window);
    this.notify.addEventListener("click", () => this.#askForNotifications());
    this.#showNotify();
  }

  /** @param {any} health of now */
  #restartWith(health) {
    this.usable = health.postgres === "ok";
    this.#suggest();
    if (this.usable) this.#restart();
  }

  /**
   * What came while there was no connection, and the rules of now; again and again until they can be read, and once more:
   * after an outage of PostgreSQL the stream begins a little later.
   */
  async #restart(last = false) {
    clearTimeout(this.again);
    try {
      const after = this.newest === null ? "" : `&after=${this.newest}`;
      const { events } = await ask(`events/alerts?limit=${EVENTS}${after}`);
      this.newest ??= 0;
      if (after) this.#take(events);
      else this.#show(events);
      await this.#showRules();
      this.#complain("");
      if (!last) this.again = setTimeout(() => this.#restart(true), AGAIN_MS);
    } catch (problem) {
      this.#complain(problem.message);
      this.again = setTimeout(() => this.#restart(), AGAIN_MS);
    }
  }

  /** Events of now. @param {any[]} events */
  #take(events) {
    const newer = events.filter(({ number }) => number > (this.newest ?? 0));
    if (this.newest === null || newer.length === 0) return;
    this.#show(newer);
    for (const { event } of newer) this.#notifyOf(event);
    this.unseen += newer.length;
    this.#seen();
    this.#showRules().catch(() => {});
  }

  /** @param {any[]} events oldest first */
  #show(events) {
    for (const { number, event } of events) {
      this.newest = Math.max(this.newest ?? 0, number);
      const at = Date.parse(event.timestamp);
      const time = make("time");
      sayTime(time, moment(at), utc(at));
      this.events.prepend(make("li", { "data-kind": event.kind }, time, make("span", { class: "text" }, event.name ? `${event.name}: ${event.text}` : event.text)));
    }
    while (this.events.children.length > EVENTS) this.events.lastElementChild.remove();
    byId("alerts-none").hidden = this.events.children.length > 0;
  }

  /** A collapsed panel says how many events have come. */
  #seen() {
    const collapsed = byId("alerts-title").closest(".panel").classList.contains("collapsed");
    if (!collapsed) this.unseen = 0;
    say(byId("alerts-count"), this.unseen ? `${this.unseen} new` : "");
  }

  // Rules

  async #showRules() {
    const { rules } = await ask(`alerts?limit=${RULES}`);
    byId("alert-rules").replaceChildren(...rules.map((/** @type {any} */ each) => this.#rule(each)));
  }

  /** @param {any} stored as in `rules` of GET /alerts */
  #rule({ id, origin, rule, done }) {
    const text = make("span", { class: "text" }, `${rule.name ? `${rule.name}: ` : ""}${textOf(rule)}${done ? " (has been)" : ""}`);
    if (origin === "settings") return make("li", {}, text, make("span", { class: "count", title: "It can be changed there alone" }, "from the settings"));
    const button = make("button", { type: "button", "aria-label": `Remove: ${textOf(rule)}` }, "Remove");
    button.addEventListener("click", () => this.#change(`alerts/${encodeURIComponent(id)}`, { method: "DELETE" }));
    return make("li", {}, text, button);
  }

  /** The price of now, to start from, unless one was written. */
  #suggest() {
    const { level } = this.form.elements;
    say(byId("alert-symbol"), this.choice.symbol);
    const now = this.market.shown(this.choice.symbol, "");
    if (now && (!level.value || level.dataset.suggested === level.value)) {
      level.value = level.dataset.suggested = now.price.toFixed(Math.min(decimalsFor(now.price), 12));
    }
  }

  async #add() {
    const { level, direction } = this.form.elements;
    const rule = { kind: "price", symbol: this.choice.symbol, exchange: "reference", level: Number(level.value), direction: direction.value };
    await this.#change("alerts", { method: "POST", body: rule });
  }

  /** @param {string} path @param {{method: string, body?: object}} request */
  async #change(path, request) {
    const field = byId("alerts-token");
    const token = this.form.elements.token.value.trim() || rememberedToken();
    if (tokenProblem(token)) {
      this.#complain(tokenProblem(token));
      return;
    }
    try {
      await ask(path, { ...request, token });
      rememberToken(token);
      field.hidden = true;
      this.form.elements.token.value = "";
      this.#complain("");
      await this.#showRules();
    } catch (problem) {
      if (problem.status === 401) {
        rememberToken("");
        field.hidden = false;
        this.form.elements.token.focus();
        this.#complain(token ? "This token is not the right one." : "Changing alerts needs the token of this MarketFlow.");
      } else {
        this.#complain(problem.message);
      }
    }
  }

  /** @param {string} text */
  #complain(text) {
    say(byId("alerts-problem"), text);
  }

  // Notifications

  async #askForNotifications() {
    const wanted = !wantsNotifications();
    if (wanted && Notification.permission !== "granted" && (await Notification.requestPermission()) !== "granted") {
      this.#complain("This browser does not allow notifications of this page.");
      return;
    }
    rememberNotifications(wanted);
    this.#showNotify();
  }

  #showNotify() {
    const on = !this.notify.hidden && wantsNotifications() && Notification.permission === "granted";
    this.notify.setAttribute("aria-pressed", String(on));
  }

  /** @param {any} event */
  #notifyOf(event) {
    if (this.notify.getAttribute("aria-pressed") !== "true") return;
    try {
      // Of all tabs and reconnects one is shown.
      new Notification(event.name || "MarketFlow", { body: event.text, tag: event.id });
    } catch {
      // Some phones have notifications only for pages that are installed; the event is in the list.
    }
  }
}

/** A rule in words. @param {any} rule */
function textOf(rule) {
  const place = rule.exchange === "reference" ? "" : ` on ${rule.exchange ?? "any exchange"}`;
  const way = { up: "rises to", down: "falls to", either: "reaches" }[rule.direction ?? "either"];
  const move = { up: "rises by", down: "falls by", either: "moves by" }[rule.direction ?? "either"];
  switch (rule.kind) {
    case "price": return `${rule.symbol} ${way} ${price(rule.level, decimalsFor(rule.level))}${place}`;
    case "change": return `${rule.symbol} ${move} ${rule.percent} % in ${rule.period}${place}`;
    case "gap": return `gap of ${rule.symbol} over ${rule.basis_points} bp`;
    case "stale": return `${rule.exchange ?? "any exchange"} is stale`;
    case "hole": return `${[rule.symbol, "trades are missing"].filter(Boolean).join(": ")}${place}`;
    default: return rule.kind;
  }
}

function wantsNotifications() {
  try {
    return localStorage.getItem(NOTIFY) === "yes";
  } catch {
    return false;
  }
}

/** @param {boolean} wanted */
function rememberNotifications(wanted) {
  try {
    if (wanted) localStorage.setItem(NOTIFY, "yes");
    else localStorage.removeItem(NOTIFY);
  } catch {
    // It holds until the page is closed.
  }
}

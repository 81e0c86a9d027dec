/** How feeds and stores do, as /health has it; of a feed that brings nothing what is wrong, and what helps. */

import { byId, make, say } from "./dom.js";
import { moment } from "./format.js";

/** What a state means, and how well that is. */
const STATES = {
  connected: ["good", "Ticks come in"],
  generated: ["good", "Prices are generated here, for tests"],
  connecting: ["bad", "There is no connection; it is tried again and again"],
  halted: ["good", "The venue does not trade now, by its own word"],
  stale: ["poor", "It is connected and sends nothing that can be used"],
  ok: ["good", "It answers"],
  down: ["bad", "It does not answer; MarketFlow goes on without it and makes good what it missed"],
};

const STORES = { postgres: "PostgreSQL", redis: "Redis" };

/** An address of this machine: its port. */
const LOCAL = /^(?:127\.\d+\.\d+\.\d+|localhost|\[::1\]):(\d+)$/;

/** While disconnected the style sheet greys the last known states. */
export function showHealthUnknown() {
  say(byId("health-summary"), "unknown while disconnected");
  byId("health-summary").dataset.level = "unknown";
}

/** How many feeds bring prices, and how many there are. @param {any} health */
export function feedsOf(health) {
  const states = Object.values(health.exchanges);
  return { good: states.filter((state) => STATES[state]?.[0] === "good").length, all: states.length };
}

export class Health {
  /** @param {import("./market.js").Market} market */
  constructor(market) {
    this.market = market;
    /** @type {any} */
    this.health = null;
    /** @type {Map<string, {since: number, exact: boolean}>} feeds that bring nothing; `exact`: it was seen to begin */
    this.down = new Map();
    /** @type {Map<string, HTMLElement>} what is said of each of them */
    this.notes = new Map();
    setInterval(() => this.#showNotes(), 1000);
  }

  /** @param {any} health */
  show(health) {
    this.#remember(health);
    this.health = health;
    const feeds = Object.entries(health.exchanges).map(([name, state]) => this.#feed(name, state));
    byId("feeds").replaceChildren(...feeds);
    byId("stores").replaceChildren(...Object.entries(STORES).map(([key, name]) => item(name, health[key])));
    const well = health.status === "ok";
    say(byId("health-summary"), well ? "all well" : "degraded");
    byId("health-summary").dataset.level = well ? "good" : "bad";
    this.#showNotes();
    this.#showHelp();
  }

  /** @param {any} health */
  #remember(health) {
    const known = this.health?.mode === health.mode;
    for (const name of [...this.down.keys()]) if (!known || isGood(health.exchanges[name])) this.down.delete(name);
    for (const [name, state] of Object.entries(health.exchanges)) {
      if (isGood(state) || this.down.has(name)) continue;
      const failed = Date.parse(health.feeds?.[name]?.error_at ?? "");
      this.down.set(name, known ? { since: this.market.now(), exact: true } : { since: failed || this.market.now(), exact: false });
    }
  }

  /** @param {string} name @param {any} state */
  #feed(name, state) {
    const element = item(name, state);
    this.notes.delete(name);
    if (this.health.feeds?.[name]) {
      const note = make("span", { class: "trouble" });
      this.notes.set(name, note);
      element.append(note);
    }
    return element;
  }

  #showNotes() {
    for (const [name, note] of this.notes) {
      const feed = this.health.feeds?.[name];
      if (feed) say(note, [feed.address, ...this.#trouble(name, feed)].join(" · "));
    }
  }

  /** @param {string} name @param {any} feed as in `feeds` of /health */
  #trouble(name, feed) {
    const parts = [];
    const down = this.down.get(name);
    if (feed.error) parts.push(feed.error);
    if (down) parts.push(`since ${moment(down.since)}${down.exact ? "" : " or longer"}`);
    if (down && feed.next_try_at) parts.push(`next try ${inSeconds(Date.parse(feed.next_try_at) - this.market.now())}`);
    if (feed.absent.length) parts.push(`does not have ${feed.absent.join(", ")}`);
    return parts;
  }

  /** What to do about a live mode without any feed. */
  #showHelp() {
    const place = byId("no-feeds");
    place.hidden = this.health.mode !== "live" || feedsOf(this.health).good > 0;
    if (place.hidden) return;
    const addresses = Object.values(this.health.feeds ?? {}).map(({ address }) => address);
    const ports = addresses.flatMap((address) => LOCAL.exec(address)?.[1] ?? []);
    const lines = [["What each exchange answers:", "marketflow check"], ["Prices of venues:", "marketflow --venues binance,kraken"]];
    if (ports.length) lines.push(["A simulated exchange at an address of this machine:", `marketflow exchange --port ${ports[0]}`]);
    place.replaceChildren(
      make("p", {}, "No feed of the live mode is connected; each is tried again and again."),
      make("ul", {}, ...lines.map(([text, command]) => make("li", {}, `${text} `, make("code", {}, command)))),
    );
  }
}

/** @param {any} state */
const isGood = (state) => state === undefined || STATES[state]?.[0] === "good";

/** @param {number} ms */
function inSeconds(ms) {
  const seconds = Math.ceil(ms / 1000);
  return seconds > 0 ? `in ${seconds}\u202fs` : "now";
}

/** @param {string} name @param {any} state */
function item(name, state) {
  const [level, meaning] = STATES[state] ?? ["poor", ""];
  return make("li", { "data-level": level, title: meaning }, make("span", { class: "name" }, name), make("span", { class: "state" }, state));
}

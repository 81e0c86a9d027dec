/** How feeds and stores do, as /health has it. */

import { byId, make, say } from "./dom.js";

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

/** While disconnected the style sheet greys the last known states. */
export function showHealthUnknown() {
  say(byId("health-summary"), "unknown while disconnected");
  byId("health-summary").dataset.level = "unknown";
}

/** Whether any feed of the mode brings prices. @param {any} health */
export const isFed = (health) => Object.values(health.exchanges).some((state) => state === "connected" || state === "generated");

/** @param {any} health */
export function showHealth(health) {
  fill(byId("feeds"), Object.entries(health.exchanges));
  fill(byId("stores"), Object.entries(STORES).map(([key, name]) => [name, health[key]]));
  const well = health.status === "ok";
  say(byId("health-summary"), well ? "all well" : "degraded");
  byId("health-summary").dataset.level = well ? "good" : "bad";
}

/** @param {HTMLElement} list @param {[string, any][]} states */
function fill(list, states) {
  list.replaceChildren(...states.map(([name, state]) => {
    const [level, meaning] = STATES[state] ?? ["poor", ""];
    const word = make("span", { class: "state" }, state);
    return make("li", { "data-level": level, title: meaning }, make("span", { class: "name" }, name), word);
  }));
}

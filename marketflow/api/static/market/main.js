/** Puts the page together: one stream, one market, and the parts that show it. */

import { Alerts } from "./alerts.js";
import { ChartPanel } from "./chartpanel.js";
import { Choice } from "./choice.js";
import { Comparison } from "./comparison.js";
import { Connection } from "./connection.js";
import { DayVolume } from "./dayvolume.js";
import { byId, inFrames, say } from "./dom.js";
import { price } from "./format.js";
import { feedsOf, Health, showHealthUnknown } from "./health.js";
import { offerKeys } from "./keys.js";
import { Lines } from "./lines.js";
import { Market } from "./market.js";
import { ModeSwitch } from "./mode.js";
import { offerCollapsing, shadeEdges } from "./panels.js";
import { Period } from "./period.js";
import { Stream } from "./stream.js";
import { Table } from "./table.js";
import { offerColours } from "./theme.js";
import { offerZone } from "./zone.js";

const market = new Market();
const choice = new Choice();
const stream = new Stream("ws?max_rate=4&alerts=true");
const modes = new ModeSwitch();
const connection = new Connection(stream);
const healthPanel = new Health(market);
const table = new Table(market, choice);
new Comparison(market, choice);
const period = new Period(market, choice);
const dayVolume = new DayVolume(market, choice);
const lines = new Lines(market, choice);
const chart = new ChartPanel(market, choice);
offerColours(byId("theme"), () => {
  lines.colour();
  chart.colour();
});
offerZone(byId("zone"), () => {
  chart.showZone();
  period.show();
  dayVolume.show();
});
offerKeys();
offerCollapsing();
new Alerts(market, choice, stream);
shadeEdges(document.querySelector(".scroller"));

table.addEventListener("drawn", () => { document.body.dataset.opened = ""; });
stream.addEventListener("snapshot", ({ detail }) => {
  modes.show(detail.mode);
  market.replace(detail);
  updateHealth(detail.health);
  chart.offer();
  settle();
  showChoice();
  chart.resume();
  period.restart();
  dayVolume.restart();
});
stream.addEventListener("prices", ({ detail }) => market.update(detail.prices));
stream.addEventListener("mode", ({ detail }) => modes.show(detail.mode));
stream.addEventListener("health", ({ detail }) => updateHealth(detail));
stream.addEventListener("state", ({ detail }) => {
  if (detail.state === "lost") showHealthUnknown();
});
stream.addEventListener("heartbeat", ({ detail }) => market.setClock(detail.timestamp));
choice.addEventListener("change", () => {
  settle();
  showChoice();
});
setInterval(inFrames(() => {
  period.showNow();
  showTitle();
}), 1000);

/** @param {any} health */
function updateHealth(health) {
  healthPanel.show(health);
  connection.feed(feedsOf(health));
}

/** What was chosen in an address need not be there: another MarketFlow may have other names. */
function settle() {
  const { symbols, exchanges } = market;
  const exactly = (/** @type {string[]} */ names, /** @type {string} */ name) =>
    names.find((each) => each.toLowerCase() === name.toLowerCase());
  const symbol = exactly(symbols, choice.symbol) ?? symbols[0] ?? "";
  const exchange = exactly(exchanges, choice.exchange) ?? "";
  if (symbols.length && (symbol !== choice.symbol || exchange !== choice.exchange)) choice.choose({ symbol, exchange });
}

function showChoice() {
  const { symbol, exchange } = choice;
  for (const place of document.querySelectorAll("[data-about]")) {
    const whole = place.closest(".comparison") || !exchange;
    say(place, whole ? symbol : `${symbol} · ${exchange}`);
  }
  showTitle();
}

function showTitle() {
  const now = market.shown(choice.symbol, choice.exchange);
  const lost = document.body.dataset.connection === "lost";
  const shown = now ? `${price(now.price)}${now.stale ? " (stale)" : ""}` : "";
  const title = [lost ? "Disconnected" : shown, choice.symbol, "MarketFlow"].filter(Boolean).join(" · ");
  if (document.title !== title) document.title = title;
}

arrange();
stream.open();

/**
 * On a phone the chart is first, and it follows the prices where there is one column otherwise, so that the order of the Tab
 * key is that of the eye.
 */
function arrange() {
  const [narrow, phone] = ["(max-width: 1179px)", "(max-width: 679px)"].map((query) => window.matchMedia(query));
  const main = document.querySelector("main");
  const [prices, panel, aside] = [".market", ".chart", ".aside"].map((name) => document.querySelector(name));
  const place = () => {
    let order = [prices, aside, panel];
    if (phone.matches) order = [panel, prices, aside];
    else if (narrow.matches) order = [prices, panel, aside];
    if (order.every((each, n) => each === main.children[n])) return;
    const focused = /** @type {HTMLElement} */ (document.activeElement);
    main.append(...order);
    focused.focus({ preventScroll: true }); // which is lost where an element is moved
  };
  for (const query of [narrow, phone]) query.addEventListener("change", place);
  place();
}

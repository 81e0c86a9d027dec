/** State of the connection: in the header how many feeds bring prices, and a banner while disconnected. */
import { byId, say } from "./dom.js";

const WORDS = { connecting: "Connecting", open: "", lost: "Disconnected" };

export class Connection {
  /** @param {import("./stream.js").Stream} stream */
  constructor(stream) {
    this.banner = byId("banner");
    this.retryAt = 0;
    this.reason = "";
    this.everOpen = false;
    this.feeds = { good: 0, all: 0 };
    stream.addEventListener("state", (event) => this.#show(event.detail));
    byId("banner-retry").addEventListener("click", () => stream.retry());
    setInterval(() => this.#count(), 250);
  }

  /** @param {{state: string, reason?: string, retryAt?: number, failures?: number}} state */
  #show({ state, reason = "", retryAt = 0, failures = 0 }) {
    // While reconnecting it stays "lost", so that the banner does not flicker.
    const shown = state === "connecting" && failures > 0 ? "lost" : state;
    document.body.dataset.connection = shown;
    this.#showWord();
    this.banner.hidden = shown !== "lost";
    this.retryAt = retryAt;
    this.reason = reason || this.reason;
    this.everOpen ||= state === "open";
    if (shown === "lost") say(byId("banner-text"), `${this.reason} ${this.everOpen ? "Showing the last known prices." : ""}`);
    this.#count();
  }

  /** @param {{good: number, all: number}} feeds those that bring prices, and all */
  feed(feeds) {
    this.feeds = feeds;
    this.#showWord();
  }

  #showWord() {
    const { connection } = document.body.dataset;
    const { good, all } = this.feeds;
    document.body.dataset.fed = good === 0 ? "none" : good < all ? "some" : "all";
    say(document.querySelector("#connection .word"), WORDS[connection] || `${good} of ${all} feeds`);
  }

  #count() {
    if (this.banner.hidden) return;
    const seconds = Math.ceil((this.retryAt - performance.now()) / 1000);
    say(byId("banner-countdown"), seconds > 0 ? `Trying again in ${seconds} s.` : "Reconnecting …");
    byId("banner-retry").disabled = seconds <= 0;
  }
}

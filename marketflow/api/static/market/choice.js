/** The selected symbol, exchange, interval, period and overlays, kept in the URL so that it can be reloaded and shared. */

const DEFAULTS = { symbol: "", exchange: "", interval: "1m", period: "5m", overlays: "" };

/** Event `change`: `detail` is the set of names that are other than before. */
export class Choice extends EventTarget {
  constructor() {
    super();
    this.values = read();
    window.addEventListener("hashchange", () => this.#become(read()));
  }

  get symbol() { return this.values.symbol; }
  get exchange() { return this.values.exchange; }
  get interval() { return this.values.interval; }
  get period() { return this.values.period; }
  get overlays() { return this.values.overlays.split(".").filter(Boolean); }

  /** @param {Partial<typeof DEFAULTS>} changes */
  choose(changes) {
    const values = { ...this.values, ...changes };
    const changed = Object.entries(values).filter(([name, value]) => value !== DEFAULTS[name]);
    history.replaceState(null, "", `#${new URLSearchParams(changed)}`);
    this.#become(values);
  }

  /** @param {typeof DEFAULTS} values */
  #become(values) {
    const changed = new Set(Object.keys(values).filter((name) => values[name] !== this.values[name]));
    this.values = values;
    if (changed.size) this.dispatchEvent(new CustomEvent("change", { detail: changed }));
  }
}

/** @returns {typeof DEFAULTS} */
function read() {
  const parameters = new URLSearchParams(location.hash.slice(1));
  const known = [...parameters].filter(([name]) => name in DEFAULTS);
  return { ...DEFAULTS, ...Object.fromEntries(known) };
}

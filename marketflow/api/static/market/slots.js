/** Places on the time axis: one an interval, so that candles do not stand side by side where minutes are missing between them. */

/** Most places without a candle; with more, long gaps are cut short. */
const BLANKS = 5_000;

/** @typedef {{at: number, candle: import("./candles.js").Candle | null}} Slot `at`: Unix ms of its opening */

/**
 * @param {import("./candles.js").Candle[]} candles oldest first
 * @param {number} length of each in ms
 * @returns {Slot[]}
 */
export function slotsOf(candles, length) {
  const missing = candles.map(({ at }, index) => (index === 0 ? 0 : Math.max(0, Math.round((at - candles[index - 1].at) / length) - 1)));
  const gaps = missing.filter((count) => count > 0);
  const fits = gaps.reduce((sum, count) => sum + count, 0) <= BLANKS;
  const most = fits ? Infinity : Math.max(1, Math.floor(BLANKS / gaps.length));
  /** @type {Slot[]} */
  const slots = [];
  candles.forEach((candle, index) => {
    // The newest of a gap are left out where it is too long.
    for (let blank = 1; blank <= Math.min(missing[index], most); blank += 1) {
      slots.push({ at: candles[index - 1].at + blank * length, candle: null });
    }
    slots.push({ at: candle.at, candle });
  });
  return slots;
}

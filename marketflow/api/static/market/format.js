/** Numbers and times as people read them. */

import { zone } from "./zone.js";

const THIN = "\u202f"; // narrow, and no line breaks there
const NONE = "–";

/**
 * How many decimals a price of this size deserves: 100,000 two, 1 four, 0.08 six.
 * @param {number} price
 */
export function decimalsFor(price) {
  if (!(price > 0) || price >= 1000) return 2;
  if (price >= 1) return price >= 100 ? 3 : 4;
  return Math.min(12, 4 - Math.floor(Math.log10(price)));
}

/**
 * A price, thousands apart by thin spaces.
 * @param {number | null | undefined} value
 * @param {number} [decimals]
 */
export function price(value, decimals) {
  if (value == null || !Number.isFinite(value)) return NONE;
  if (Math.abs(value) >= 1e15) return value.toExponential(6);
  return grouped(value.toFixed(decimals ?? decimalsFor(Math.abs(value))));
}

/**
 * An amount: five digits at most, of large ones in thousands of millions or millions.
 * @param {number | null | undefined} value
 */
export function amount(value) {
  if (value == null || !Number.isFinite(value)) return NONE;
  if (value >= 1e9) return `${grouped((value / 1e9).toFixed(2))}${THIN}B`;
  if (value >= 1e6) return `${grouped((value / 1e6).toFixed(2))}${THIN}M`;
  if (value === 0) return "0";
  const decimals = Math.min(12, Math.max(0, 4 - Math.ceil(Math.log10(value))));
  const text = value.toFixed(decimals);
  return grouped(text.includes(".") ? text.replace(/\.?0+$/, "") : text);
}

/** @param {number} value */
export const count = (value) => grouped(String(Math.round(value)));

/**
 * Basis points, hundredths of a percent.
 * @param {number} value
 */
export const basisPoints = (value) => grouped(value.toFixed(Math.abs(value) < 100 ? 1 : 0));

/**
 * A change in percent, with its sign.
 * @param {number} share
 */
export function percent(share) {
  const text = (share * 100).toFixed(2);
  return `${share > 0 ? "+" : ""}${text.replace("-", "−")}${THIN}%`;
}

/**
 * How long ago, in the unit that matters.
 * @param {number} ms
 */
export function age(ms) {
  const seconds = Math.max(0, ms) / 1000;
  if (seconds < 2) return "now";
  if (seconds < 60) return `${Math.floor(seconds)}${THIN}s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)}${THIN}min`;
  if (seconds < 48 * 3600) return `${Math.floor(seconds / 3600)}${THIN}h`;
  return `${Math.floor(seconds / 86400)}${THIN}d`;
}

const MINUTE = /** @type {const} */ ({ hour: "2-digit", minute: "2-digit", hourCycle: "h23" });
const TIME = /** @type {const} */ ({ ...MINUTE, second: "2-digit" });
const DAY_AND_TIME = /** @type {const} */ ({ day: "numeric", month: "short", ...MINUTE });

/** @type {Map<string, Intl.DateTimeFormat>} made once: that takes longer than to use one */
const formats = new Map();

/** @param {number} ms @param {Intl.DateTimeFormatOptions} options */
function formatted(ms, options) {
  const key = JSON.stringify([options, zone()]);
  let format = formats.get(key);
  if (!format) formats.set(key, format = new Intl.DateTimeFormat(undefined, { ...options, timeZone: zone() }));
  return format.format(ms);
}

/**
 * Time of the chosen zone; with the day if that is another one.
 * @param {number} ms Unix
 */
export function moment(ms) {
  return formatted(ms, isToday(ms) ? TIME : DAY_AND_TIME);
}

/**
 * The same without seconds.
 * @param {number} ms Unix
 */
export function minute(ms) {
  return formatted(ms, isToday(ms) ? MINUTE : DAY_AND_TIME);
}

/**
 * The same in UTC, to the millisecond.
 * @param {number} ms Unix
 */
export const utc = (ms) => new Date(ms).toISOString().replace("T", " ").replace("Z", " UTC");

/**
 * Length of a period such as 1m30s in ms; infinite for `all`, null for what is none.
 * @param {string} text
 */
export function periodMs(text) {
  if (text === "all") return Infinity;
  if (!/^(\d{1,8}[smhd])+$/.test(text)) return null;
  const units = { s: 1e3, m: 6e4, h: 3.6e6, d: 8.64e7 };
  let sum = 0;
  for (const [, number, unit] of text.matchAll(/(\d+)([smhd])/g)) sum += Number(number) * units[unit];
  return sum >= 1e3 && sum <= 366 * units.d ? sum : null;
}

/** @param {number} ms */
function isToday(ms) {
  const day = /** @type {const} */ ({ day: "numeric", month: "numeric", year: "numeric" });
  return formatted(Date.now(), day) === formatted(ms, day);
}

/** @param {string} digits */
function grouped(digits) {
  const [whole, decimals] = digits.split(".");
  const apart = whole.replace(/\B(?=(\d{3})+$)/g, THIN);
  return (decimals === undefined ? apart : `${apart}.${decimals}`).replace("-", "−");
}

/** Little helpers for the document. Data becomes text, never markup. */

/** @param {string} id */
export const byId = (id) => /** @type {any} */ (document.getElementById(id));

/**
 * A new element.
 * @param {string} tag
 * @param {Record<string, string>} [attributes]
 * @param {...(Node | string)} children
 */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/**
 * A name that wraps after its punctuation and before its capitals.
 * @param {string} name
 */
export const wrapping = (name) => name.split(/(?<=[_.:/])|(?<=[a-z0-9])(?=[A-Z])/).flatMap((part, at) => (at ? [make("wbr"), part] : [part]));

/**
 * Sets a text, and leaves the document alone where it is there already.
 * @param {Element} element
 * @param {string} text
 */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/**
 * A moment as local time, with UTC to be pointed at.
 * @param {HTMLElement} element
 * @param {string} text
 * @param {string} title
 */
export function sayTime(element, text, title) {
  say(element, text);
  if (element.title !== title) element.title = title;
}

/** Four times a second is as fast as a price can be read. */
const PAUSE_MS = 250;

/** @type {Set<() => void>} */
const works = new Set();
let timer = 0;
let frame = 0;
let last = -Infinity;

/** Runs all that waits for a frame at once, beside something that cannot wait. */
export function drawNow() {
  clearTimeout(timer);
  cancelAnimationFrame(frame);
  timer = 0;
  const due = [...works];
  works.clear();
  last = performance.now();
  for (const work of due) work();
}

/** Not in a frame: the charts ask for one to draw, and in a frame that would be the next one, so that each change took two. */
function drawWhenSeen() {
  if (document.hidden) frame = requestAnimationFrame(drawNow);
  else drawNow();
}

/**
 * Runs something soon, however often it is asked for until then. All that waits runs together, so that all parts of the
 * page show the same moment.
 * @param {() => void} work
 */
export function inFrames(work) {
  return () => {
    works.add(work);
    if (timer) return;
    timer = setTimeout(drawWhenSeen, Math.max(0, last + PAUSE_MS - performance.now()));
  };
}

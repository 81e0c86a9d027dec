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

/**
 * Runs something in a frame soon, however often it is asked for until then, and at most every `pause` ms.
 * @param {() => void} work
 * @param {number} pause
 */
export function inFrames(work, pause) {
  let waiting = false;
  let last = -Infinity;
  const run = () => {
    waiting = false;
    last = performance.now();
    work();
  };
  return () => {
    if (waiting) return;
    waiting = true;
    // Frames are not counted down: an empty one costs as well.
    setTimeout(() => requestAnimationFrame(run), Math.max(0, last + pause - performance.now()));
  };
}

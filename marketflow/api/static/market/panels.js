/** Panels that can be collapsed, which a browser remembers; and shadows where a table goes on to the side. */

const KEY = "marketflow.collapsed";

/** Those that are collapsed until somebody opens them. */
const AT_FIRST = ["alerts-title"];

/** Makes a button of the title of each panel. */
export function offerCollapsing() {
  const collapsed = new Set(remembered());
  for (const panel of document.querySelectorAll(".panel")) {
    const title = panel.querySelector("h2");
    const button = document.createElement("button");
    button.type = "button";
    button.className = "collapse";
    button.append(...title.childNodes);
    title.append(button);
    const show = () => {
      const closed = collapsed.has(title.id);
      panel.classList.toggle("collapsed", closed);
      button.setAttribute("aria-expanded", String(!closed));
    };
    button.addEventListener("click", () => {
      if (!collapsed.delete(title.id)) collapsed.add(title.id);
      remember([...collapsed]);
      show();
    });
    show();
  }
}

/**
 * Says on the element around a table to which sides it goes on.
 * @param {HTMLElement} scroller
 */
export function shadeEdges(scroller) {
  const show = () => {
    const { scrollLeft, scrollWidth, clientWidth, scrollTop, scrollHeight, clientHeight } = scroller;
    const sides = [];
    if (scrollLeft > 1) sides.push("left");
    if (scrollLeft + clientWidth < scrollWidth - 1) sides.push("right");
    if (scrollTop + clientHeight < scrollHeight - 1) sides.push("bottom");
    scroller.parentElement.dataset.more = sides.join(" ");
  };
  scroller.addEventListener("scroll", show, { passive: true });
  const sizes = new ResizeObserver(show);
  sizes.observe(scroller);
  sizes.observe(scroller.firstElementChild);
}

/** @returns {string[]} */
function remembered() {
  try {
    const names = JSON.parse(localStorage.getItem(KEY) ?? "null");
    return Array.isArray(names) ? names : AT_FIRST;
  } catch {
    return AT_FIRST;
  }
}

/** @param {string[]} names */
function remember(names) {
  try {
    localStorage.setItem(KEY, JSON.stringify(names));
  } catch {
    // It holds until the page is closed.
  }
}

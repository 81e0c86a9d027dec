/** Light or dark: what the system prefers, until the user chooses. */

const KEY = "marketflow.colours";
const root = document.documentElement;
const preference = window.matchMedia("(prefers-color-scheme: dark)");

const current = () => root.dataset.colours ?? (preference.matches ? "dark" : "light");

/**
 * Lets a button switch the colours.
 * @param {HTMLButtonElement} button
 * @param {() => void} changed is called after the colours have changed, by whomever.
 */
export function offerColours(button, changed) {
  const show = () => {
    const other = current() === "dark" ? "light" : "dark";
    button.textContent = other === "dark" ? "Dark" : "Light";
    button.setAttribute("aria-label", `Switch to ${other} colours`);
    changed();
  };
  button.addEventListener("click", () => {
    const chosen = current() === "dark" ? "light" : "dark";
    root.dataset.colours = chosen;
    remember(chosen);
    show();
  });
  preference.addEventListener("change", show);
  show();
}

/** @param {string} chosen */
function remember(chosen) {
  try {
    localStorage.setItem(KEY, chosen);
  } catch {
    // It holds until the page is closed.
  }
}

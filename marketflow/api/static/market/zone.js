/** Local time or UTC, as the user has chosen. */

const KEY = "marketflow.zone";

let utcChosen = remembered();

/** The time zone of what is shown; undefined is the local one. */
export const zone = () => (utcChosen ? "UTC" : undefined);

/**
 * Lets a button switch between local time and UTC.
 * @param {HTMLButtonElement} button
 * @param {() => void} changed
 */
export function offerZone(button, changed) {
  const show = () => {
    button.textContent = utcChosen ? "UTC" : "Local";
    button.setAttribute("aria-label", `Times are ${utcChosen ? "UTC" : "local"}; show ${utcChosen ? "local time" : "UTC"}`);
    document.documentElement.dataset.zone = utcChosen ? "utc" : "local";
  };
  button.addEventListener("click", () => {
    utcChosen = !utcChosen;
    try {
      localStorage.setItem(KEY, utcChosen ? "utc" : "local");
    } catch {
      // It holds until the page is closed.
    }
    show();
    changed();
  });
  show();
}

function remembered() {
  try {
    return localStorage.getItem(KEY) === "utc";
  } catch {
    return false;
  }
}

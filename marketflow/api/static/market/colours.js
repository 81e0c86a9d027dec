// Runs before the first paint, so that a page that was chosen dark never flashes white.
"use strict";

try {
  const chosen = localStorage.getItem("marketflow.colours");
  if (chosen === "light" || chosen === "dark") {
    document.documentElement.dataset.colours = chosen;
  }
} catch {
  // A browser that stores nothing shows what the system prefers.
}

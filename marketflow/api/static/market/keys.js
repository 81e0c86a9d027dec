/** The list of keys, which `?` shows. */

import { byId } from "./dom.js";

export function offerKeys() {
  const dialog = byId("keys");
  byId("show-keys").addEventListener("click", () => dialog.showModal());
  byId("keys-close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (/** @type {MouseEvent} */ event) => event.target === dialog && dialog.close());
  document.addEventListener("keydown", (event) => {
    const writing = /** @type {Element} */ (event.target).closest?.("input, select, dialog");
    if (event.key !== "?" || event.ctrlKey || event.metaKey || event.altKey || writing) return;
    event.preventDefault();
    dialog.showModal();
  });
}

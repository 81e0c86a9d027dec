"use strict";

// Colours as the browser has them, also when that changes.
const dark = window.matchMedia("(prefers-color-scheme: dark)");
const follow = () => document.documentElement.classList.toggle("dark-mode", dark.matches);
dark.addEventListener("change", follow);
follow();

SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#api",
  deepLinking: true, // an operation can be linked to
  displayRequestDuration: true,
  defaultModelsExpandDepth: 0,
  validatorUrl: null, // no other server is asked
});

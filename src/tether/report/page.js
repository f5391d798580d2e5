"use strict";
// Draws every plot in the page's colours, and again when the reader's system turns light or dark.
const plots = JSON.parse(document.getElementById("plots").textContent);

function painted(value, style) {
  if (typeof value === "string") return value.startsWith("--") ? style.getPropertyValue(value).trim() : value;
  if (Array.isArray(value)) return value.map((item) => painted(item, style));
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, painted(item, style)]));
}

function draw() {
  const style = getComputedStyle(document.documentElement);
  for (const [id, plot] of Object.entries(plots)) {
    const { data, layout } = painted(plot, style);
    Plotly.react(id, data, layout, { displayModeBar: false, responsive: true });
  }
}

draw();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);

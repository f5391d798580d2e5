"use strict";
// Draws every plot in the page's colors, and again when the reader's system turns light or dark.
const plots = JSON.parse(document.getElementById("plots").textContent);

function draw() {
  const style = getComputedStyle(document.documentElement);
  for (const [id, plot] of Object.entries(plots)) {
    const { data, layout } = painted(plot, style);
    Plotly.react(id, data, layout, { displayModeBar: false, responsive: true });
  }
}

draw();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);

// Draws score over KL of each evaluation in the page's colors.
function draw() {
  const style = getComputedStyle(document.documentElement);
  for (const place of document.querySelectorAll("[data-plot]")) {
    const { data, layout } = painted(JSON.parse(place.dataset.plot), style);
    Plotly.react(place, data, layout, { displayModeBar: false, responsive: true });
  }
}

draw();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);

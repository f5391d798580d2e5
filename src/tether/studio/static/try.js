// The answers as they are written.
const form = document.getElementById("ask");
let source = null;

function put(part) {
  const card = document.getElementById(part.side);
  card.querySelector("[data-text]").textContent = part.text;
  card.setAttribute("aria-busy", String(!part.done));
  if (part.score !== null) card.querySelector("[data-score]").textContent = `score ${part.score.toFixed(3)}`;
  const value = card.querySelector("[data-value]");
  if (!value || part.value === null) return;
  value.textContent = part.value.toFixed(3);
  const line = card.querySelector("[data-line]");
  line.values = [...(line.values || []), part.value];
  const low = Math.min(...line.values);
  const high = Math.max(...line.values);
  const x = (i) => (i * 240) / Math.max(1, line.values.length - 1);
  const y = (v) => 38 - ((v - low) * 36) / (high - low || 1);
  line.setAttribute("points", line.values.map((v, i) => `${x(i).toFixed(1)},${y(v).toFixed(1)}`).join(" "));
}

if (form) {
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (source) source.close();
    const refused = document.getElementById("refused");
    refused.hidden = true;
    for (const side of ["before", "after"]) put({ side, text: "", value: null, score: null, done: false });
    for (const score of document.querySelectorAll("[data-score]")) score.textContent = "";
    document.querySelector("[data-line]").values = [];
    // It stays open in a hidden tab: it is short, and the studio writes one answer at a time for all tabs together.
    source = new EventSource(`/try/stream?${new URLSearchParams(new FormData(form))}`);
    source.onmessage = (message) => put(JSON.parse(message.data));
    source.addEventListener("refused", (message) => {
      refused.textContent = JSON.parse(message.data);
      refused.hidden = false;
    });
    source.addEventListener("done", () => source.close());
    source.onerror = () => source.close(); // never ask twice by itself
  });
}

// Colors by the chosen signal, and the arithmetic of the token under the pointer or the focus.
const { steps, lines, says } = JSON.parse(document.getElementById("data").textContent);
const list = document.getElementById("tokens");
const tokens = [...list.querySelectorAll(".tok")];
const curve = document.querySelector(".curve");
const ys = curve ? curve.dataset.ys.split(" ").map(Number) : [];
let at = 0;

function color(signal) {
  tokens.forEach((token, i) => {
    token.className = token.className.replace(/\bs-?\d+\b/, `s${steps[signal][i]}`);
  });
  document.getElementById("says").textContent = says[signal];
  history.replaceState(null, "", `?signal=${signal}`);
}

function show(t, focus) {
  tokens[at].tabIndex = -1;
  tokens[at].setAttribute("aria-selected", "false");
  at = Math.max(0, Math.min(tokens.length - 1, t));
  tokens[at].tabIndex = 0;
  tokens[at].setAttribute("aria-selected", "true");
  if (focus) tokens[at].focus();
  document.getElementById("at-number").textContent = at;
  document.getElementById("at-text").textContent = tokens[at].textContent;
  const rows = lines[at].map(([what, sum]) => {
    const row = document.createElement("tr");
    const head = document.createElement("th");
    const cell = document.createElement("td");
    head.scope = "row";
    head.textContent = what;
    cell.textContent = sum;
    row.append(head, cell);
    return row;
  });
  document.getElementById("at-lines").replaceChildren(...rows);
  if (!curve) return;
  const x = 50 + at * Number(curve.dataset.step);
  const mark = curve.querySelector(".at");
  mark.querySelector("line").setAttribute("x1", x);
  mark.querySelector("line").setAttribute("x2", x);
  mark.querySelector("circle").setAttribute("cx", x);
  mark.querySelector("circle").setAttribute("cy", ys[at]);
}

const moves = { ArrowRight: () => at + 1, ArrowDown: () => at + 1, ArrowLeft: () => at - 1, ArrowUp: () => at - 1,
                Home: () => 0, End: () => tokens.length - 1 };
document.addEventListener("keydown", (event) => {
  if (event.altKey || event.ctrlKey || event.metaKey) return;
  const sideways = event.key === "ArrowRight" || event.key === "ArrowLeft";
  // From the page at large the keys that it does not need itself; a focused control keeps all of its own.
  if (!moves[event.key] || !(list.contains(event.target) || (sideways && event.target === document.body))) return;
  event.preventDefault();
  show(moves[event.key](), true);
});
for (const kind of ["pointerover", "focusin", "click"]) {
  list.addEventListener(kind, (event) => {
    const token = event.target.closest(".tok");
    if (token) show(Number(token.dataset.t), false);
  });
}
document.getElementById("signals").addEventListener("change", (event) => color(event.target.value));
if (tokens.length) {
  tokens.forEach((token) => { token.removeAttribute("title"); token.tabIndex = -1; }); // the board says it
  show(0, false);
}

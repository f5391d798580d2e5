// One run's curves: drawn once, then lengthened as its cycles finish.
const box = document.getElementById("curves");
const { id, unit } = box.dataset;
const overlaid = box.dataset.with ? box.dataset.with.split(",") : [];
const figures = new Map([...box.querySelectorAll("figure")].map((f) => [f.dataset.metric, f.querySelector(".plot")]));
let plots = {};
let own = {}; // metric -> traces of this run
let cursor = null; // bytes of metrics.jsonl that are drawn; null until the curves are there
let source = null; // the live stream, while the tab is visible and the run goes on

function draw() {
  const style = getComputedStyle(document.documentElement);
  for (const [metric, place] of figures) {
    if (!plots[metric]) continue;
    const { data, layout } = painted(plots[metric], style);
    Plotly.react(place, data, layout, { displayModeBar: false, responsive: true });
    if (unit === "cycle" && !place.dataset.opens) {
      place.dataset.opens = "yes";
      place.on("plotly_click", (event) => {
        if (event.points[0].curveNumber >= own[metric]) return; // another run's line
        location.href = `/runs/${id}/rollouts/${Math.round(event.points[0].x)}`;
      });
    }
  }
}

function lengthen(news) {
  for (const [metric, plot] of Object.entries(news)) {
    const old = plots[metric];
    if (!old) continue;
    plot.data.forEach((trace, i) => { // this run's traces come first, then those of the others
      old.data[i].x.push(...trace.x);
      old.data[i].y.push(...trace.y);
    });
    const [a, b] = [old.layout.yaxis.range, plot.layout.yaxis.range];
    if (a && b) old.layout.yaxis.range = [Math.min(a[0], b[0]), Math.max(a[1], b[1])];
  }
  draw();
}

function say(line) {
  const where = line.cycle !== undefined ? `Cycle ${line.cycle}` : `Step ${line.step}`;
  const score = line["reward/score_mean"];
  const kl = line["kl/ref_mean"];
  const shown = [[score, "score", 3], [kl, "KL", 2]].filter(([v]) => typeof v === "number").map(([v, name, n]) => `${name} ${v.toFixed(n)}`);
  const more = shown.length ? `: ${shown.join(", ")}` : "";
  document.getElementById("last").textContent = `${where}${more}.`;
}

async function load() {
  const query = overlaid.map((other) => `with=${encodeURIComponent(other)}`).join("&");
  const answer = await fetch(`/runs/${id}/curves?${query}`);
  const content = await answer.json();
  if (!figures.size && Object.keys(content.plots).length) return location.reload(); // the first cycle came in between
  plots = content.plots;
  own = content.own;
  cursor = content.cursor;
  draw();
  follow();
}

function follow() {
  if (source || cursor === null || document.hidden) return;
  source = new EventSource(`/runs/${id}/live?cursor=${cursor}`);
  source.addEventListener("lines", (event) => {
    const { plots: news, last } = JSON.parse(event.data);
    cursor = event.lastEventId;
    if (Object.keys(news).some((metric) => !plots[metric])) location.reload(); // the first cycle: its curves are not here
    lengthen(news);
    say(last);
  });
  source.addEventListener("restart", () => { unfollow(); load(); });
  source.addEventListener("state", (event) => {
    const state = JSON.parse(event.data);
    const mark = document.getElementById("state");
    mark.textContent = state;
    mark.className = `state ${state}`;
    if (state !== "running" && state !== "stale") unfollow();
  });
}

function unfollow() {
  if (source) source.close();
  source = null;
}

// A browser opens six connections to a host: the streams of tabs that nobody looks at would block the seventh page.
document.addEventListener("visibilitychange", () => { if (document.hidden) unfollow(); else follow(); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
load();

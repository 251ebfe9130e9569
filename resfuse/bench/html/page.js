"use strict";

const charts = JSON.parse(document.getElementById("chart-data").textContent);
const holders = [...document.querySelectorAll("[data-chart]")];
const print = matchMedia("print");
const PRINT_WIDTH = 660; // CSS pixels between the margins of A4, less a figure's own

// colours in the charts' data are var(--name): what they are now, in light, dark or print
const probe = document.body.appendChild(document.createElement("span"));
probe.hidden = true;
function resolved(value) {
  if (Array.isArray(value)) return value.map(resolved);
  if (value && typeof value === "object") {
    return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, resolved(item)]));
  }
  if (typeof value !== "string" || !value.startsWith("var(--")) return value;
  probe.style.color = value;
  return getComputedStyle(probe).color;
}

const tick = { gridcolor: "var(--grid)", linecolor: "var(--edge)", zerolinecolor: "var(--edge)", automargin: true };
const COMMON = {
  paper_bgcolor: "rgba(0,0,0,0)",
  plot_bgcolor: "rgba(0,0,0,0)",
  margin: { l: 8, r: 12, t: 8, b: 28 },
  showlegend: false, // the page's own stands above the plot, at any width
  hoverlabel: { align: "left", bgcolor: "var(--paper)", bordercolor: "var(--soft)", font: { color: "var(--ink)" } },
};

function layoutOf(layout, width) {
  const narrow = width < 520;
  const size = narrow ? 10.5 : 12;
  const found = { ...COMMON, ...layout, font: { family: getComputedStyle(document.body).fontFamily, size, color: "var(--ink)" } };
  for (const axis of ["xaxis", "yaxis"]) found[axis] = { ...tick, ...layout[axis] };
  return resolved({ ...found, width });
}

function legendOf(holder) {
  const { traces } = charts[holder.dataset.chart];
  const legend = document.createElement("div");
  legend.className = "legend";
  for (const trace of traces.filter((trace) => trace.name)) {
    const entry = legend.appendChild(document.createElement("button"));
    const mark = entry.appendChild(document.createElement("i"));
    const line = trace.mode?.startsWith("lines");
    mark.className = line ? "line" : trace.type === "bar" ? "bar-mark" : "point";
    mark.style.color = (line ? trace.line : trace.marker).color;
    mark.style.borderStyle = { dash: "dashed", dot: "dotted", dashdot: "dashed" }[trace.line?.dash] ?? "solid";
    entry.append(trace.name);
    entry.type = "button";
    entry.ariaPressed = "true";
    entry.addEventListener("click", () => {
      const shown = entry.ariaPressed !== "true";
      entry.ariaPressed = String(shown);
      for (const other of traces) if (other === trace || other.meta === trace.name) other.visible = shown;
      draw();
    });
  }
  return legend;
}

function draw() {
  for (const holder of holders) {
    const { traces, layout } = charts[holder.dataset.chart];
    const width = printing ? PRINT_WIDTH : holder.clientWidth;
    Plotly.react(holder, resolved(traces), layoutOf(layout, width), { displaylogo: false, displayModeBar: false });
  }
}

for (const holder of holders) holder.before(legendOf(holder));

let pending = 0;
new ResizeObserver(() => {
  cancelAnimationFrame(pending);
  pending = requestAnimationFrame(draw);
}).observe(document.querySelector("main"));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
// the paper is laid out at once after beforeprint; a medium that is only emulated sends the other event
let printing = print.matches;
function turn(on) {
  printing = on;
  draw();
}
print.addEventListener("change", () => turn(print.matches));
addEventListener("beforeprint", () => turn(true));
addEventListener("afterprint", () => turn(false));

document.getElementById("theme").addEventListener("click", () => {
  const light = resolved("var(--on-light)") === "rgb(0, 0, 0)";
  document.documentElement.dataset.theme = light ? "dark" : "light";
  draw();
});

document.getElementById("download").addEventListener("click", () => {
  const rows = JSON.parse(document.getElementById("row-data").textContent);
  const lines = rows.map((row) => JSON.stringify(row) + "\n").join("");
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([lines], { type: "application/jsonl" }));
  link.download = "resfuse-rows.jsonl";
  link.click();
  URL.revokeObjectURL(link.href);
});

// numbers by value, text by alphabet, empty cells last in both directions
function compare(a, b, sign) {
  if (a === "" || b === "") return (a === "") - (b === "");
  const [x, y] = [Number(a), Number(b)];
  return sign * (Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b, undefined, { numeric: true }) : x - y);
}

function sortBy(heading) {
  const sign = heading.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  const column = heading.cellIndex;
  for (const other of heading.parentElement.cells) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
  const body = heading.closest("table").tBodies[0];
  const value = (row) => row.cells[column].dataset.value;
  body.append(...[...body.rows].sort((a, b) => compare(value(a), value(b), sign)));
}

function filter(input) {
  const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
  for (const row of input.closest("details").querySelectorAll("tbody tr")) {
    const text = row.textContent.toLowerCase();
    row.hidden = !words.every((word) => text.includes(word));
  }
}

for (const heading of document.querySelectorAll("table.sortable th")) {
  heading.firstElementChild.addEventListener("click", () => sortBy(heading));
}
for (const input of document.querySelectorAll(".filter input")) input.addEventListener("input", () => filter(input));

draw();

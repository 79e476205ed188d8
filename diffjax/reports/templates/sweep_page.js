// Draws the figures, and lets the legends hide arms and families of recipes in all of them.
"use strict";
const figures = JSON.parse(document.getElementById("figures").textContent);
const hidden = {arm: new Set(), family: new Set(JSON.parse(document.body.dataset.hidden))};
const plots = [];

const shown = (trace) =>
  Object.keys(hidden).every((kind) => !hidden[kind].has(trace.meta[kind]));

// The points that no other shown point beats in both coordinates.
function front(data, lower) {
  const points = data.filter(shown).flatMap((trace) => trace.x.map((x, i) => [x, trace.y[i]]));
  points.sort((one, other) => one[0] - other[0] || (lower ? one[1] - other[1] : other[1] - one[1]));
  const best = [];
  for (const point of points) {
    const last = best[best.length - 1];
    if (!last || (lower ? point[1] < last[1] : point[1] > last[1])) best.push(point);
  }
  return best;
}

function frontTrace(data, layout) {
  const points = front(data, layout.meta.front === "lower");
  return {
    type: "scatter", mode: "lines+markers", hoverinfo: "skip", cliponaxis: false,
    x: points.map((point) => point[0]), y: points.map((point) => point[1]),
    line: {color: "rgba(31, 36, 48, 0.13)", width: 8, shape: "hv"},
    marker: {symbol: "circle-open", size: 14, color: "#1f2430", line: {width: 1.2}},
  };
}

// Sizes in pixels become proportions, so that paper of another width shows the whole plot.
function scale(element) {
  const {width, height} = element._fullLayout;
  element.style.setProperty("--ratio", `${width} / ${height}`);
  for (const svg of element.querySelectorAll("svg.main-svg"))
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
}

function traces(figure) {
  const data = figure.data.map((trace) => ({...trace, visible: shown(trace)}));
  return figure.layout.meta ? [...data, frontTrace(figure.data, figure.layout)] : data;
}

const touch = matchMedia("(pointer: coarse)").matches;
const options = {
  responsive: true, displayModeBar: "hover", displaylogo: false, doubleClick: "reset",
  modeBarButtons: [["zoomIn2d", "zoomOut2d", "pan2d", "zoom2d", "resetScale2d"]],
};

for (const element of document.querySelectorAll(".plot[data-figure]")) {
  const figure = figures[element.dataset.figure];
  // A finger that drags over a plot scrolls the page.
  if (touch) figure.layout.dragmode = false;
  Plotly.newPlot(element, traces(figure), figure.layout, options).then(() => {
    scale(element);
    element.on("plotly_afterplot", () => scale(element));
  });
  plots.push([element, figure]);
}

function redraw() {
  for (const button of document.querySelectorAll("button[data-kind]")) {
    const {kind, index} = button.dataset;
    button.setAttribute("aria-pressed", String(!hidden[kind].has(Number(index))));
  }
  for (const [element, figure] of plots)
    Plotly.react(element, traces(figure), {...figure.layout, uirevision: 1}, options);
}

function click(event) {
  const {kind, index} = event.currentTarget.dataset;
  const set = hidden[kind], own = Number(index);
  if (event.shiftKey || event.altKey) {
    const all = document.querySelectorAll(`.legend button[data-kind="${kind}"]`);
    set.clear();
    for (const button of all) if (Number(button.dataset.index) !== own) set.add(Number(button.dataset.index));
  } else if (!set.delete(own)) set.add(own);
  redraw();
}

for (const button of document.querySelectorAll("button[data-kind]"))
  button.addEventListener("click", click);
for (const button of document.querySelectorAll("button.all"))
  button.addEventListener("click", () => { hidden.arm.clear(); hidden.family.clear(); redraw(); });
redraw();

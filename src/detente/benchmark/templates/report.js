"use strict";
const root = document.documentElement;
const {state, plots} = JSON.parse(document.getElementById("plots").textContent);
const pills = [...document.querySelectorAll(".legend button[data-label]")];
const touch = matchMedia("(pointer: coarse)").matches;

function draw(keys = Object.keys(plots)) {
  const css = getComputedStyle(root);
  const coloured = value => {
    if (typeof value === "string" && value.startsWith("var(--")) return css.getPropertyValue(value.slice(4, -1)).trim();
    if (Array.isArray(value)) return value.map(coloured);
    if (value && typeof value === "object") return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, coloured(v)]));
    return value;
  };
  const axis = own => ({gridcolor: "var(--grid)", linecolor: "var(--rule)", automargin: true, fixedrange: touch, ...own,
    title: {...own.title, font: {size: 12.5}, standoff: 10}});
  const hidden = new Set(pills.filter(pill => pill.getAttribute("aria-pressed") === "false").map(pill => pill.dataset.label));
  for (const key of keys) {
    const view = plots[key].views[plots[key].controls.map(name => state[name]).join("|")];
    if (!view) continue;
    const {data, layout} = view;
    const traces = data.map(trace => trace.name === "ghosts"
      ? {...trace, marker: {...trace.marker, size: trace.ids.map(label => hidden.has(label) ? trace.marker.size : 0)}}
      : {...trace, visible: !hidden.has(trace.meta)});
    const plot = document.getElementById("plot-" + key);
    const whole = {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, hovermode: "closest",
      font: {family: getComputedStyle(document.body).fontFamily, size: 12.5, color: "var(--ink)"},
      margin: {l: 44, r: 14, t: 10, b: 40}, dragmode: touch ? false : "zoom", ...layout,
      xaxis: axis(layout.xaxis), yaxis: axis(layout.yaxis),
      width: plot.clientWidth, // by itself Plotly would follow a sheet of paper too late
    };
    const figure = plot.closest("figure");
    plot.setAttribute("aria-label", view.alt);
    figure.querySelector("figcaption").textContent = view.caption;
    figure.querySelector(".note").textContent = view.note;
    Plotly.react(plot, coloured(traces), coloured(whole), {responsive: true, displayModeBar: false});
  }
}

for (const select of document.querySelectorAll("select")) {
  select.addEventListener("change", () => {
    const changed = [select.dataset.control];
    const {task} = select.selectedOptions[0].dataset;
    if (task) changed.push("metric:" + task);
    for (const name of changed) state[name] = select.value;
    draw(Object.keys(plots).filter(key => plots[key].controls.some(name => changed.includes(name))));
  });
}

const shownFirst = new Set(pills.filter(pill => pill.getAttribute("aria-pressed") === "true"));
for (const pill of pills) {
  pill.addEventListener("click", () => {
    pill.setAttribute("aria-pressed", pill.getAttribute("aria-pressed") === "false");
    draw();
  });
}
for (const button of document.querySelectorAll(".legend button[data-set]")) {
  button.addEventListener("click", () => {
    const {set} = button.dataset;
    for (const pill of pills) pill.setAttribute("aria-pressed", set === "all" || (set === "first" && shownFirst.has(pill)));
    draw();
  });
}

for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[table.tHead.rows.length - 1].cells];
  heads.forEach((head, place) => head.querySelector("button").addEventListener("click", () => {
    const first = head.dataset.better === "max" ? "descending" : "ascending";
    const other = first === "ascending" ? "descending" : "ascending";
    const order = head.getAttribute("aria-sort") === first ? other : first;
    heads.forEach(each => each.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", order);
    const sign = order === "ascending" ? 1 : -1;
    const value = row => row.cells[place].dataset.value;
    const compare = (a, b) => {
      if (value(a) === undefined) return sign * a.dataset.label.localeCompare(b.dataset.label);
      const [x, y] = [parseFloat(value(a)), parseFloat(value(b))];
      return isNaN(x) || isNaN(y) ? isNaN(x) - isNaN(y) : sign * (x - y);
    };
    table.tBodies[0].append(...[...table.tBodies[0].rows].sort(compare));
  }));
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => draw());
addEventListener("beforeprint", () => { root.classList.add("paper"); draw(); });
addEventListener("afterprint", () => { root.classList.remove("paper"); draw(); });
draw();

"use strict";
// Draws the charts from the page's data. Everything else on the page works without it.
(() => {
  const DATA = JSON.parse(document.getElementById("data").textContent);
  const PRINT_WIDTH = 660; // pixels: within the margins of A4 and of US letter
  const FORMATS = { "%": { axis: ".3~%", hover: ".2%" }, f: { axis: ".3~g", hover: ".4f" }, e: { axis: "", hover: ".2e" } };
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const touch = matchMedia("(pointer: coarse)");
  let printing = false;

  // Plotly reads a few tags in texts.
  const plain = (text) => String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const faded = (hex, alpha) => `rgba(${[1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)).join(",")},${alpha})`;

  function chart(box) {
    const { styles, views } = DATA.charts[box.dataset.chart];
    const plot = box.querySelector(".plot");
    const select = box.querySelector("select");
    let zoomed = null; // ranges of x and y; null: all that is there

    const checked = (name) => [...box.querySelectorAll(`input[name=${name}]:checked`)].map((input) => input.value);
    const view = () => views[select ? Number(select.value) : 0];

    function traces() {
      const { series, form } = view();
      const shown = new Set(checked("curve"));
      const seeds = checked("seed");
      const bands = [], thin = [], lines = [];
      for (const { name, x, y, error, seeds: bySeed = {}, points } of series) {
        if (!shown.has(name)) continue;
        const [number, dash] = styles[name];
        const stroke = colour(`c${number}`);
        const label = plain(name);
        const common = { x, mode: "lines", showlegend: false, name: label };
        const line = { color: stroke, dash: dash ? dash.split(" ").map((n) => `${n}px`).join(",") : "solid", width: 2.5 };
        if (error) {
          const at = x.map((_, i) => i).filter((i) => y[i] != null && error[i] != null);
          bands.push({
            ...common, meta: "band", hoverinfo: "skip", fill: "toself", fillcolor: faded(stroke, 0.2), line: { width: 0 },
            x: [...at, ...at.toReversed()].map((i) => x[i]),
            y: [...at.map((i) => y[i] + error[i]), ...at.toReversed().map((i) => y[i] - error[i])],
          });
        }
        for (const seed of seeds) {
          if (!(seed in bySeed)) continue;
          thin.push({
            ...common, meta: "seed", y: bySeed[seed], line: { ...line, width: 1 }, opacity: 0.75,
            hovertemplate: `${label}, seed ${seed}<br>%{x}: %{y:${FORMATS[form].hover}}<extra></extra>`,
          });
        }
        if (points) {
          const every = Math.max(1, Math.round(x.length / 20));
          const at = x.map((_, i) => i).filter((i) => i % every === 0);
          lines.push({
            ...common, meta: "points", mode: "markers", x: at.map((i) => x[i]), y: at.map((i) => points[i]),
            marker: { color: stroke, symbol: "circle-open", size: 8, line: { width: 1.5 } }, hoverinfo: "skip",
          });
        }
        const about = x.map((_, i) => (error && error[i] != null ? ` ± ${amount(error[i], form)}` : ""));
        lines.push({
          ...common, meta: "mean", y, line, customdata: about, mode: x.length > 1 ? "lines" : "markers",
          marker: { color: stroke, size: 8 },
          hovertemplate: `${label}<br>%{x}: %{y:${FORMATS[form].hover}}%{customdata}<extra></extra>`,
        });
      }
      return [...bands, ...thin, ...lines];
    }

    const amount = (x, form) => (form === "%" ? `${(100 * x).toFixed(2)}%` : form === "e" ? x.toExponential(2) : x.toFixed(4));

    function layout() {
      const { x_title, y_title, form, series } = view();
      const axis = { color: colour("ink"), gridcolor: colour("grid"), linecolor: colour("line"), zeroline: false, automargin: true };
      const narrow = plot.clientWidth < 500 && !printing;
      const nticks = narrow ? 6 : 12;
      const few = x_title === "epoch" && Math.max(...series.map(({ x }) => x.length)) <= nticks; // epochs are whole
      const range = (i) => (zoomed ? { range: [...zoomed[i]], autorange: false } : { autorange: true });
      return {
        autosize: !printing, ...(printing ? { width: PRINT_WIDTH, height: 380 } : {}),
        margin: { l: narrow ? 48 : 64, r: 12, t: 10, b: 48 },
        paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
        font: { family: getComputedStyle(document.body).fontFamily, size: narrow ? 12 : 14, color: colour("ink") },
        hovermode: "closest", showlegend: false, dragmode: touch.matches ? false : "zoom",
        hoverlabel: { bgcolor: colour("raised"), bordercolor: colour("line"), font: { color: colour("ink") }, align: "left" },
        xaxis: { ...axis, title: { text: x_title, standoff: 8 }, nticks, ...(few && !zoomed ? { dtick: 1 } : {}), ...range(0) },
        yaxis: {
          ...axis, title: { text: y_title, standoff: 8 }, tickformat: FORMATS[form].axis,
          ...(form === "e" ? { type: "log", exponentformat: "power", minexponent: 0 } : { type: "linear" }), ...range(1),
        },
      };
    }

    function draw() {
      const here = new Set(view().series.map(({ name }) => name));
      for (const input of box.querySelectorAll("input[name=curve]")) input.closest("label").hidden = !here.has(input.value);
      return Plotly.react(plot, traces(), layout(), { displayModeBar: false, responsive: true, doubleClick: "autosize" });
    }

    function zoom(how) {
      const ranges = [plot._fullLayout.xaxis.range, plot._fullLayout.yaxis.range].map((r) => r.map(Number));
      const shifts = { left: [-0.25, 0], right: [0.25, 0], up: [0, 0.25], down: [0, -0.25] };
      const factor = { in: 0.6, out: 1 / 0.6 }[how] ?? 1;
      zoomed = how === "reset" ? null : ranges.map(([a, b], i) => {
        const middle = (a + b) / 2 + (shifts[how] ?? [0, 0])[i] * (b - a);
        return [middle - (factor * (b - a)) / 2, middle + (factor * (b - a)) / 2];
      });
      draw();
    }

    box.addEventListener("change", (event) => {
      if (event.target === select) zoomed = null;
      draw();
    });
    for (const button of box.querySelectorAll("[data-zoom]")) button.addEventListener("click", () => zoom(button.dataset.zoom));
    draw().then(() => plot.on("plotly_relayout", () => {
      const { xaxis, yaxis } = plot._fullLayout;
      zoomed = xaxis.autorange && yaxis.autorange ? null : [[...xaxis.range], [...yaxis.range]];
    }));
    return draw;
  }

  const redraws = [...document.querySelectorAll(".chart")].map(chart);
  const redraw = (forPrint) => {
    printing = forPrint;
    document.documentElement.classList.toggle("printing", printing);
    for (const draw of redraws) draw();
  };
  dark.addEventListener("change", () => redraw(printing)); // which printing may set off itself
  addEventListener("beforeprint", () => redraw(true));
  addEventListener("afterprint", () => redraw(false));
})();

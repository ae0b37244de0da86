"use strict";
// Draws the charts of a report from the JSON in the page: reads it, computes nothing, and redraws when a control changes.
// Colours are those of Okabe and Ito; every arm also has a dash of its own.

const figures = JSON.parse(document.getElementById("figures").textContent);
const COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8a8a8a"];
const COLOURS_ON_DARK = ["#56B4E9", "#E69F00", "#3cc79a", "#e39bc4", "#F0E442", "#8fb8ff", "#b0b0b0"];
const DASHES = ["solid", "dash", "dashdot", "dot", "longdash", "longdashdot"];
const HEAT = [[0, "#5e3c99"], [0.5, "#ffffff"], [1, "#b35806"]];
let printing = false;

const place = (name) => document.getElementById("chart-" + name);
const control = (name) => document.querySelector(`[name="${name}"]`);
const chosen = (name) => document.querySelector(`[name="${name}"]:checked`)?.value;
// Plotly reads a few HTML tags in names.
const plain = (value) => String(value).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const faint = (colour, share) => colour + Math.round(255 * share).toString(16).padStart(2, "0");
const armIndex = (name) => figures.arms.findIndex((arm) => arm.name === name);
const onDark = () => !printing && matchMedia("(prefers-color-scheme: dark)").matches;
const styleOf = (index) => ({ colour: (onDark() ? COLOURS_ON_DARK : COLOURS)[index % COLOURS.length], dash: DASHES[index % DASHES.length] });
// From blue to yellow in brightness too, so that layers keep their order for every eye.
function ramp(share) {
  const ends = onDark() ? [[70, 130, 230], [254, 232, 56]] : [[0, 34, 110], [214, 178, 0]];
  return `rgb(${ends[0].map((from, i) => Math.round(from + share * (ends[1][i] - from))).join(",")})`;
}
const axisOf = (name) => figures.axes.find((axis) => axis.name === name);
const said = (name, words) => { document.getElementById("note-" + name).textContent = words; };

function layout(xTitle, yTitle, more) {
  const [ink, line] = onDark() ? ["#e8e8e6", "#4c4c4a"] : ["#1b1b1b", "#d8d8d8"];
  const narrow = !printing && innerWidth < 640;
  const axis = { gridcolor: line, zerolinecolor: ink, linecolor: line, automargin: true, exponentformat: "SI", tickcolor: line };
  const { height = printing ? 300 : narrow ? 340 : 400, xaxis, yaxis, ...rest } = more || {};
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: ink, size: narrow ? 11 : 13 },
    margin: { l: 60, r: 12, t: 30, b: 50 }, height, width: printing ? 660 : undefined, autosize: !printing,
    legend: { orientation: "h", x: 0, xanchor: "left", y: 1.02, yanchor: "bottom" }, hoverlabel: { namelength: -1 }, modebar: { bgcolor: "rgba(0,0,0,0)", color: ink, activecolor: ink },
    xaxis: { ...axis, title: { text: plain(xTitle) }, ...xaxis }, yaxis: { ...axis, title: { text: plain(yTitle) }, ...yaxis }, ...rest,
  };
}

function draw(name, traces, its) {
  const options = { responsive: true, displaylogo: false, modeBarButtons: [["toImage", "resetScale2d"]] };
  return Plotly.react(place(name), traces, its, options);
}

function band(x, low, high, colour, group) {
  const shared = { x, mode: "lines", line: { width: 0 }, legendgroup: group, showlegend: false, hoverinfo: "skip" };
  return [{ ...shared, y: low }, { ...shared, y: high, fill: "tonexty", fillcolor: faint(colour, 0.18) }];
}

function line(x, y, name, colour, dash, more) {
  const label = plain(name);
  return {
    x, y, name: label, legendgroup: label, mode: x.length < 3 ? "lines+markers" : "lines", line: { color: colour, dash, width: 2.5 },
    hovertemplate: `${label}: %{y:.4f} at %{x:.4s}<extra></extra>`, ...more,
  };
}

function drawLoss() {
  const axis = axisOf(chosen("axis")), training = chosen("loss") === "training", traces = [];
  figures.arms.forEach((arm, index) => {
    const { colour, dash } = styleOf(index), name = plain(arm.name);
    const known = arm.runs.filter((run) => axis.name in run.x);
    if (!known.length) return;
    const thin = { line: { color: faint(colour, 0.45), dash, width: 1 }, showlegend: false };
    if (training) {
      known.forEach((run, i) => traces.push(line(run.train.x[axis.name], run.train.nats, arm.name, colour, dash,
        { line: { color: colour, dash, width: 1.5 }, showlegend: i === 0 })));
      return;
    }
    const mean = arm.mean && arm.mean.steps.length ? arm.mean : null;
    if (mean) traces.push(...band(mean.x[axis.name], mean.low, mean.high, colour, name));
    known.forEach((run) => traces.push(line(run.x[axis.name], run.bits, `${arm.name}, seed ${run.seed}`, colour, dash,
      mean ? { ...thin, legendgroup: name } : { name, legendgroup: name })));
    if (mean) traces.push(line(mean.x[axis.name], mean.bits, arm.name, colour, dash));
    const ends = known.filter((run) => run.final);
    traces.push({
      x: ends.map((run) => run.final.x[axis.name]), y: ends.map((run) => run.final.bits), mode: "markers", legendgroup: name,
      showlegend: false, name, marker: { symbol: "circle-open", size: 9, color: colour, line: { width: 2 } },
      text: ends.map((run) => "seed " + run.seed), hovertemplate: `${name}, %{text}, final: %{y:.4f}<extra></extra>`,
    });
  });
  const range = training || !figures.frame ? undefined : figures.frame;
  const unit = training ? "Training loss (nats per token)" : "Validation loss (bits per byte)";
  const seeds = figures.arms.some((arm) => arm.mean);
  const words = training ? "The loss of training steps, averaged where there are many; auxiliary losses are not in it. "
    : "Lines: evaluations during training. Open marks: the final evaluation, on more rows. "
      + (seeds ? "Thick: mean over seeds; bands: from the lowest to the highest seed; thin: single seeds. " : "");
  said("loss", words + axis.note + (range && figures.cut ? " The frame leaves out the first evaluations: double-click shows all." : ""));
  return draw("loss", traces, layout(axis.label, unit,
    { xaxis: { rangemode: "tozero" }, yaxis: range ? { range } : {}, uirevision: axis.name + training }));
}

function drawGain() {
  if (!place("gain")) return;
  const axis = axisOf(chosen("axis")), traces = [], frames = [];
  for (const gain of figures.gains) {
    const one = gain.axes[axis.name];
    if (!one) continue;
    const { colour, dash } = styleOf(armIndex(figures.gains.some((g) => g.of !== gain.of) ? gain.of : gain.over));
    const name = `${gain.of} over ${gain.over}`, several = one.runs.length > 1;
    if (several) traces.push(...band(one.x, one.low, one.high, colour, plain(name)));
    if (several) one.runs.forEach((run) => traces.push(line(one.x, run.gain, `${name}, seed ${run.seed}`, colour, dash,
      { line: { color: faint(colour, 0.45), dash, width: 1 }, showlegend: false, legendgroup: plain(name) })));
    traces.push(line(one.x, one.mean, name, colour, dash));
    if (one.frame) frames.push(one.frame);
  }
  const range = frames.length ? [Math.min(...frames.map((f) => f[0])), Math.max(...frames.map((f) => f[1]))] : undefined;
  said("gain", traces.length ? "" : "No two arms that are compared know this budget, or their curves do not overlap in it.");
  return draw("gain", traces, layout(axis.label, "Gain (bits per byte)",
    { height: printing ? 280 : 340, xaxis: { rangemode: "tozero" }, yaxis: { range, zeroline: true, zerolinewidth: 1.5 }, uirevision: axis.name }));
}

function drawForecast() {
  if (!place("forecast")) return;
  const traces = [], shapes = [];
  figures.forecasts.forEach((one, index) => {
    const { colour, dash } = styleOf(index), name = plain(one.run), { share, low, high, forecast } = one.looks;
    traces.push(...band(share, low, high, colour, name));
    traces.push(line(share, forecast, `${one.run}: forecast`, colour, "dot", { legendgroup: name, showlegend: false }));
    traces.push(line(one.came.share, one.came.gain, one.run, colour, dash, { legendgroup: name }));
    if (one.final !== null) traces.push({
      x: [1], y: [one.final], mode: "markers", name: `${name}: final`, legendgroup: name, showlegend: false,
      marker: { symbol: "circle-open", size: 10, color: colour, line: { width: 2 } },
    });
    if (one.alarm !== null) shapes.push({
      type: "line", x0: one.alarm, x1: one.alarm, yref: "paper", y0: 0, y1: 1, line: { color: colour, dash: "dash", width: 1.5 },
      label: { text: "alarm", textposition: "start" },
    });
  });
  return draw("forecast", traces, layout("Share of training", "Gain (nats per token)",
    { shapes, xaxis: { range: [0, 1.02], tickformat: ".0%" } }));
}

const heatRun = () => figures.heat[Number(control("run")?.value || 0)];

function setSlider() {
  const one = heatRun(), slider = control("moment"), layers = chosen("heat") === "layer";
  const most = (layers ? one.layers : one.steps).length - 1;
  slider.max = most;
  slider.value = layers ? 0 : most;
  slider.disabled = most < 1;
}

function drawHeat() {
  if (!place("heat")) return;
  const one = heatRun(), at = Number(control("moment").value), byLayer = chosen("heat") === "layer";
  const experts = Array.from({ length: one.experts }, (_, i) => i);
  const layers = one.layers.map(String);
  const x = byLayer ? one.steps : experts, y = byLayer ? experts : layers;
  const z = byLayer ? experts.map((e) => one.percent.map((moment) => moment[at][e])) : one.percent[at];
  document.getElementById("heat-name").textContent = byLayer ? "Layer" : "Step";
  document.getElementById("heat-at").textContent = byLayer ? one.layers[at] : one.steps[at];
  const scale = HEAT.map(([share, colour]) => [share <= 0.5 ? 2 * share * 100 / one.top : 100 / one.top + (2 * share - 1) * (1 - 100 / one.top), colour]);
  const [across, down] = byLayer ? ["step", "expert"] : ["expert", "layer"];
  const trace = {
    type: "heatmap", x, y, z, zmin: 0, zmax: one.top, colorscale: scale, xgap: x.length < 80 ? 1 : 0, ygap: y.length < 40 ? 1 : 0,
    hovertemplate: `${across} %{x}, ${down} %{y}: %{z} % of its ideal share<extra></extra>`,
    colorbar: { title: { text: "Load, % of<br>ideal share" }, thickness: 14, ticksuffix: " %" },
  };
  const height = Math.max(260, Math.min(640, 110 + 26 * y.length));
  const title = byLayer ? ["Optimizer step", `Expert of layer ${one.layers[at]}`] : ["Expert", "Layer"];
  const integers = { tickformat: "d", showgrid: false, zeroline: false };
  return draw("heat", [trace], layout(...title, { height, xaxis: integers,
    yaxis: { ...integers, type: byLayer ? "linear" : "category", autorange: "reversed" } }));
}

function drawBalance() {
  if (!place("balance")) return;
  const one = heatRun(), measure = one.balance.find((m) => m.name === chosen("balance")) || one.balance[0];
  if (!measure) return;
  const many = one.layers.length > COLOURS.length;
  const traces = measure.lines.map((values, i) => {
    const { colour, dash } = styleOf(i), t = i / Math.max(one.layers.length - 1, 1);
    const own = many ? ramp(t) : colour;
    return line(one.steps, values, `layer ${one.layers[i]}`, own, many ? "solid" : dash,
      { line: { color: own, dash: many ? "solid" : dash, width: many ? 1.2 : 2 }, showlegend: !many || i === 0 || i === one.layers.length - 1 });
  });
  if (measure.name === "max_vio" && one.floor) traces.push(line(one.steps, one.floor, "floor", "#8a8a8a", "dot"));
  return draw("balance", traces, layout("Optimizer step", measure.title, { height: printing ? 280 : 340 }));
}

const drawAll = () => [drawLoss, drawGain, drawForecast, drawHeat, drawBalance].forEach((one) => one());

function listen() {
  const redraw = { axis: [drawLoss, drawGain], loss: [drawLoss], balance: [drawBalance], moment: [drawHeat] };
  document.addEventListener("input", (event) => {
    const name = event.target.name;
    if (name === "run" || name === "heat") { setSlider(); drawHeat(); if (name === "run") drawBalance(); }
    else (redraw[name] || []).forEach((one) => one());
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  addEventListener("beforeprint", () => { printing = true; drawAll(); });
  addEventListener("afterprint", () => { printing = false; drawAll(); });
}

async function begin() {
  const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent), (letter) => letter.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  document.head.append(script);
  if (place("heat")) setSlider();
  drawAll();
  listen();
  document.documentElement.dataset.drawn = "yes";
}

begin().catch((error) => {
  document.querySelectorAll(".chart").forEach((chart) => {
    chart.textContent = "This browser cannot draw the charts (" + error.message + "). Their numbers are in report.json.";
  });
  throw error;
});

"use strict";
// Text from runs reaches the page by textContent alone, and Plotly, which reads markup, is given numbers and our own words.

const EVERY = 2000; // milliseconds between looks at the server
const COLORS = ["#2a6fb0", "#d1622b", "#3a8f5c", "#8a5aa8", "#b03a5b", "#6b6b6b", "#1f9aa6", "#a68a1f"];
const DARK_COLORS = ["#6aa9e6", "#f0915f", "#6fc392", "#bd93d8", "#e0789a", "#a9a9a9", "#5fd0da", "#d8bf5a"];
const SHADE = [209, 98, 43]; // of tokens

const dark = matchMedia("(prefers-color-scheme: dark)");
const cards = new Map(); // of panels, by key
const chosen = new Set(); // indices of runs
let runs = [], drawnVersion = "", panelVersion = "", page = 0, samplesAsked = 0;

const find = (id) => document.getElementById(id);
const color = (i) => (dark.matches ? DARK_COLORS : COLORS)[i % COLORS.length];
const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const short = (x) => (x === null || x === undefined ? "–" : Number(x.toPrecision(3)).toString());

function element(tag, text, name) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (name) made.className = name;
  return made;
}

function swatch(hue) {
  const made = element("span", undefined, "swatch");
  made.style.backgroundColor = hue;
  return made;
}

async function ask(what, given = {}) {
  const answer = await fetch(`api/${what}?${new URLSearchParams(given)}`);
  const found = await answer.json();
  if (!answer.ok) throw new Error(found.error);
  return found;
}

const asked = () => [...chosen].sort((a, b) => a - b).join(",");

// ---- runs and warnings

async function look() {
  try {
    runs = (await ask("state")).runs;
    find("connection").textContent = "";
  } catch (error) {
    find("connection").textContent = "The server does not answer; this is what it said last.";
    return;
  }
  const known = new Set([...find("runs").tBodies[0].rows].map((row) => Number(row.dataset.run)));
  runs.forEach((_, i) => { if (!known.has(i)) addRun(i); });
  showRuns();
  showWarnings();
  const version = asked() + ":" + runs.map((run) => run.version).join();
  if (version === drawnVersion) return;
  drawnVersion = version;
  try {
    await showPanels();
  } catch (error) {
    drawnVersion = ""; // again with the next look
  }
  if (page === 0 && !find("rows").matches(":hover")) await showSamples();
}

function addRun(i) {
  chosen.add(i);
  const row = find("runs").tBodies[0].insertRow();
  row.dataset.run = i;
  const box = element("input");
  box.type = "checkbox";
  box.checked = true;
  box.setAttribute("aria-label", `draw ${runs[i].name}`);
  box.addEventListener("change", () => {
    box.checked ? chosen.add(i) : chosen.delete(i);
    drawnVersion = "";
    look();
  });
  row.insertCell().append(box);
  for (let k = 0; k < 7; k++) row.insertCell();
  const option = element("option", runs[i].name);
  option.value = i;
  find("filters").elements.run.append(option);
}

function showRuns() {
  for (const row of find("runs").tBodies[0].rows) {
    const run = runs[row.dataset.run];
    const steps = run.total ? `${run.step} of ${run.total}` : `${run.step}`;
    const state = run.phase ? `${run.state}, ${run.phase}` : run.state;
    const texts = [run.name, run.algorithm, state, steps, short(run.reward), short(run.kl), run.left || ""];
    texts.forEach((text, k) => { row.cells[k + 1].textContent = text; });
    row.cells[1].prepend(swatch(color(row.dataset.run)));
    row.cells[1].title = run.folder;
    row.cells[2].title = run.model;
    row.cells[3].className = `state-${run.state}`;
  }
}

function showWarnings() {
  const said = runs.flatMap((run) => run.warnings.map((text) => (runs.length > 1 ? `${run.name}: ${text}` : text)));
  const list = find("warnings");
  if (said.join("\n") !== [...list.children].map((item) => item.textContent).join("\n")) {
    list.replaceChildren(...said.map((text) => element("li", text)));
  }
}

// ---- panels

const watcher = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    const card = cards.get(target.dataset.key);
    if (!card) continue;
    card.isVisible = isIntersecting;
    if (isIntersecting) draw(card);
  }
}, { rootMargin: "200px" });

async function showPanels() {
  const { panels } = await ask("panels", { runs: asked() });
  const version = JSON.stringify(panels) + dark.matches;
  if (version !== panelVersion) {
    panelVersion = version;
    const kept = new Set(panels.map((panel) => panel.key));
    for (const [key, card] of cards) if (!kept.has(key)) removeCard(key, card);
    for (const panel of panels) {
      const card = cards.get(panel.key) || addCard(panel);
      card.title.firstChild.textContent = panel.title;
      (panel.is_other ? find("others") : find("panels")).append(card.box);
    }
    find("more").hidden = !panels.some((panel) => panel.is_other);
  }
  await drawVisible();
}

function addCard(panel) {
  const card = { key: panel.key, box: element("section", undefined, "panel"), title: element("h2"), isVisible: false };
  card.box.dataset.key = panel.key;
  card.box.setAttribute("aria-label", panel.title);
  card.plot = element("div", undefined, "plot");
  card.legend = element("div", undefined, "legend");
  card.last = element("output");
  card.title.append(element("span"), card.last);
  card.box.append(card.title, card.plot, card.legend);
  cards.set(panel.key, card);
  watcher.observe(card.box);
  return card;
}

function removeCard(key, card) {
  watcher.unobserve(card.box);
  if (hasPlotly()) Plotly.purge(card.plot);
  card.box.remove();
  cards.delete(key);
}

async function draw(card) {
  const wanted = drawnVersion + find("smooth").value + dark.matches;
  if (card.drawn === wanted || !hasPlotly()) return;
  card.drawn = wanted;
  try {
    const found = await ask("panel", { key: card.key, runs: asked(), smooth: find("smooth").value });
    if (card.drawn !== wanted) return; // something newer was asked for meanwhile
    await Plotly.react(card.plot, traces(found), layout(found, card), { displayModeBar: false, responsive: true });
    showLegend(card, found.curves);
  } catch (error) {
    card.drawn = ""; // again with the next look
  }
}

const hasPlotly = () => typeof Plotly !== "undefined";
const drawVisible = () => Promise.all([...cards.values()].filter((card) => card.isVisible).map(draw));

function paint(curves) {
  // One run alone: a color a curve. Several: a color a run.
  let next = 0;
  for (const curve of curves) {
    const isOwn = ["line", "thin", "points"].includes(curve.kind);
    curve.color = chosen.size > 1 ? color(curve.run) : color(isOwn ? next : Math.max(0, next - 1));
    if (curve.kind === "raw") curve.color = color(chosen.size > 1 ? curve.run : next);
    else if (isOwn) next += 1;
    if (["limit", "bound"].includes(curve.kind) && chosen.size === 1) curve.color = color(0);
    if (curve.kind === "ruler") curve.color = style("--faint");
    if (curve.kind === "moved") curve.color = color(1);
  }
  return curves;
}

function traces(found) {
  return paint(found.curves).flatMap((curve) => {
    const { x, y, kind } = curve;
    const several = chosen.size > 1 ? runs[curve.run].name : curve.label;
    const name = escaped(several);
    const base = {
      x, y, name, type: "scatter", mode: x.length === 1 ? "markers" : "lines", marker: { color: curve.color, size: 5 },
      hovertemplate: `%{y:.4g} ${name}<extra></extra>`,
    };
    const line = { color: curve.color, width: 1.5 };
    if (kind === "raw") return [{ ...base, line: { ...line, width: 1 }, opacity: 0.25, hoverinfo: "skip", hovertemplate: null }];
    if (found.is_stacked) return [{ ...base, line: { ...line, width: 0 }, stackgroup: "one" }];
    if (kind === "vertical") return [];
    if (kind === "path") {
      return [{ ...base, mode: "lines+markers", line: { ...line, width: 0.7 }, marker: { color: curve.color, size: 4 }, opacity: 0.6,
        hovertemplate: `KL %{x:.4g}, reward %{y:.4g}<extra></extra>` }];
    }
    if (["points", "moved", "ruler"].includes(kind)) {
      const error = curve.error ? { type: "data", array: curve.error, color: curve.color, thickness: 1, width: 2 } : undefined;
      const mode = kind === "points" ? "markers" : "lines+markers";
      return [{ ...base, mode, line, marker: { color: curve.color, size: 6 }, error_y: error }];
    }
    if (kind === "thin") Object.assign(line, { width: 1 });
    if (kind === "limit") Object.assign(line, { width: 1, dash: "dash" });
    if (kind === "bound") Object.assign(line, { width: 1.2, dash: "dashdot" });
    const edges = (curve.band || []).map((edge, i) => ({
      ...edge, type: "scatter", mode: "lines", line: { width: 0 }, hoverinfo: "skip", fill: i ? "tonexty" : "none",
      fillcolor: faded(curve.color, 0.15),
    }));
    return [...edges, { ...base, line }];
  });
}

function layout(found, card) {
  const axis = { gridcolor: style("--line"), zeroline: false, automargin: true };
  const bounds = found.curves.filter((curve) => curve.kind === "vertical");
  return {
    margin: { l: 45, r: 8, t: 6, b: 34 },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: style("--faint"), size: 11 },
    showlegend: false,
    hovermode: card.key === "frontier" ? "closest" : "x unified",
    hoverlabel: { bgcolor: style("--card"), font: { color: style("--ink") } },
    uirevision: "kept", // a zoom stays
    xaxis: { ...axis, title: { text: found.x_title, standoff: 4 } },
    yaxis: axis,
    shapes: bounds.map(({ x, color: hue }) => (
      { type: "line", x0: x[0], x1: x[0], yref: "paper", y0: 0, y1: 1, line: { color: hue, width: 1.2, dash: "dashdot" } })),
  };
}

function showLegend(card, curves) {
  const named = curves.filter((curve) => curve.kind !== "raw");
  const items = new Map(named.map((curve) => [chosen.size > 1 ? runs[curve.run].name : curve.label, curve.color]));
  card.legend.replaceChildren(...[...items].map(([name, hue]) => {
    const item = element("span", name);
    item.prepend(swatch(hue));
    return item;
  }));
  const first = named.find((curve) => curve.y.length);
  card.last.textContent = chosen.size === 1 && first && card.key !== "frontier" ? short(first.y.at(-1)) : "";
}

const escaped = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;").replace(/%\{/g, "% {");
const faded = (hex, alpha) => `rgba(${[1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)).join()},${alpha})`;

// ---- samples

async function showSamples() {
  const form = find("filters").elements, given = { page };
  for (const name of ["run", "source", "order", "lowest", "highest", "first_step", "last_step", "prompt"]) given[name] = form[name].value;
  given.has_tokens = form.has_tokens.checked;
  const number = ++samplesAsked;
  let found;
  try {
    found = await ask("samples", given);
  } catch (error) {
    find("count").textContent = error.message;
    return;
  }
  if (number !== samplesAsked) return; // another was asked for meanwhile
  find("count").textContent = found.count === 1 ? "1 completion" : `${found.count} completions`;
  find("page").textContent = found.pages ? `page ${page + 1} of ${found.pages}` : "";
  find("before").disabled = page === 0;
  find("after").disabled = page + 1 >= found.pages;
  const measure = form.measure.value;
  const most = strongest(found.rows, measure);
  find("scale").hidden = most === 0;
  find("scale").querySelector("span").style.background = `linear-gradient(to right, ${shade(0)}, ${shade(1)})`;
  find("scale").querySelector("output").textContent = short(measure === "logprob" ? -most : most);
  find("rows").replaceChildren(...found.rows.map((row) => sample(row, measure, most)));
}

const strength = (x) => (Number.isFinite(x) ? Math.abs(x) : 0);
const shade = (part) => `rgba(${SHADE.join()},${0.75 * part})`;

function strongest(rows, measure) {
  // The 99th percentile of the page, so that one token does not make all others pale.
  const all = rows.flatMap((row) => (row.tokens ? row.tokens[measure] : [])).map(strength).sort((a, b) => a - b);
  return all.length ? all[Math.ceil(0.99 * (all.length - 1))] : 0;
}

function sample(row, measure, most) {
  const box = element("article", undefined, "sample"), facts = element("div", undefined, "facts");
  facts.append(element("span", `step ${row.step}`), element("span", `reward ${short(row.reward)}`));
  for (const [name, text] of Object.entries(row.more)) facts.append(element("span", `${name} ${text}`));
  const completion = element("p", row.tokens ? undefined : row.completion, "completion");
  if (row.tokens) {
    const { tokens, logprob, entropy, kl } = row.tokens;
    tokens.forEach((text, i) => {
      const part = element("span", text, "token");
      const share = most > 0 ? Math.min(1, strength(row.tokens[measure][i]) / most) : 0;
      part.style.backgroundColor = shade(share);
      part.title = `log-prob ${short(logprob[i])}, entropy ${short(entropy[i])}, KL ${short(kl[i])}`;
      completion.append(part);
    });
  }
  box.append(facts, element("p", row.prompt, "prompt"), completion);
  return box;
}

// ---- settings

async function showSettings() {
  if (!find("settings").open) return;
  const { settings } = await ask("settings", { run: find("filters").elements.run.value });
  const only = find("changed").checked;
  const rows = settings.filter((setting) => setting.is_changed || !only).map((setting) => {
    const row = element("tr");
    row.append(element("th", setting.name), element("td", setting.value));
    return row;
  });
  find("settings").querySelector("tbody").replaceChildren(...rows);
}

// ---- what the reader does

function turn(by) {
  page = Math.max(0, page + by);
  showSamples();
}

find("filters").addEventListener("input", () => { page = 0; showSamples(); });
find("filters").addEventListener("submit", (event) => event.preventDefault());
find("filters").elements.run.addEventListener("change", showSettings);
find("before").addEventListener("click", () => turn(-1));
find("after").addEventListener("click", () => turn(1));
find("settings").addEventListener("toggle", showSettings);
find("changed").addEventListener("change", showSettings);
find("smooth").addEventListener("change", drawVisible);
window.addEventListener("load", drawVisible); // Plotly is there; runs, warnings and samples did not wait for it
dark.addEventListener("change", () => { drawnVersion = ""; look(); });

async function go() {
  if (!document.hidden || !runs.length) await look();
  setTimeout(go, EVERY);
}

go();

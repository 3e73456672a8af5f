"use strict";
// Draws the page from its JSON. Text of tokens and names of runs are only ever set as text.

const page = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const state = { run: 0, mode: "class", place: 0, hits: [], hit: -1 };
const PER_PAGE = 700; // tokens shown at once, one window at least

// ---- elements ----------------------------------------------------------------------------------

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

const INVISIBLE = /[\u0000-\u0008\u000b\u000c\u000e-\u001f\u007f-\u009f\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]/u;
const PARTS = new RegExp(`\\r|\\n|\\t| |${INVISIBLE.source}|[^\\r\\n\\t ]`, "gu");

// Text with marks for what cannot be seen; line breaks still break lines.
function fillText(element, text) {
  let run = "";
  const flush = () => { if (run) element.append(run); run = ""; };
  for (const part of text.match(PARTS) || []) {
    const special = marked(part);
    if (special === null) { run += part; continue; }
    flush();
    element.append(...special);
  }
  flush();
}

function marked(part) {
  if (part === " ") return [make("span", "space", " ")];
  if (part === "\n") return [make("span", "mark", "↵"), make("span", "break", "\n")];
  if (part === "\t") return [make("span", "mark", "→"), "\t"];
  if (part === "\r") return [make("span", "hex", "⟨CR⟩")];
  if (!INVISIBLE.test(part)) return null;
  const code = part.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
  return [make("span", "hex", `⟨U+${code}⟩`)];
}

// A token that only begins a character is shown as its bytes.
function fillToken(element, text, bytes) {
  if (text === "") element.append(make("span", "hex", `⟨${bytes || ""}⟩`));
  else fillText(element, text);
}

// ---- figures -----------------------------------------------------------------------------------

const probe = byId("tip").appendChild(make("span"));
function shade(name) { // "light-dark(#d55e00, #f08a3c)" -> "rgb(213, 94, 0)", in light or dark
  probe.style.color = name;
  return getComputedStyle(probe).color;
}

function shaded(value) {
  if (typeof value === "string") return /^(var|light-dark)\(/.test(value) ? shade(value) : value;
  if (Array.isArray(value)) return value.map(shaded);
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, shaded(inner)]));
}

const touch = matchMedia("(pointer: coarse)").matches;
const CONFIG = { displayModeBar: false, scrollZoom: false, doubleClick: "reset+autosize" };

function layoutOf(layout) {
  const line = { gridcolor: "var(--grid)", zerolinecolor: "var(--rule)", linecolor: "var(--rule)",
    automargin: true, tickfont: { size: 12 }, fixedrange: touch };
  const title = (own) => ({ title: { ...own.title, standoff: 10, font: { size: 13 } } });
  const base = {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", hovermode: "closest",
    font: { family: getComputedStyle(document.querySelector("h4")).fontFamily, size: 13, color: "var(--ink)" },
    margin: { l: 52, r: 12, t: 8, b: 44 }, dragmode: touch ? false : "zoom",
    showlegend: false, // `keysOf` has it, where it takes nothing from the plot
    hoverlabel: { bgcolor: "var(--raised)", bordercolor: "var(--rule)", font: { color: "var(--ink)" }, namelength: -1 },
  };
  const axes = Object.fromEntries(["xaxis", "yaxis"].map((name) =>
    [name, { ...line, ...layout[name], ...title(layout[name]) }]));
  return shaded({ ...base, ...layout, ...axes });
}

// Unlike Plotly's own `responsive` this also sees scroll bars come and hidden parts appear.
const sizes = new ResizeObserver((entries) => {
  for (const { target, contentRect } of entries) {
    const drawn = target.figure && target._fullLayout;
    if (drawn && contentRect.width > 0 && Math.abs(drawn.width - contentRect.width) >= 1) Plotly.Plots.resize(target);
  }
});

function draw(element, figure) {
  element.figure = figure;
  sizes.observe(element);
  element.style.height = figure.layout.height ? `${figure.layout.height}px` : "";
  const data = figure.data.map((trace) => ({ ...trace, visible: !figure.off?.has(trace.legendgroup) }));
  return Plotly.react(element, shaded(data), layoutOf(figure.layout), CONFIG);
}

function redraw() {
  for (const element of document.querySelectorAll(".plot")) if (element.figure) draw(element, element.figure);
}

// What a section shows: figures with their titles and captions, side by side.
function fill(section, figures) {
  const parent = document.querySelector(`[data-section=${section}]`);
  for (const old of parent.querySelectorAll(".plot")) { sizes.unobserve(old); Plotly.purge(old); }
  parent.replaceChildren(...figures.map((figure) => {
    const box = make("figure"), plot = make("div", "plot");
    plot.dataset.figure = figure.figure;
    box.append(make("h4", "", figure.title), keysOf(figure, plot), plot);
    if (figure.caption) box.append(make("figcaption", "", figure.caption));
    box.append(csvLink(figure));
    return box;
  }));
  figures.forEach((figure, index) => draw(parent.children[index].querySelector(".plot"), figure));
}

// ---- legends -----------------------------------------------------------------------------------

const DASHES = { dash: "6 4", dot: "2 3", dashdot: "7 3 2 3", longdash: "10 4", longdashdot: "10 3 2 3" };
const GLYPHS = { circle: "●", square: "■", diamond: "◆", "triangle-up": "▲", "triangle-down": "▼", cross: "✚", x: "✖" };

// A button an entry, which hides what it names; many scroll.
function keysOf(figure, plot) {
  const list = make("div", "keys");
  figure.off = new Set();
  for (const trace of figure.data.filter((one) => one.showlegend)) {
    const key = make("button", "key");
    key.type = "button";
    key.setAttribute("aria-pressed", "true");
    key.append(swatch(trace), make("span", "", unescaped(trace.name)));
    key.addEventListener("click", () => {
      const group = trace.legendgroup;
      if (!figure.off.delete(group)) figure.off.add(group);
      key.setAttribute("aria-pressed", String(!figure.off.has(group)));
      draw(plot, figure);
    });
    list.append(key);
  }
  return list;
}

function swatch({ type, mode, line, marker }) {
  const picture = byId("swatch").content.firstElementChild.cloneNode(true);
  const [stroke, bar, glyph] = picture.children;
  picture.style.color = line ? line.color : marker.color;
  if (!mode?.includes("lines")) stroke.remove();
  else if (line.dash in DASHES) stroke.style.strokeDasharray = DASHES[line.dash];
  if (type !== "bar") bar.remove();
  if (mode?.includes("markers")) glyph.textContent = GLYPHS[marker.symbol];
  return picture;
}

// ---- figures as tables -------------------------------------------------------------------------

// What is drawn, as a table; figures/*.csv have every digit.
function csvLink(figure) {
  const link = make("a", "csv", "CSV");
  link.href = "#";
  link.addEventListener("click", () => {
    const blob = new Blob([csvOf(figure)], { type: "text/csv" });
    link.href = URL.createObjectURL(blob);
    link.download = `${[figure.figure, figure.title].filter(Boolean).join(" ").replace(/[^\w.=-]+/g, "_")}.csv`;
  });
  return link;
}

function csvOf({ data, layout }) {
  const cell = (value) => (/[",\n\r]/.test(value) ? `"${value.replaceAll('"', '""')}"` : value);
  const sideways = layout.yaxis.type === "category"; // a row a word
  const [along, value] = sideways ? ["yaxis", "xaxis"] : ["xaxis", "yaxis"];
  const rows = [["series", layout[along].title.text || "x", layout[value].title.text || "y", "low", "high"]];
  for (const trace of data) {
    const [ends, values, places] = sideways ? [trace.error_x, trace.x, trace.y] : [trace.error_y, trace.y, trace.x];
    values.forEach((y, index) => {
      if (y === null) return;
      const x = places ? places[index] : trace.x0 + index * trace.dx;
      const range = ends ? [y - ends.arrayminus[index], y + ends.array[index]].map((end) => +end.toFixed(5)) : ["", ""];
      rows.push([unescaped(trace.name), sideways ? unescaped(x) : x, y, ...range]);
    });
  }
  return rows.map((row) => row.map((value) => cell(String(value))).join(",") + "\n").join("");
}

function unescaped(text) { // Plotly reads entities
  return text.replaceAll("&lt;", "<").replaceAll("&gt;", ">").replaceAll("&amp;", "&");
}

// ---- contents ----------------------------------------------------------------------------------

// A link to every heading that can be seen, and to the heading itself beside it.
function showContents() {
  const list = make("ul");
  for (const heading of document.querySelectorAll("h2[id], h3[id]")) {
    if (!heading.checkVisibility()) continue;
    const item = make("li", heading.tagName.toLowerCase()), link = make("a", "", heading.firstChild.textContent);
    link.href = `#${heading.id}`;
    item.append(link);
    list.append(item);
    if (heading.querySelector(".here")) continue;
    const here = make("a", "here", "#");
    here.href = link.href;
    here.setAttribute("aria-label", `Link to ${link.textContent}`);
    heading.append(here);
  }
  byId("contents").replaceChildren(list);
}

// ---- one run -----------------------------------------------------------------------------------

function showRun(index) {
  state.run = index;
  state.place = 0;
  const run = page.runs[index];
  for (const part of document.querySelectorAll("[data-run]")) part.hidden = Number(part.dataset.run) !== index;
  const figuresOf = (section) => run.figures[section] || [];
  const shown = { ...run.figures, dropped: run.dropped };
  for (const part of document.querySelectorAll("[data-has]")) part.hidden = !(shown[part.dataset.has] || []).length;
  for (const part of document.querySelectorAll("[data-needs]")) part.hidden = figuresOf(part.dataset.needs).length > 0;
  for (const part of document.querySelectorAll("[data-column]")) part.hidden = !(part.dataset.column in run.columns);
  if (state.mode !== "class" && !(state.mode in run.columns)) setMode("class");
  for (const { dataset } of document.querySelectorAll("#tokens [data-section]")) {
    if (dataset.section !== "compared") fill(dataset.section, figuresOf(dataset.section));
  }
  showExamples(run);
  showDropped(run);
  search();
  showWindows();
  showContents();
}

// ---- examples ----------------------------------------------------------------------------------

function showExamples(run) {
  let offset = 0;
  document.querySelectorAll(".plot[data-figure=trajectories]").forEach((plot, index) => {
    const box = plot.parentElement;
    const start = offset, count = plot.figure.data.length / 2; // losses and fitted line of each token
    offset += count;
    const title = box.querySelector("h4");
    title.replaceChildren(make("span", `class ${page.classes[index].key}`, page.classes[index].name));
    if (count === 0) title.append(" no token is in this class");
    plot.hidden = count === 0;
    box.append(exampleList(run, start, count, plot));
    Plotly.restyle(plot, { hoverinfo: "none" }); // the tip shows the token
    plot.on("plotly_hover", (event) => {
      const number = event.points[0].curveNumber >> 1;
      showTip(exampleEntry(run, start + number), event.event.clientX, event.event.clientY);
    });
    plot.on("plotly_unhover", hideTip);
  });
}

// They stand after the examples of the classes.
function showDropped(run) {
  let start = run.examples.length - run.dropped.reduce((sum, { count }) => sum + count, 0);
  byId("dropped").replaceChildren(...run.dropped.map(({ source, kept, count }) => {
    const box = make("figure");
    box.append(make("h4", "", `${source} (${kept} selected)`), exampleList(run, start, count, null));
    start += count;
    return box;
  }));
}

function exampleEntry(run, number) {
  return { ...run.examples[number], run, columns: run.example_columns, number };
}

const oneLine = (text) => text.replace(/\s+/g, " ");

function exampleList(run, start, count, plot) {
  const list = make("ul", "examples");
  for (let number = 0; number < count; number++) {
    const button = make("button");
    button.type = "button";
    const entry = exampleEntry(run, start + number);
    for (const part of ["before", "token", "after"]) {
      const inner = make("bdi", part === "token" ? `class ${classOf(entry)}` : "");
      if (part === "token") fillToken(inner, entry.text, entry.bytes);
      else fillText(inner, oneLine(entry[part]));
      const outer = make("span", part);
      outer.append(inner);
      button.append(outer);
    }
    const show = () => {
      const place = button.getBoundingClientRect();
      emphasise(plot, number);
      showTip(entry, place.left + 20, place.bottom);
    };
    const hide = () => { emphasise(plot, null); hideTip(); };
    button.addEventListener("mouseenter", show);
    button.addEventListener("focus", show);
    button.addEventListener("click", show);
    button.addEventListener("mouseleave", hide);
    button.addEventListener("blur", hide);
    const item = make("li");
    item.append(button);
    list.append(item);
  }
  return list;
}

function emphasise(plot, number) {
  if (!plot) return;
  const faint = plot.figure.data.map((_, index) => (number === null || index >> 1 === number ? 1 : 0.15));
  if (faint.length) Plotly.restyle(plot, { opacity: faint });
}

// ---- the tokens in their text ------------------------------------------------------------------

const windowsOf = (run) => page.windows[run.set];
const isLive = (window, position) => window.live[position] === 1;

function pageOf(windows, place) {
  const size = Math.max(1, Math.floor(PER_PAGE / windows[0].ids.length));
  return { start: place * size, end: Math.min(windows.length, (place + 1) * size), pages: Math.ceil(windows.length / size) };
}

function showWindows() {
  const run = page.runs[state.run], windows = windowsOf(run);
  const { start, end, pages } = pageOf(windows, state.place);
  let number = 0; // of the live token among all that are shown
  for (const window of windows.slice(0, start)) number += window.live.filter(Boolean).length;
  byId("windows").replaceChildren(...windows.slice(start, end).map((window) => {
    const box = windowBox(run, window, number);
    number += window.live.filter(Boolean).length;
    return box;
  }));
  const first = byId("windows").querySelector(".t");
  if (first) first.tabIndex = 0;
  byId("place").textContent = `windows ${start + 1} to ${end} of ${windows.length}`;
  byId("previous").disabled = state.place === 0;
  byId("next").disabled = state.place >= pages - 1;
  showMode();
}

function windowBox(run, window, number) {
  const box = make("div", "window"), text = make("div", "text");
  const sources = new Set();
  window.ids.forEach((id, position) => {
    const live = isLive(window, position);
    const entry = { id, text: window.texts[position], bytes: window.bytes[position] || null,
      window: window.window, position, run, columns: run.columns, number: live ? number++ : null };
    if (live) sources.add(run.sources[run.columns.source[entry.number]]);
    text.append(tokenSpan(entry));
  });
  box.append(make("h5", "", `Window ${window.window}, ${[...sources].join(", ")}`), text);
  return box;
}

function tokenSpan(entry) {
  const label = entry.columns.label && entry.number !== null ? entry.columns.label[entry.number] : "";
  const span = make("span", entry.number === null ? "t dead" : `t ${classOf(entry)} ${label}`);
  span.tabIndex = -1;
  span.entry = entry;
  fillToken(span, entry.text, entry.bytes);
  if (entry.number === null) return span;
  const { columns, run, number } = entry;
  if (columns.excess) {
    const part = Math.max(-1, Math.min(1, columns.excess[number] / run.excess_limit));
    span.style.setProperty("--up", `${(85 * Math.max(0, part)).toFixed(0)}%`);
    span.style.setProperty("--down", `${(85 * Math.max(0, -part)).toFixed(0)}%`);
  }
  if (columns.times) {
    const part = columns.times[number] / run.tokens_seen.length;
    span.style.setProperty("--part", `${(85 * part).toFixed(0)}%`);
  }
  return span;
}

const classOf = (entry) => page.classes[entry.columns.class[entry.number]].key;

// ---- search ------------------------------------------------------------------------------------

// Where the text is found: [index of a window, first position, last position].
function search() {
  const wanted = byId("search").value.toLowerCase();
  state.hits = [];
  state.hit = -1;
  if (wanted) windowsOf(page.runs[state.run]).forEach((window, index) => {
    const ends = [];
    let text = "";
    for (const part of window.texts) { text += part.toLowerCase(); ends.push(text.length); }
    const at = (place) => ends.findIndex((end) => end > place);
    for (let place = text.indexOf(wanted); place >= 0; place = text.indexOf(wanted, place + wanted.length)) {
      state.hits.push([index, at(place), at(place + wanted.length - 1)]);
    }
  });
  byId("found").textContent = wanted ? `${state.hits.length} found` : "";
}

function showHit(step) {
  if (!state.hits.length) return;
  const windows = windowsOf(page.runs[state.run]), count = state.hits.length;
  state.hit = (state.hit + step + count) % count;
  const [index, first, last] = state.hits[state.hit];
  const size = pageOf(windows, 0).end;
  state.place = Math.floor(index / size);
  showWindows();
  const spans = [...byId("windows").children[index % size].querySelectorAll(".t")].slice(first, last + 1);
  for (const span of spans) span.classList.add("hit");
  spans[0].scrollIntoView({ block: "center" });
  byId("found").textContent = `${state.hit + 1} of ${count}`;
}

// ---- colours and their legend ------------------------------------------------------------------

function setMode(mode) {
  state.mode = mode;
  for (const input of document.querySelectorAll("input[name=mode]")) input.checked = input.value === mode;
  showMode();
}

function showMode() {
  byId("windows").className = `by-${state.mode}`;
  const run = page.runs[state.run], limit = run.excess_limit;
  const legends = {
    class: () => page.classes.map(classEntry),
    excess: () => [scale("excess", [`≤ −${limit}`, "0", `≥ ${limit}`], "excess loss (nats): below the reference, above it")],
    label: () => ["signal", "noise", "neither"].map((word) => make("span", `label ${word}`, word)),
    times: () => [scale("times", ["0", String(run.tokens_seen.length)], "checkpoints at which the token is selected")],
  };
  byId("legend").replaceChildren(...legends[state.mode]());
}

function classEntry({ key, name, word }) {
  const entry = make("span");
  entry.append(make("span", `class ${key}`, name), ` ${word}`);
  return entry;
}

function scale(kind, ticks, text) {
  const box = make("div", "scale"), labels = make("div", "ticks");
  labels.append(...ticks.map((tick) => make("span", "", tick)));
  box.append(make("div", "", text), make("div", `ramp ${kind}`), labels);
  return box;
}

// ---- a token's numbers -------------------------------------------------------------------------

const nats = (value) => (value === null ? "–" : value.toFixed(3).replace("-", "−"));
const signed = (value) => (value > 0 ? `+${nats(value)}` : nats(value));

function facts(entry) {
  const { columns, number, run } = entry;
  const identity = [["token id", String(entry.id)], ["window", String(entry.window)]];
  if (number === null) return [...identity, ["", "no target: no loss here"]];
  const of = (name) => columns[name][number], below = of("first_below");
  const found = [
    ...identity,
    ["source", run.sources[of("source")]],
    ["class", page.classes[of("class")].name],
    ["loss, first and last", `${nats(of("first"))} → ${nats(of("last"))}`],
    ["fitted line", `${nats(of("start"))} → ${nats(of("end"))}`],
    ["delta", signed(of("delta"))],
    ["variance around the line", nats(of("variance"))],
    ["crossings of the mean", String(of("crossings"))],
    ["first below the mean", below < 0 ? "never" : `after ${run.tokens_seen[below].toLocaleString("en")} tokens`],
  ];
  if (columns.excess) found.push(["reference loss", nats(of("reference"))], ["excess loss, last", signed(of("excess"))]);
  if (columns.label) found.push(["labelled as", of("label")]);
  if (columns.times) found.push(["times selected", `${of("times")} of ${run.tokens_seen.length}`]);
  return found;
}

function fillTip(entry) {
  const tip = byId("tip"), head = make("div", "head"), list = make("dl");
  const token = make("bdi", entry.number === null ? "token" : `token ${classOf(entry)}`);
  fillToken(token, entry.text, entry.bytes);
  head.append(token);
  if (entry.bytes) head.append(make("span", "hex", `  bytes ⟨${entry.bytes}⟩`));
  for (const [name, value] of facts(entry)) list.append(make("dt", "", name), make("dd", "", value));
  tip.replaceChildren(head, ...contextOf(entry), ...pathOf(entry), list, probe);
}

// Losses of a shown token at some checkpoints, a byte each.
const bytesOf = new Map();
function lossesOf(run, number) {
  if (!bytesOf.has(run)) bytesOf.set(run, Uint8Array.from(atob(run.paths.bytes), (c) => c.charCodeAt(0)));
  const count = run.paths.points;
  return [...bytesOf.get(run).subarray(number * count, (number + 1) * count)].map((v) => (v / 255) * run.paths.top);
}

const PATH = { width: 240, height: 56 };
function pathOf({ number, columns, run, before }) {
  if (number === null || before !== undefined) return [];
  const box = make("canvas", "path"), density = devicePixelRatio;
  [box.width, box.height] = [PATH.width * density, PATH.height * density];
  const pen = box.getContext("2d"), found = lossesOf(run, number);
  const ends = [columns.start[number], columns.end[number]];
  const top = 1.05 * Math.max(run.mean_loss, ...found, ...ends);
  pen.scale(density, density);
  pen.lineWidth = 1.2;
  stroke(pen, [run.mean_loss, run.mean_loss], top, shade("var(--rule)"), []);
  stroke(pen, ends, top, shade("var(--quiet)"), [2, 3]);
  pen.lineWidth = 1.8;
  stroke(pen, found, top, shade(`var(--${page.classes[columns.class[number]].key})`), []);
  return [box];
}

function stroke(pen, values, top, colour, dashes) {
  pen.strokeStyle = colour;
  pen.setLineDash(dashes);
  pen.beginPath();
  values.forEach((value, index) =>
    pen.lineTo((index / (values.length - 1)) * PATH.width, PATH.height * (1 - Math.max(0, value) / top)));
  pen.stroke();
}

function contextOf(entry) {
  if (entry.before === undefined) return [];
  const box = make("div", "context");
  for (const part of ["before", "text", "after"]) {
    const inner = make("bdi", part === "text" ? "itself" : "");
    if (part === "text") fillToken(inner, entry.text, entry.bytes);
    else fillText(inner, oneLine(entry[part]));
    box.append(inner);
  }
  return [box];
}

function showTip(entry, x, y) {
  const tip = byId("tip");
  fillTip(entry);
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  const left = Math.max(8, Math.min(x, innerWidth - width - 8));
  const under = y + 12 + height <= innerHeight - 8;
  tip.classList.toggle("high", y > innerHeight / 2);
  tip.style.left = `${left}px`;
  tip.style.top = `${under ? y + 12 : Math.max(8, y - height - 28)}px`;
}

function hideTip() { byId("tip").hidden = true; }

// The arrow keys scroll as well: the token that has the focus keeps its numbers.
function followScroll() {
  const focused = document.activeElement;
  if (focused && focused.matches(".t:focus-visible") && !byId("tip").hidden) showTokenTip(focused);
  else hideTip();
}

function showTokenTip(span) {
  const place = span.getClientRects()[0];
  span.setAttribute("aria-describedby", "tip");
  showTip(span.entry, place.left, place.bottom);
}

// ---- what the reader does ----------------------------------------------------------------------

function tokenOf(event) { return event.target.closest ? event.target.closest(".t") : null; }

function move(span, step) {
  const all = [...byId("windows").querySelectorAll(".t")], next = all[all.indexOf(span) + step];
  if (!next) return;
  span.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
}

function listen() {
  const box = byId("windows");
  box.addEventListener("mouseover", (event) => { const span = tokenOf(event); if (span) showTokenTip(span); });
  box.addEventListener("mouseleave", hideTip);
  box.addEventListener("focusin", (event) => { const span = tokenOf(event); if (span) showTokenTip(span); });
  box.addEventListener("focusout", hideTip);
  box.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key], span = tokenOf(event);
    if (!step || !span) return;
    event.preventDefault();
    move(span, step);
  });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hideTip(); });
  document.addEventListener("scroll", followScroll, { passive: true });
  for (const [id, step] of [["previous", -1], ["next", 1]]) {
    byId(id).addEventListener("click", () => { state.place += step; hideTip(); showWindows(); });
  }
  for (const input of document.querySelectorAll("input[name=mode]")) {
    input.addEventListener("change", () => setMode(input.value));
  }
  byId("search").addEventListener("input", search);
  byId("search").addEventListener("keydown", (event) => {
    if (event.key === "Enter") showHit(event.shiftKey ? -1 : 1);
  });
  byId("run").addEventListener("change", (event) => showRun(Number(event.target.value)));
}

const system = matchMedia("(prefers-color-scheme: dark)");
let chosen = null; // by the button, until then the system's
const isDark = () => (chosen === null ? system.matches : chosen === "dark");

function showTheme() {
  document.documentElement.style.colorScheme = chosen === null ? "" : chosen;
  byId("theme").textContent = isDark() ? "Light" : "Dark";
  redraw();
}

byId("theme").addEventListener("click", () => { chosen = isDark() ? "light" : "dark"; showTheme(); });
system.addEventListener("change", showTheme);
showTheme();
for (const [section, figures] of Object.entries({ ...page.sweep, ...page.compared })) fill(section, figures);
if (page.runs.length) {
  byId("runs").hidden = page.runs.length === 1;
  listen();
  showRun(0);
}
showContents();
document.getElementById(location.hash.slice(1))?.scrollIntoView(); // the figures above have moved it

// ---- on paper ----------------------------------------------------------------------------------

// The paper is laid out when it is too late to draw for it, so figures have widths of its own.
const PRINTED = { wide: 640, narrow: 310 }; // pixels, as in page.css

addEventListener("beforeprint", () => {
  for (const box of document.querySelectorAll("details")) box.open = true;
  for (const plot of document.querySelectorAll(".plot")) {
    const width = plot.closest(".three, .four") ? PRINTED.narrow : PRINTED.wide;
    if (plot.figure) Plotly.relayout(plot, { width, autosize: false });
  }
});
addEventListener("afterprint", redraw);


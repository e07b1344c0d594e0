"""Markup, style and script of the page that `page.render` fills. Nothing here loads anything."""

# matplotlib's cividis at 17 points: even steps look even, and colour-blind readers see the same steps.
COLOURS = (
    "#00224e", "#002e6a", "#1a386f", "#32436d", "#434e6c", "#535a6d", "#61656f", "#6f7073", "#7d7c78",
    "#8c8878", "#9b9476", "#aba072", "#bcae6c", "#cdbb63", "#dec958", "#f0d846", "#fee838",
)  # fmt: skip

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src '[[script_hash]]'; style-src \
'[[style_hash]]'; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>[[title]]</title>
<style>[[style]]</style>
</head>
<body>
<header>
<h1>Depth weights</h1>
<p>How much each mixture takes from each earlier source: a row per decoder layer, a column per source, the embedding
first. Each row sums to 1. Colours follow the square root of the weight, so that small ones can be told apart.</p>
<div class="scale"><div class="bar"></div><ol><li class="t0">0</li><li class="t1">0.05</li><li class="t2">0.2</li><li
 class="t3">0.5</li><li class="t4">1</li></ol></div>
<p class="hint">Hatched: not there yet. Marked in the corner: the partial sum of the sublayer's own block.</p>
<noscript><p>The heatmaps need JavaScript; the tables do not.</p></noscript>
</header>
<main>[[models]]</main>
<div id="tip" role="tooltip" hidden></div>
<script type="application/json" id="data">[[data]]</script>
<script>[[script]]</script>
</body>
</html>
"""

STYLE = (
    """
:root { --back: #ffffff; --text: #1b1f24; --soft: #57606a; --line: #d0d7de; --card: #f6f8fa;
  --focus: #0969da; }
@media (prefers-color-scheme: dark) {
  :root { --back: #14171c; --text: #e6e9ed; --soft: #a3acb8; --line: #3a424d; --card: #1e232a;
    --focus: #6cb2ff; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem 1.25rem 3rem; max-width: 1500px; background: var(--back); color: var(--text);
  font: 15px/1.45 system-ui, "DejaVu Sans", sans-serif; }
h1 { margin: .2rem 0; font-size: 1.5rem; }
h2 { margin: 2rem 0 .2rem; padding-top: 1rem; border-top: 1px solid var(--line); font-size: 1.25rem;
  overflow-wrap: anywhere; }
h3 { margin: 1.2rem 0 .4rem; font-size: 1.05rem; }
p { margin: .3rem 0; }
header p { max-width: 75ch; }
.facts, .hint, .readout { color: var(--soft); overflow-wrap: anywhere; }
.readout { min-height: 1.5em; }
.showing { font-weight: 600; overflow-wrap: anywhere; }
.scale { width: 320px; max-width: 90%; margin: .6rem 12px; }
.bar { height: 14px; border-radius: 3px; background: linear-gradient(to right, """
    + ", ".join(COLOURS)
    + """); }
.scale ol { position: relative; height: 1.4em; margin: 0; padding: 0; list-style: none; font-size: .8rem; }
.scale li { position: absolute; transform: translateX(-50%); }
.t0 { left: 0; } .t1 { left: 22.36%; } .t2 { left: 44.72%; } .t3 { left: 70.71%; } .t4 { left: 100%; }
.tokens { display: flex; flex-wrap: wrap; gap: 3px; margin: .6rem 0 .2rem; max-height: 10.5rem; overflow-y: auto;
  padding: 3px; }
.tokens button { padding: .1rem .35rem; border: 1px solid var(--line); border-radius: 4px; background: var(--card);
  color: var(--text); font: 13px/1.5 ui-monospace, "DejaVu Sans Mono", monospace; white-space: pre; cursor: pointer;
  max-width: 20rem; overflow: hidden; text-overflow: ellipsis; }
.tokens button.all { font-family: inherit; }
.tokens button[aria-checked="true"] { background: var(--text); color: var(--back); border-color: var(--text); }
:focus-visible { outline: 3px solid var(--focus); outline-offset: 1px; }
.panels { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: .5rem 1.5rem; }
.panel { margin: 0; min-width: 0; }
.panel.output { grid-column: 1 / -1; }
figcaption { font-weight: 600; margin: .3rem 0; }
.scroll { overflow-x: auto; }
.tall { max-height: 32rem; overflow-y: auto; }
canvas:focus-visible { outline-offset: -3px; }
canvas { display: block; touch-action: pan-x pan-y; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:last-child, th:last-child { text-align: left; }
th { font-weight: 600; }
thead th { vertical-align: bottom; }
.tall thead th { position: sticky; top: 0; background: var(--back); }
details { margin: .6rem 0; }
summary { cursor: pointer; }
#tip { position: fixed; z-index: 2; pointer-events: none; padding: .4rem .6rem; border: 1px solid var(--line);
  border-radius: 6px; background: var(--card); color: var(--text); font-size: .85rem; line-height: 1.4;
  width: max-content; max-width: min(22rem, 100vw - 8px); box-shadow: 0 2px 10px rgb(0 0 0 / .25); }
#tip[hidden] { display: none; }
#tip div { overflow-wrap: anywhere; }
#tip div:first-child { font-weight: 600; }
@media (max-width: 800px) { .panels { grid-template-columns: minmax(0, 1fr); } }
"""
)

SCRIPT = r"""
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const tip = document.getElementById("tip");
const FONT = '12px system-ui, "DejaVu Sans", sans-serif';
const KINDS = {attention: "before attention", mlp: "before MLP", output: "output"};
const map = data.colours.map(hex => [1, 3, 5].map(at => parseInt(hex.slice(at, at + 2), 16)));

function colour(weight) {
  const place = Math.sqrt(Math.min(1, Math.max(0, weight))) * (map.length - 1);
  const low = Math.min(map.length - 2, Math.floor(place));
  return map[low].map((value, part) => Math.round(value + (map[low + 1][part] - value) * (place - low)));
}

function signed(change) {
  return (change < 0 ? "" : "+") + change.toFixed(4);
}

function theme(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

class Panel {
  constructor(canvas, model, view) {
    this.canvas = canvas;
    this.model = model;
    this.view = view;
    this.rows = [];
    model.rows.forEach((row, index) => { if (row.kind === canvas.dataset.panel) this.rows.push(index); });
    this.columns = model.short.length;
    this.cursor = null;
    canvas.addEventListener("pointermove", event => this.point(event));
    canvas.addEventListener("pointerdown", event => this.point(event));
    canvas.addEventListener("pointerleave", () => this.leave());
    canvas.addEventListener("keydown", event => this.key(event));
    canvas.addEventListener("focus", () => { if (canvas.matches(":focus-visible")) this.select(0, 0); });
    canvas.addEventListener("blur", () => this.leave());
  }

  label(row) {
    return this.rows.length === 1 && this.model.rows[this.rows[row]].layer === null
      ? "output" : "layer " + this.model.rows[this.rows[row]].layer;
  }

  weights(row) {
    const index = this.rows[row];
    return this.view.token < 0 ? this.model.rows[index].mean : this.model.tokenWeights[index][this.view.token];
  }

  draw() {
    const canvas = this.canvas, context = canvas.getContext("2d"), ratio = window.devicePixelRatio || 1;
    context.font = FONT;
    const widest = texts => Math.ceil(Math.max(...texts.map(text => context.measureText(text).width)));
    // As wide as the widest label of any panel, so that the panels' columns are in line.
    this.left = widest(["output", "layer " + this.model.rows[this.model.rows.length - 2].layer]) + 8;
    this.top = 4;
    const available = canvas.parentElement.clientWidth - this.left - 12;
    this.width = Math.max(4, Math.min(64, Math.floor(available / this.columns)));
    this.height = this.rows.length <= 32 ? 21 : 13;
    const inner = this.width * this.columns, below = this.top + this.height * this.rows.length;
    const outerWidth = this.left + inner + 12, outerHeight = below + 20;
    canvas.width = Math.round(outerWidth * ratio);
    canvas.height = Math.round(outerHeight * ratio);
    canvas.style.width = outerWidth + "px";
    canvas.style.height = outerHeight + "px";
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    this.hatch(context, inner, below - this.top);
    const gap = this.width >= 12 ? 1 : 0;
    context.textBaseline = "middle";
    context.textAlign = "center";
    context.font = "11px system-ui, \"DejaVu Sans\", sans-serif";
    const written = this.width >= 28 && this.height >= 18;
    this.rows.forEach((index, row) => {
      const weights = this.weights(row), y = this.top + row * this.height;
      const last = weights.length - 1;
      weights.forEach((weight, column) => {
        const x = this.left + column * this.width;
        context.fillStyle = "rgb(" + colour(weight).join(" ") + ")";
        context.fillRect(x, y, this.width - gap, this.height - gap);
        context.fillStyle = weight > 0.25 ? "#000" : "#fff";
        if (written) context.fillText(weight.toFixed(2), x + this.width / 2, y + this.height / 2 + 1);
        if (column === last && this.model.rows[index].partial) {
          const size = Math.min(8, this.width - gap);
          context.beginPath();
          context.moveTo(x, y);
          context.lineTo(x + size, y);
          context.lineTo(x, y + size);
          context.fill();
        }
      });
    });
    context.font = FONT;
    context.fillStyle = theme("--text");
    context.textAlign = "right";
    const rowStep = Math.ceil(15 / this.height);
    for (let row = 0; row < this.rows.length; row += rowStep) {
      context.fillText(this.label(row), this.left - 5, this.top + (row + 0.5) * this.height + 1);
    }
    context.textAlign = "center";
    const names = this.model.short.slice(0, this.columns), step = Math.ceil((widest(names) + 8) / this.width);
    for (let column = 0; column < this.columns; column += step) {
      context.fillText(names[column], Math.max(this.left + (column + 0.5) * this.width, 14), below + 11);
    }
    if (this.cursor) this.frame(context, this.cursor.row, this.cursor.column);
  }

  hatch(context, width, height) {
    context.save();
    context.beginPath();
    context.rect(this.left, this.top, width, height);
    context.clip();
    context.strokeStyle = theme("--line");
    context.lineWidth = 1;
    context.beginPath();
    for (let x = this.left - height; x < this.left + width; x += 8) {
      context.moveTo(x, this.top + height);
      context.lineTo(x + height, this.top);
    }
    context.stroke();
    context.restore();
  }

  frame(context, row, column) {  // white within black, around the cell: seen on every colour
    const x = this.left + column * this.width, y = this.top + row * this.height;
    for (const [style, width] of [["#000", 4], ["#fff", 2]]) {
      context.strokeStyle = style;
      context.lineWidth = width;
      context.strokeRect(x - 2, y - 2, this.width + 4, this.height + 4);
    }
  }

  point(event) {
    const box = this.canvas.getBoundingClientRect();
    const column = Math.floor((event.clientX - box.left - this.left) / this.width);
    const row = Math.floor((event.clientY - box.top - this.top) / this.height);
    const inside = row >= 0 && row < this.rows.length && column >= 0 && column < this.weights(row).length;
    if (inside) this.select(row, column); else this.leave();
  }

  key(event) {
    if (event.key === "Escape") { this.leave(); return; }
    const moves = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1],
      Home: [0, -Infinity], End: [0, Infinity], PageUp: [-10, 0], PageDown: [10, 0]};
    const move = moves[event.key];
    if (!move || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    const from = this.cursor || {row: 0, column: 0};
    const row = Math.min(this.rows.length - 1, Math.max(0, from.row + move[0]));
    const column = Math.min(this.weights(row).length - 1, Math.max(0, from.column + move[1]));
    const holder = this.canvas.parentElement, x = this.left + column * this.width;
    holder.scrollLeft = Math.min(x - this.width, Math.max(holder.scrollLeft, x + 2 * this.width - holder.clientWidth));
    this.select(row, column);
  }

  select(row, column) {
    const moved = !this.cursor || this.cursor.row !== row || this.cursor.column !== column;
    this.cursor = {row, column};
    if (moved) this.draw();
    const lines = this.describe(row, column);
    tip.replaceChildren(...lines.map(line => {
      const element = document.createElement("div");
      element.textContent = line;
      return element;
    }));
    tip.hidden = false;
    this.view.readout.textContent = lines.join("; ");
    this.place();
  }

  place() {
    const {row, column} = this.cursor;
    const box = this.canvas.getBoundingClientRect(), size = tip.getBoundingClientRect();
    const x = box.left + this.left + (column + 1) * this.width + 8;
    const y = box.top + this.top + (row + 1) * this.height + 8;
    tip.style.left = Math.max(4, Math.min(x, innerWidth - size.width - 4)) + "px";
    tip.style.top = Math.max(4, y + size.height > innerHeight - 4 ? y - size.height - this.height - 16 : y) + "px";
  }

  describe(row, column) {
    const entry = this.model.rows[this.rows[row]], newest = column === entry.mean.length - 1;
    const note = newest ? (entry.partial ? ", partial sum, newest" : ", newest") : "";
    const lines = [
      (entry.layer === null ? "output" : "layer " + entry.layer + ", " + KINDS[entry.kind]),
      "source: " + this.model.sources[column] + note];
    if (this.view.token >= 0) {
      lines.push("weight " + this.weights(row)[column].toFixed(4) + " for token " + this.view.token + " "
        + this.model.tokens[this.view.token]);
    }
    lines.push("mean weight " + entry.mean[column].toFixed(4) + ", std over tokens " + entry.std[column].toFixed(4),
      "min " + entry.min[column].toFixed(4) + ", max " + entry.max[column].toFixed(4));
    if (entry.without) {
      const random = entry.control.reduce((sum, value) => sum + value, 0) / entry.control.length;
      lines.push("loss without it " + signed(entry.without[column]) + ", without a random source " + signed(random));
    }
    return lines;
  }

  leave() {
    tip.hidden = true;
    if (!this.cursor) return;
    this.cursor = null;
    this.draw();
  }
}

const panels = [];
for (const section of document.querySelectorAll("section.model")) {
  const model = data.models[section.dataset.model];
  const view = {token: -1, readout: section.querySelector(".readout")};
  const own = [...section.querySelectorAll("canvas")].map(canvas => new Panel(canvas, model, view));
  panels.push(...own);
  const buttons = [...section.querySelectorAll(".tokens button")], showing = section.querySelector(".showing");
  const mean = showing.textContent;
  const choose = button => {
    for (const each of buttons) {
      each.setAttribute("aria-checked", String(each === button));
      each.tabIndex = each === button ? 0 : -1;
    }
    view.token = Number(button.dataset.token);
    showing.textContent = view.token < 0 ? mean : "Showing token " + view.token + ": " + model.tokens[view.token];
    view.readout.textContent = "";  // it was about what was shown before
    for (const panel of own) panel.draw();
  };
  buttons.forEach((button, index) => {
    button.addEventListener("click", () => choose(button));
    button.addEventListener("keydown", event => {
      const last = buttons.length - 1;
      const target = {ArrowRight: index + 1, ArrowDown: index + 1, ArrowLeft: index - 1, ArrowUp: index - 1,
        Home: 0, End: last}[event.key];
      if (target === undefined) return;
      event.preventDefault();
      const next = buttons[(target + buttons.length) % buttons.length];
      next.focus();
      choose(next);
    });
  });
}
const drawAll = () => { for (const panel of panels) panel.draw(); };
window.addEventListener("resize", drawAll);
window.addEventListener("scroll", () => { for (const panel of panels) if (panel.cursor) panel.place(); },
  {passive: true, capture: true});
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
drawAll();
"""

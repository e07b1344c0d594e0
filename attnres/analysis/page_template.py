"""Markup (jinja2), style and script of the page that `page.render` fills. The page loads no other file."""

PAGE = """
{%- set titles = {"attention": "before attention", "mlp": "before MLP", "output": "output", "all": "all"} -%}
{% macro table(labels) %}
<div class="scroll" tabindex="0"><table><thead><tr>{% for label in labels %}<th scope="col">{{ label }}</th>{% endfor %}
</tr></thead><tbody>{{ caller() }}</tbody></table></div>
{% endmacro %}
{% macro numbers(row) %}
<td>{{ "%.3f" % row.newest }}</td><td>{{ "%.3f" % row.embedding }}</td><td>{{ "%.3f" % row.entropy }}</td><td>{{
"%.3f" % row.effective_sources }}</td>
{%- endmacro %}
{% set measures = ["weight on newest source", "on embedding", "entropy (nats)", "effective sources"] %}
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src '{{ script_hash }}'; style-src \
'{{ style_hash }}'; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Depth weights: {{ models | map(attribute="weights.model") | join(", ") }}</title>
<style>{{ style | safe }}</style>
</head>
<body>
<h1>Depth weights</h1>
<p>How much each mixture takes from each earlier source: a row per decoder layer, a column per source, the embedding
first. Each row sums to 1. Colours follow the square root of the weight, so that small weights can be told apart.</p>
<div class="scale"><span>0</span><span>0.06</span><span>0.25</span><span>0.56</span><span>1</span></div>
<p class="hint">Hatched: no such source yet. Marked in the corner: the partial sum of the sublayer's own block.</p>
{% for model in models %}
{% set weights, summary, effect = model.weights, model.summary, model.effect %}
<section class="model">
<h2>{{ weights.model }}</h2>
<p class="hint">{{ weights.description }}, {{ "{:,}".format(weights.context) }} at a time ({{ weights.family }})</p>
{% if weights.tokens %}
<div class="tokens" role="radiogroup" aria-label="which token's weights to show">
<label><input type="radio" name="{{ loop.index0 }}" value="-1" autocomplete="off" checked><span>mean</span></label>
{% set model_number = loop.index0 %}
{% for token in weights.tokens %}
<label title="token {{ loop.index0 }}, id {{ token.id }}"><input type="radio" name="{{ model_number }}" value="{{
loop.index0 }}" autocomplete="off"><span><bdi>{{ token.text | visible }}</bdi></span></label>
{% endfor %}
</div>
<p class="hint">The first {{ weights.tokens | length }} tokens: choose one to see its own weights.</p>
{% endif %}
<p class="showing" aria-live="polite">Showing the mean over all {{ "{:,}".format(weights.num_tokens) }} tokens.</p>
<div class="panels">
{% for kind in ("attention", "mlp", "output") %}
<figure class="{{ kind }}"><figcaption>{{ titles[kind] }}</figcaption><div class="heatmap" data-panel="{{ kind }}"
 tabindex="0" role="application" aria-roledescription="heatmap" aria-label="{{ titles[kind] }}: heatmap of depth \
weights, a row per mixture, a column per source; arrow keys move"></div></figure>
{% endfor %}
</div>
<p class="hint">Point at a cell, or focus a panel and use the arrow keys, to see its numbers.</p>
<h3>Summary</h3>
{% call table(["mixtures", "how many"] + measures + ["ignoring a source"]) %}
{% for kind, row in summary.overall.items() %}
<tr><th scope="row">{{ titles[kind] }}</th><td>{{ row.mixtures }}</td>{{ numbers(row) }}<td>{{ row.ignoring }} of {{
row.mixtures }}</td></tr>
{% endfor %}
{% endcall %}
<p class="hint">Means over the mixtures of two sources or more. Entropy: mean over tokens; effective sources:
exp(entropy). A source is ignored: {{ summary.ignored_rule }}.</p>
<details><summary>Every mixture</summary>
{% call table(["mixture", "sources"] + measures + ["ignored sources"]) %}
{% for row in summary.mixtures %}
<tr><th scope="row">{{ row.name }}</th><td>{{ row.sources }}</td>{{ numbers(row) }}<td>{{
row.ignored[:6] | join(", ") or "none" }}{{ ", ..." if row.ignored | length > 6 }}</td></tr>
{% endfor %}
{% endcall %}
</details>
{% if effect %}
<h3>What each source is worth</h3>
<p class="hint">Change of the loss, in nats per token, when one source of one mixture is left out and the weights of the
others are renormalised, over {{ "{:,}".format(effect.tokens) }} tokens (loss {{ "%.4f" % effect.loss }}). Beside it the
control: at every token of the same mixture a source drawn at random is left out. A large weight is not a large
effect.</p>
<details><summary>Every source of every mixture</summary>
{% call table(["mixture", "source left out", "mean weight", "change of the loss", "without a random source"]) %}
{% for change, mixture, source, weight, control in worth(weights, effect) %}
<tr><th scope="row">{{ mixture }}</th><td>{{ source }}</td><td>{{ "%.3f" % weight }}</td><td>{{
"%+.4f" % change }}</td><td>{{ "%+.4f" % (control | sum / control | length) }} ({{ "%+.4f" % (control | min) }} to {{
"%+.4f" % (control | max) }})</td></tr>
{% endfor %}
{% endcall %}
</details>
{% endif %}
</section>
{% endfor %}
<div id="tip" role="status"></div>
<script type="application/json" id="data">{{ data | tojson }}</script>
<script>{{ script | safe }}</script>
</body>
</html>
"""

STYLE = """
:root { --back: #ffffff; --text: #1b1f24; --soft: #57606a; --line: #d0d7de; --card: #f6f8fa; --focus: #0969da; }
@media (prefers-color-scheme: dark) {
  :root { --back: #14171c; --text: #e6e9ed; --soft: #a3acb8; --line: #3a424d; --card: #1e232a; --focus: #6cb2ff; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem 1.25rem 3rem; max-width: 1500px; background: var(--back); color: var(--text);
  font: 15px/1.45 system-ui, "DejaVu Sans", sans-serif; overflow-wrap: anywhere; }
h2 { padding-top: 1rem; border-top: 1px solid var(--line); }
p { margin: .3rem 0; max-width: 100ch; }
.hint { color: var(--soft); }
.showing, figcaption { font-weight: 600; }
.scale { display: flex; justify-content: space-between; width: 320px; max-width: 100%; padding-top: 14px;
  font-size: .8rem; background: top / 100% 14px no-repeat; }
.tokens { display: flex; flex-wrap: wrap; gap: 3px; max-height: 10.5rem; overflow-y: auto; padding: 3px; }
.tokens label { position: relative; cursor: pointer; }
.tokens input { position: absolute; opacity: 0; }
.tokens span { display: block; padding: .1rem .35rem; border: 1px solid var(--line); border-radius: 4px;
  background: var(--card); font: 13px/1.5 ui-monospace, "DejaVu Sans Mono", monospace; white-space: pre;
  max-width: 20rem; overflow: hidden; text-overflow: ellipsis; }
.tokens :checked + span { background: var(--text); color: var(--back); }
:focus-visible, .tokens :focus-visible + span { outline: 3px solid var(--focus); outline-offset: -2px; }
.panels { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: .5rem 1.5rem; }
@media (max-width: 800px) { .panels { grid-template-columns: minmax(0, 1fr); } }
figure { margin: 0; }
.output { grid-column: 1 / -1; }
.heatmap { overflow-x: auto; padding: 4px 16px 4px 0; font-size: 12px; line-height: var(--height); }
.row { display: flex; }
.row > :first-child { flex: 0 0 60px; padding-right: 5px; text-align: right; }
.row > :last-child { flex: none; display: flex; width: calc(var(--columns) * var(--width)); }
.cells { background: repeating-linear-gradient(135deg, transparent 0 6px, var(--line) 6px 7px); }
.cells span, .names span { flex: 0 0 var(--width); min-width: 0; display: flex; justify-content: center;
  white-space: nowrap; }
.cells span { border: solid var(--back); border-width: 0 1px 1px 0; height: var(--height); font-size: var(--font);
  overflow: hidden; }
.cells .partial { background-image: linear-gradient(135deg, currentColor 5.5px, transparent 5.5px); }
.cells .current { border-color: #000; outline: 2px solid #fff; box-shadow: 0 0 0 3px #000; z-index: 1; }
.scroll { max-height: 32rem; overflow: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem; border-bottom: 1px solid var(--line); text-align: right; overflow-wrap: normal; }
th:first-child, td:last-child, th:last-child { text-align: left; }
thead th { position: sticky; top: 0; background: var(--back); vertical-align: bottom; }
summary { cursor: pointer; }
#tip { position: fixed; z-index: 2; pointer-events: none; padding: .4rem .6rem; border: 1px solid var(--line);
  border-radius: 6px; background: var(--card); font-size: .85rem; width: max-content;
  max-width: min(22rem, 100vw - 8px); box-shadow: 0 2px 10px rgb(0 0 0 / .25); }
#tip:empty { visibility: hidden; }
#tip div:first-child { font-weight: 600; }
"""

SCRIPT = r"""
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const tip = document.getElementById("tip");
let current = null;  // the cell that is described

function element(parent, name, className = "", text = "") {
  const child = parent.appendChild(document.createElement(name));
  child.className = className;
  child.textContent = text;
  return child;
}

function leave() {
  tip.replaceChildren();
  if (current) current.classList.remove("current");
  current = null;
}

function placeTip() {
  if (!current) return;
  const box = current.getBoundingClientRect(), size = tip.getBoundingClientRect();
  const below = box.bottom + 8 + size.height < innerHeight - 4;
  tip.style.left = Math.max(4, Math.min(box.right + 8, innerWidth - size.width - 4)) + "px";
  tip.style.top = Math.max(4, below ? box.bottom + 8 : box.top - size.height - 8) + "px";
}

class Panel {
  constructor(map, model, view) {
    Object.assign(this, {map, model, view});
    this.rows = model.rows.map((row, index) => index).filter(index => model.rows[index].kind === map.dataset.panel);
    this.cells = this.rows.map(index => {
      const {layer, mean, partial} = model.rows[index], row = element(map, "div", "row");
      element(row, "span", "", layer === null ? "output" : "layer " + layer);
      const cells = element(row, "div", "cells");
      return mean.map((_, column) => element(cells, "span", partial && column === mean.length - 1 ? "partial" : ""));
    });
    const last = element(map, "div", "row");
    element(last, "span");
    const names = element(last, "div", "names");
    this.names = model.short.map(() => element(names, "span"));
    this.places = new Map(this.cells.flatMap((cells, row) => cells.map((cell, column) => [cell, [row, column]])));
    const point = ({target}) => {
      if (!this.places.has(target)) leave();
      else if (target !== current) this.select(...this.places.get(target));
    };
    map.addEventListener("pointermove", point);
    map.addEventListener("pointerdown", point);
    map.addEventListener("pointerleave", leave);
    map.addEventListener("keydown", event => this.key(event));
    map.addEventListener("focus", () => { if (map.matches(":focus-visible")) this.select(0, 0); });
    map.addEventListener("blur", leave);
  }

  resize() {
    const {map, names, model} = this, columns = names.length;
    const width = Math.max(4, Math.min(64, Math.floor((map.clientWidth - 76) / columns)));
    const height = this.rows.length <= 32 ? 21 : 13;
    const font = width < 28 || height < 18 ? 0 : 11;
    const sizes = {columns, width: width + "px", height: height + "px", font: font + "px"};
    for (const [name, value] of Object.entries(sizes)) map.style.setProperty("--" + name, value);
    const step = Math.ceil((8 + 7 * Math.max(...model.short.map(name => name.length))) / width);
    names.forEach((name, column) => { name.textContent = column % step ? "" : model.short[column]; });
  }

  weights(row) {
    const index = this.rows[row];
    return this.view.token < 0 ? this.model.rows[index].mean : this.model.tokenWeights[index][this.view.token];
  }

  paint() {
    this.cells.forEach((cells, row) => cells.forEach((cell, column) => {
      const weight = this.weights(row)[column];
      cell.textContent = weight.toFixed(2);
      cell.style.color = weight > 0.25 ? "#000" : "#fff";
      cell.style.backgroundColor = data.colours[Math.round(255 * Math.sqrt(Math.min(1, Math.max(0, weight))))];
    }));
  }

  key(event) {
    if (event.key === "Escape") leave();
    const move = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1], Home: [0, -Infinity],
      End: [0, Infinity], PageUp: [-10, 0], PageDown: [10, 0]}[event.key];
    if (!move || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    const from = this.places.get(current) || [0, 0];
    const row = Math.min(this.cells.length - 1, Math.max(0, from[0] + move[0]));
    const column = Math.min(this.cells[row].length - 1, Math.max(0, from[1] + move[1]));
    this.cells[row][column].scrollIntoView({block: "nearest", inline: "nearest"});
    this.select(row, column);
  }

  select(row, column) {
    const entry = this.model.rows[this.rows[row]], newest = column === entry.mean.length - 1, {token} = this.view;
    const note = newest ? (entry.partial ? ", partial sum, newest" : ", newest") : "";
    const title = this.map.previousElementSibling.textContent;
    const lines = [entry.layer === null ? title : "layer " + entry.layer + ", " + title,
      "source: " + this.model.sources[column] + note];
    if (token >= 0) {
      const weight = this.weights(row)[column].toFixed(4);
      lines.push("weight " + weight + " for token " + token + " " + this.model.tokens[token]);
    }
    lines.push("mean weight " + entry.mean[column].toFixed(4) + ", std over tokens " + entry.std[column].toFixed(4),
      "min " + entry.min[column].toFixed(4) + ", max " + entry.max[column].toFixed(4));
    if (entry.without) {
      const random = entry.control.reduce((sum, value) => sum + value, 0) / entry.control.length;
      const signed = change => (change < 0 ? "" : "+") + change.toFixed(4);
      lines.push("loss without it " + signed(entry.without[column]) + ", without a random source " + signed(random));
    }
    leave();
    current = this.cells[row][column];
    current.classList.add("current");
    for (const line of lines) element(tip, "div", "", line);
    placeTip();
  }
}

const panels = [...document.querySelectorAll("section.model")].flatMap((section, number) => {
  const model = data.models[number], showing = section.querySelector(".showing"), mean = showing.textContent;
  const view = {token: -1};
  const own = [...section.querySelectorAll(".heatmap")].map(map => new Panel(map, model, view));
  section.addEventListener("change", event => {
    view.token = Number(event.target.value);
    showing.textContent = view.token < 0 ? mean : "Showing token " + view.token + ": " + model.tokens[view.token];
    for (const panel of own) panel.paint();
  });
  return own;
});
const resize = () => { for (const panel of panels) panel.resize(); };
window.addEventListener("resize", resize);
window.addEventListener("scroll", placeTip, {passive: true, capture: true});
document.querySelector(".scale").style.backgroundImage = "linear-gradient(to right, " + data.colours.join() + ")";
resize();
for (const panel of panels) panel.paint();
"""

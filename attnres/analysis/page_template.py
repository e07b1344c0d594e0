"""Markup (jinja2), style and script of the page that `page.render` fills. The page loads no other file."""

PAGE = """
{%- set titles = {"attention": "before attention", "mlp": "before MLP", "output": "output", "all": "all"} -%}
{% macro table(labels) %}
<div class="scroll" tabindex="0"><table><thead><tr>{% for label in labels %}<th scope="col">{{ label }}</th>{% endfor %}
</tr></thead><tbody>{{ caller() }}</tbody></table></div>
{% endmacro %}
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
{% set columns = weights.short_sources | length %}
{% set dense, step = columns > 18 or weights.num_layers > 32, (columns / 18) | round(0, "ceil") | int %}
<section class="model">
<h2>{{ weights.model }}</h2>
<p class="hint">{{ weights.description }}, {{ "{:,}".format(weights.context) }} at a time ({{ weights.family }})</p>
<label>Weights of <select autocomplete="off">
<option value="-1">the mean over all {{ "{:,}".format(weights.num_tokens) }} tokens</option>
{% for token in weights.tokens %}
<option value="{{ loop.index0 }}">token {{ loop.index0 }}: {{ token.text | visible }}</option>
{% endfor %}
</select></label>
<div class="panels">
{% for kind in ("attention", "mlp", "output") %}
<figure class="{{ kind }}"><figcaption>{{ titles[kind] }}</figcaption><div class="heatmap" data-panel="{{ kind }}"
 tabindex="0" role="application" aria-roledescription="heatmap" aria-label="{{ titles[kind] }}: heatmap of depth \
weights, a row per mixture, a column per source; arrow keys move"><table{{ " class=dense" if dense }}><tbody>
{% for mixture in weights.mixtures if mixture.kind == kind %}
<tr data-mixture="{{ weights.mixtures.index(mixture) }}"><th>{{ "output" if mixture.layer is none else
"layer %d" % mixture.layer }}</th>{% for _ in mixture.mean %}<td{{ " class=partial" if mixture.partial and loop.last
}}></td>{% endfor %}</tr>
{% endfor %}
</tbody><tfoot><tr><th></th>{% for name in weights.short_sources %}<th>{{ name if loop.index0 % step == 0 }}</th>{%
endfor %}</tr></tfoot></table></div></figure>
{% endfor %}
</div>
<p class="hint">Point at a cell, or focus a panel and use the arrow keys, to see its numbers.</p>
<h3>Summary</h3>
{% call table(["mixtures", "how many", "weight on newest source", "on embedding", "entropy (nats)", "effective sources",
"ignoring a source"]) %}
{% for kind, row in summary.overall.items() %}
<tr><th scope="row">{{ titles[kind] }}</th><td>{{ row.mixtures }}</td>
{% for number in (row.newest, row.embedding, row.entropy, row.effective_sources) %}<td>{{ "%.3f" % number }}</td>{%
endfor %}<td>{{ row.ignoring }} of {{ row.mixtures }}</td></tr>
{% endfor %}
{% endcall %}
<p class="hint">Means over the mixtures of two sources or more. Entropy: mean over tokens; effective sources:
exp(entropy). A source is ignored: {{ summary.ignored_rule }}.</p>
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
figcaption { font-weight: 600; }
select { max-width: 100%; margin-bottom: .5rem; font: inherit; }
.scale { display: flex; justify-content: space-between; width: 320px; max-width: 100%; padding-top: 14px;
  font-size: .8rem; background: top / 100% 14px no-repeat; }
:focus-visible { outline: 3px solid var(--focus); outline-offset: -2px; }
.panels { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: .5rem 1.5rem; }
@media (max-width: 800px) { .panels { grid-template-columns: minmax(0, 1fr); } }
figure { margin: 0; }
.output { grid-column: 1 / -1; }
.heatmap { overflow-x: auto; padding: 4px 16px 4px 4px; }
.heatmap table { border-spacing: 0; font-size: 12px; line-height: 1;
  background: repeating-linear-gradient(135deg, transparent 0 6px, var(--line) 6px 7px); }
.heatmap th { padding: 0 5px 0 0; background: var(--back); font-weight: normal; text-align: right;
  white-space: nowrap; }
.heatmap td { width: 64px; height: 21px; padding: 0 1px; border: solid var(--back); border-width: 0 1px 1px 0;
  font-size: 11px; text-align: center; }
.heatmap tfoot th + th { width: 64px; height: 21px; padding: 0; text-align: center; }
.heatmap .dense td { height: 13px; padding: 0; font-size: 0; }
.heatmap .dense tfoot th + th { max-width: 0; text-align: left; }
.heatmap .partial { background-image: linear-gradient(135deg, currentColor 5.5px, transparent 5.5px); }
.heatmap .current { outline: 2px solid #000; box-shadow: inset 0 0 0 2px #fff; }
.scroll { max-height: 32rem; overflow: auto; }
table { font-variant-numeric: tabular-nums; overflow-wrap: normal; }
.scroll table { border-collapse: collapse; font-size: .9rem; }
.scroll :is(th, td) { padding: .2rem .7rem; border-bottom: 1px solid var(--line); text-align: right; }
.scroll :is(th:first-child, td:last-child, th:last-child) { text-align: left; }
thead th { position: sticky; top: 0; background: var(--back); vertical-align: bottom; }
summary { cursor: pointer; }
#tip { position: fixed; z-index: 1; right: 4px; bottom: 4px; max-width: calc(100vw - 8px); padding: .4rem .6rem;
  border: 1px solid var(--line); border-radius: 6px; background: var(--card); font-size: .85rem; white-space: pre-line;
  pointer-events: none; }
#tip.above { top: 4px; bottom: auto; }
#tip:empty { visibility: hidden; }
#tip::first-line { font-weight: 600; }
"""

SCRIPT = r"""
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const tip = document.getElementById("tip");
let current = null;  // the cell that is described

function leave() {
  tip.textContent = "";
  if (current) current.classList.remove("current");
  current = null;
}

document.querySelectorAll("section").forEach((section, number) => {
  const model = data.models[number], choice = section.querySelector("select");
  const cells = section.querySelectorAll(".heatmap td");

  function weightOf(cell) {
    const index = cell.parentElement.dataset.mixture, token = Number(choice.value);
    return (token < 0 ? model.mixtures[index].mean : model.tokenWeights[index][token])[cell.cellIndex - 1];
  }

  function paint() {
    for (const cell of cells) {
      const weight = weightOf(cell);
      cell.textContent = weight.toFixed(2);
      cell.style.color = weight > 0.25 ? "#000" : "#fff";
      cell.style.backgroundColor = data.colours[Math.round(255 * Math.sqrt(weight))];
    }
  }

  function select(cell) {
    leave();
    if (!cell) return;
    current = cell;
    cell.classList.add("current");
    tip.classList.toggle("above", cell.getBoundingClientRect().top > innerHeight / 2);
    const mixture = model.mixtures[cell.parentElement.dataset.mixture], source = cell.cellIndex - 1;
    const [mean, std, min, max] = ["mean", "std", "min", "max"].map(name => mixture[name][source].toFixed(4));
    const newest = source === mixture.mean.length - 1 ? mixture.partial ? ", partial sum, newest" : ", newest" : "";
    const lines = [mixture.name, "source: " + model.sources[source] + newest];
    if (choice.selectedIndex > 0) {
      lines.push("weight " + weightOf(cell).toFixed(4) + " for " + choice.selectedOptions[0].text);
    }
    lines.push("mean weight " + mean + ", std over tokens " + std, "min " + min + ", max " + max);
    if (mixture.without) {
      const random = mixture.control.reduce((sum, value) => sum + value, 0) / mixture.control.length;
      const signed = change => (change < 0 ? "" : "+") + change.toFixed(4);
      lines.push("loss without it " + signed(mixture.without[source]) + ", without a random source " + signed(random));
    }
    tip.textContent = lines.join("\n");
  }

  function key(map, event) {
    if (event.key === "Escape") leave();
    const move = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]}[event.key];
    if (!move || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    const [body] = map.querySelector("table").tBodies, from = map.contains(current) ? current : body.rows[0].cells[1];
    const row = body.rows[from.parentElement.rowIndex + move[0]] || from.parentElement;
    const cell = row.cells[Math.max(1, from.cellIndex + move[1])] || row.lastElementChild;
    cell.scrollIntoView({block: "nearest", inline: "nearest"});
    select(cell);
  }

  for (const map of section.querySelectorAll(".heatmap")) {
    map.addEventListener("pointerover", event => select(event.target.closest("td")));
    map.addEventListener("pointerleave", leave);
    map.addEventListener("keydown", event => key(map, event));
    map.addEventListener("focus", () => { if (map.matches(":focus-visible")) select(map.querySelector("td")); });
    map.addEventListener("blur", leave);
  }
  choice.addEventListener("change", paint);
  paint();
});
document.querySelector(".scale").style.backgroundImage = "linear-gradient(to right, " + data.colours.join() + ")";
"""

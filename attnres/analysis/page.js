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

"use strict";

// Theme: the system's, until the button is pressed.
document.getElementById("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});

// Values under the pointer.
for (const svg of document.querySelectorAll("svg[data-hover]")) {
  const chart = JSON.parse(svg.dataset.hover);
  const [low, high, first, last] = chart.x;
  const figure = svg.closest("figure");
  const tip = figure.appendChild(document.createElement("div"));
  tip.className = "tip";
  tip.hidden = true;
  const cross = svg.appendChild(
    document.createElementNS("http://www.w3.org/2000/svg", "line"));
  cross.setAttribute("class", "cross");
  cross.setAttribute("y1", 12);
  cross.setAttribute("y2", svg.viewBox.baseVal.height - 34);
  cross.style.display = "none";
  const steps = [...new Set(chart.series.flatMap((s) => s.x))];
  const hide = () => { tip.hidden = true; cross.style.display = "none"; };
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const at = (event.clientX - box.left) * svg.viewBox.baseVal.width / box.width;
    const value = low + (at - first) / (last - first) * (high - low);
    const step = steps.reduce((best, x) =>
      Math.abs(x - value) < Math.abs(best - value) ? x : best, steps[0]);
    const lines = [`step ${Math.round(step)}`];
    for (const series of chart.series) {
      const i = series.x.indexOf(step);
      if (i >= 0 && series.y[i] !== null) {
        lines.push(`${series.label}  ${series.y[i]}`);
      }
    }
    tip.textContent = lines.join("\n");
    tip.hidden = false;
    const place = first + (step - low) / (high - low) * (last - first);
    cross.setAttribute("x1", place);
    cross.setAttribute("x2", place);
    cross.style.display = "";
    const left = place / svg.viewBox.baseVal.width * box.width;
    tip.style.left = left < box.width / 2 ? `${left + 24}px` : "auto";
    tip.style.right = left < box.width / 2 ? "auto"
      : `${box.width - left + 24}px`;
  });
}

// Samples, a few to a page.
const data = document.getElementById("samples-data");
if (data) {
  const sources = JSON.parse(data.textContent);
  const PER_PAGE = 4;
  const get = (id) => document.getElementById(id);
  let page = 0;

  sources.forEach((source, i) => {
    get("source").add(new Option(source.label, i));
  });
  get("source").value = sources.length - 1;

  const element = (name, kind, text) => {
    const node = document.createElement(name);
    node.className = kind;
    node.textContent = text;
    return node;
  };

  const card = (row) => {
    const kind = row.good === null ? "" : row.good ? " good" : " bad";
    const node = element("div", "card" + kind, "");
    const facts = element("div", "facts", "");
    facts.append(element("b", "", row.id));
    for (const [name, value] of Object.entries(row.facts)) {
      facts.append(element("span", "", `${name.replaceAll("_", " ")} ${value}`));
    }
    const body = element("div", "completion", "");
    body.append(element("mark", "prompt", row.prompt));
    for (const [text, provenance] of row.segments) {
      body.append(element("mark", provenance, text));
    }
    node.append(facts, body);
    return node;
  };

  const show = () => {
    const source = sources[get("source").value];
    const outcome = get("outcome").value;
    const wanted = get("contains").value;
    const rows = source.rows.filter((row) =>
      (!outcome || row.good === (outcome === "good")) &&
      (!wanted || (row.prompt + row.segments.map((s) => s[0]).join(""))
        .includes(wanted)));
    const pages = Math.max(1, Math.ceil(rows.length / PER_PAGE));
    page = Math.min(Math.max(page, 0), pages - 1);
    get("cards").replaceChildren(...(rows.length
      ? rows.slice(page * PER_PAGE, (page + 1) * PER_PAGE).map(card)
      : [element("p", "missing", "None.")]));
    get("where").textContent = `page ${page + 1} of ${pages}`;
    get("part").textContent = source.rows.length < source.total
      ? `The page holds ${source.rows.length} of ${source.total}; the others ` +
        "are in the workdir." : `All ${source.total} are here.`;
    get("previous").disabled = page === 0;
    get("next").disabled = page === pages - 1;
  };

  const turn = (by) => { page += by; show(); };
  get("previous").addEventListener("click", () => turn(-1));
  get("next").addEventListener("click", () => turn(1));
  for (const id of ["source", "outcome", "contains"]) {
    get(id).addEventListener("input", () => { page = 0; show(); });
  }
  document.addEventListener("keydown", (event) => {
    if (["INPUT", "SELECT"].includes(event.target.tagName)) return;
    const box = get("pager").getBoundingClientRect();
    if (box.bottom < 0 || box.top > innerHeight) return;
    if (event.key === "ArrowLeft") turn(-1);
    if (event.key === "ArrowRight") turn(1);
  });
  show();
}

// The study page: a table to filter and sort, curves of the ticked runs, their samples. RUNS is set before this.
const $ = id => document.getElementById(id), SVG = "http://www.w3.org/2000/svg";
const COLORS = ["#000000", "#0072b2", "#d55e00", "#009e73", "#8a8a8a", "#cc79a7"], DASHES = ["", "7 3", "2 3", "9 3 2 3"];
const every = [...new Set(RUNS.flatMap(r => Object.keys(r.row)))];
const one = c => RUNS.length > 1 && c !== "cell" && new Set(RUNS.map(r => JSON.stringify(r.row[c]))).size === 1;
const columns = every.filter(c => !one(c)), same = every.filter(one);
const quantities = [...new Set(RUNS.flatMap(r => Object.keys(r.curves)))];
const looks = RUNS.some(r => Object.keys(r.curves).length || r.samples.length); // is there anything to tick a run for?
const shown = RUNS.map((r, i) => i), ticked = new Set();
let order = null, down = false;
const text = v => v === undefined ? "" : typeof v === "number" && !(Number.isInteger(v) && Math.abs(v) < 1e9) ? v.toPrecision(4) : String(v);
const words = RUNS.map(r => every.map(c => c + " " + text(r.row[c])).join(" ").toLowerCase());

function make(tag, attributes, ...children) {
  const node = tag in {svg: 1, path: 1, line: 1, text: 1, circle: 1} ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [k, v] of Object.entries(attributes || {})) k.startsWith("on") ? node.addEventListener(k.slice(2), v) : node.setAttribute(k, v);
  for (const c of children) node.append(c);
  return node;
}
function matching() {
  const asked = $("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  const found = shown.filter(i => asked.every(w => words[i].includes(w)));
  if (order) found.sort((a, b) => {
    const x = RUNS[a].row[order], y = RUNS[b].row[order];
    if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
    const d = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y));
    return down ? -d : d;
  });
  return found;
}
function drawTable() {
  const found = matching();
  $("count").textContent = `${found.length} of ${RUNS.length} runs`;
  const head = make("tr", {}, ...(looks ? [make("th")] : []), ...columns.map(c => make("th", {style: "cursor:pointer;vertical-align:bottom;padding:.25rem .4rem", onclick: () => {
    down = order === c && !down; order = c; drawTable(); }}, c.replace(/[._/]/g, "$&\u200b") + (order === c ? (down ? " \u25be" : " \u25b4") : ""))));
  $("runs").replaceChildren(head, ...found.map(i => {
    const box = make("input", {type: "checkbox", "aria-label": "show " + RUNS[i].row.cell, onchange: e => {
      e.target.checked ? ticked.add(i) : ticked.delete(i); draw(); }});
    box.checked = ticked.has(i);
    return make("tr", {}, ...(looks ? [make("td", {}, box)] : []), ...columns.map(c => make("td", {
      class: typeof RUNS[i].row[c] === "number" ? "n" : "", title: text(RUNS[i].row[c]),
      style: "white-space:nowrap;max-width:10rem;padding:.25rem .4rem;overflow:hidden;text-overflow:ellipsis"}, text(RUNS[i].row[c]))));
  }));
}
function look(k) { return {stroke: COLORS[k % 6], "stroke-dasharray": DASHES[Math.floor(k / 6 + k) % 4]}; }
function draw() {
  const own = [...ticked];
  if ($("quantity")) drawCurves(own.filter(i => RUNS[i].curves[$("quantity").value]));
  if (!$("samples")) return;
  const kept = own.filter(i => RUNS[i].samples.length);
  $("samples").replaceChildren(...(kept.length ? kept.map(i => {
    const box = make("div", {}); box.innerHTML = RUNS[i].samples.join("");
    return make("div", {}, make("h3", {}, RUNS[i].row.cell), box);
  }) : [own.length ? "The ticked runs kept no samples." : "Tick a run that kept samples."]));
}
function drawCurves(own) {
  $("plot").replaceChildren(); $("legend").replaceChildren();
  if (!own.length) { $("plot").append(ticked.size ? "The ticked runs have no curves of this quantity." : "Tick runs above."); return; }
  const W = 960, H = 380, L = 70, B = 46, q = $("quantity").value, all = own.flatMap(i => RUNS[i].curves[q]);
  const f = $("log").checked ? v => Math.log10(Math.max(v, 1)) : v => v;
  const xs = all.map(p => f(p[0])), ys = all.map(p => p[1]);
  const [x0, x1, y0, y1] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
  const X = v => L + (f(v) - x0) / (x1 - x0 || 1) * (W - L - 15), Y = v => H - B - (v - y0) / (y1 - y0 || 1) * (H - B - 15);
  const svg = make("svg", {viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": q + " over tokens", style: "width:100%"});
  for (let k = 0; k <= 4; k++) {
    const y = y0 + (y1 - y0) * k / 4, at = x0 + (x1 - x0) * k / 4, x = $("log").checked ? 10 ** at : at;
    svg.append(make("line", {x1: L, x2: W - 15, y1: Y(y), y2: Y(y), stroke: "#e4e4e4"}),
      make("text", {x: L - 8, y: Y(y) + 4, "text-anchor": "end", "font-size": 12}, y.toPrecision(3)),
      make("text", {x: X(x), y: H - B + 18, "text-anchor": "middle", "font-size": 12}, Math.round(x).toLocaleString("en")));
  }
  svg.append(make("text", {x: (L + W) / 2, y: H - 6, "text-anchor": "middle", "font-size": 13}, "tokens"),
    make("text", {x: 14, y: H / 2, "text-anchor": "middle", "font-size": 13, transform: `rotate(-90 14 ${H / 2})`}, q));
  own.forEach((i, k) => {
    const points = RUNS[i].curves[q];
    svg.append(make("path", {d: points.map((p, j) => (j ? "L" : "M") + X(p[0]).toFixed(1) + " " + Y(p[1]).toFixed(1)).join(" "),
      fill: "none", "stroke-width": 1.8, ...look(k)}));
    if (points.length < 4) points.forEach(p => svg.append(make("circle", {cx: X(p[0]), cy: Y(p[1]), r: 3, fill: COLORS[k % 6]})));
    const key = make("svg", {width: 42, height: 10}, make("line", {x1: 0, x2: 40, y1: 5, y2: 5, "stroke-width": 2, ...look(k)}));
    $("legend").append(make("span", {style: "margin-right:1.2rem;font-size:.85rem;white-space:nowrap"}, key, " " + RUNS[i].row.cell));
  });
  $("plot").append(svg);
}
if (!looks) for (const id of ["all", "none"]) $(id).remove();
$("filter").addEventListener("input", drawTable);
$("all")?.addEventListener("click", () => { matching().forEach(i => ticked.add(i)); drawTable(); draw(); });
$("none")?.addEventListener("click", () => { ticked.clear(); drawTable(); draw(); });
if ($("quantity")) {
  $("quantity").replaceChildren(...quantities.map(q => make("option", {value: q}, q)));
  for (const id of ["quantity", "log"]) $(id).addEventListener("change", draw);
}
$("same").textContent = same.length ? "The same in every run: " + same.map(c => `${c} ${text(RUNS[0].row[c])}`).join(", ") : "";
const first = RUNS.findIndex(r => !quantities.length || Object.keys(r.curves).length);
if (first >= 0) ticked.add(first);
drawTable(); draw();

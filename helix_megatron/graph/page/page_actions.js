// ------------------------------------------------------------------ hovering, choosing, searching

function hover(shape, words, item) {
  const lit = () => [...(item.in || []), ...(item.out || [])];
  shape.addEventListener("mouseenter", () => {
    at("tip").textContent = words();
    at("tip").hidden = false;
    lit().forEach((path) => path.classList.add("live"));
  });
  shape.addEventListener("mousemove", (event) => {
    const tip = at("tip"), x = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8);
    tip.style.left = `${x}px`;
    tip.style.top = `${Math.min(event.clientY + 16, innerHeight - tip.offsetHeight - 8)}px`;
  });
  shape.addEventListener("mouseleave", () => {
    at("tip").hidden = true;
    lit().forEach((path) => path.classList.remove("live"));
  });
}

function html(name, parent, content, className) {
  const made = document.createElement(name);
  if (content !== undefined) made.textContent = content;
  if (className) made.className = className;
  parent.appendChild(made);
  return made;
}

function panel(title, paragraphs) {
  const side = at("panel");
  side.replaceChildren();
  html("h2", side, title);
  paragraphs.filter(Boolean).forEach((words) => html("p", side, words));
  return side;
}

function table(side, heads, rows) {
  const made = html("table", side), head = html("tr", made);
  heads.forEach((words) => html("th", head, words));
  for (const row of rows) {
    const line = html("tr", made, undefined, row.className || "");
    row.cells.forEach((words) => html("td", line, words, /^[\d.,]+( .*)?$/.test(words) ? "number" : "shape"));
  }
}

function choose(lane, item) {
  state.chosen = item.shape;
  const nodes = item.places.map((place) => lane.one.nodes[place]), first = nodes[0];
  const total = (field) => nodes.reduce((sum, node) => sum + node[field], 0);
  const side = panel(item.label || text(first[OP]), [
    `${rankText(lane.ranks)}, ${text(first[PHASE])}`,
    `${text(first[MODULE])}`,
    `${plural(nodes.length, "operator")}, ${flop(total(FLOPS))}, ${size(total(BYTES))} read and written`,
  ]);
  if (item.type === "block") {
    const button = html("button", side, "open");
    button.addEventListener("click", () => toggle(item.path));
  }
  const inside = new Set(item.places);
  const weights = lane.one.edges.filter(([source, , target]) => inside.has(target)
    && ["parameter", "buffer"].includes(lane.one.nodes[source][KIND]))
    .map(([source]) => lane.one.nodes[source]);
  const rows = [...new Set(weights)].map((node) => ({ cells: [`${text(node[KIND] === "parameter" ? node[MODULE] : node[OP]).split(".").slice(-2).join(".")}.${text(node[OP])}`, text(node[OUTPUTS][0])] }));
  if (rows.length) table(side, ["weights and buffers", ""], rows);
  table(side, ["operator", "shapes", "cost"], nodes.map((node) => ({
    className: (node[VIEW] ? "view " : "") + (matches(node) ? "hit" : ""),
    cells: [text(node[OP]), `${node[INPUTS].map(text).join(", ")} → ${node[OUTPUTS].slice(0, 4).map(text).join(", ")}`,
      node[FLOPS] ? flop(node[FLOPS]) : node[BYTES] ? size(node[BYTES]) : ""],
  })));
  mark();
}

function showCollective(one) {
  state.chosen = one.shape;
  const view = drawn.view, node = drawn.lanes[one.lane].one.nodes[one.place];
  const side = panel(one.title, [one.small, text(node[MODULE]), `${text(node[PHASE])}`,
    `each rank: ${node[INPUTS].slice(0, 2).map(text).join(", ")} → ${node[OUTPUTS].slice(0, 2).map(text).join(", ")}`]);
  table(side, ["ranks", "sent together"], one.alike.map((index) => ({
    cells: [view.collectives[index].ranks.join(" "), size(view.collectives[index].bytes)] })));
  mark();
}

function showRank(lane) {
  const side = panel(rankText(lane.ranks), [lane.ranks.length > 1 ? "Figures of each of these ranks." : ""]);
  const entry = DATA.ranks.find((one) => one.rank === lane.rank);
  const sizes = ["bytes", "sent_bytes", "traced_peak", "parameters", "gradients", "activations"];
  table(side, ["", ""], Object.entries(entry).map(([key, value]) => ({
    cells: [key.replaceAll("_", " "), sizes.includes(key) ? size(value) : key === "flops" ? flop(value) : String(value)] })));
}

function showChecks() {
  const side = panel("Operator graph", ["Traced from the code that runs, one rank after the other, on tensors without data.",
    "Click a box for its operators; double-click, or its triangle, opens it. Wheel zooms, dragging moves, / searches.",
    DATA.checks.length ? "" : "Checks were not run: helix graph --check."]);
  table(side, ["", ""], DATA.checks.map((check) => ({ cells: [check.passed ? "passed" : "FAILED", check.text] })));
}

const matches = (node) => state.query && [node[OP], node[MODULE], ...node[INPUTS], ...node[OUTPUTS]]
  .some((index) => text(index).toLowerCase().includes(state.query));

function mark() {
  const found = [];
  let operators = 0;
  for (const lane of drawn.lanes) for (const item of lane.items) {
    const number = item.places.filter((place) => matches(lane.one.nodes[place])).length;
    const bars = drawn.bars.find((one) => item.shared !== undefined && one.index === item.shared);
    const shape = item.shape || (bars && bars.shape);
    if (!shape) continue;
    shape.classList.toggle("hit", number > 0);
    shape.classList.toggle("chosen", state.chosen === shape);
    if (number) { operators += number; if (!found.some((one) => one.shape === shape)) found.push({ shape, item }); }
  }
  at("hits").textContent = state.query ? `${operators} in ${plural(found.length, "box").replace("boxs", "boxes")}` : "";
  drawn.found = found;
}

function nextHit() {
  if (!drawn.found.length) return;
  state.hit = (state.hit + 1) % drawn.found.length;
  const { item, shape } = drawn.found[state.hit], area = at("canvas").getBoundingClientRect();
  state.scale = Math.max(state.scale, 0.8);
  state.x = area.width / 2 - state.scale * (Number(shape.getAttribute("x")) + Number(shape.getAttribute("width")) / 2);
  state.y = area.height / 2 - state.scale * (item.y + item.height / 2);
  move();
  shape.dispatchEvent(new MouseEvent("click"));
}

// ------------------------------------------------------------------ opening and closing

function toggle(path) {
  const open = state.open[state.view];
  open.delete("*");
  if (!open.delete(path)) open.add(path);
  draw();
}

function openAll() {
  const open = state.open[state.view] = new Set(["*"]);
  const visit = (block) => { open.add(block[BLOCK_PATH]);
    block[BLOCK_CHILDREN].filter((child) => typeof child !== "number").forEach(visit); };
  DATA.views[state.view].classes.forEach((one) => visit(one.tree));
}

function show(view, ranks, whole) {
  state.view = view; state.ranks = ranks; state.chosen = null; state.hit = -1;
  [...at("views").children].forEach((button, i) => button.setAttribute("aria-selected", String(i === view)));
  at("ranks").value = ranks;
  draw();
  if (whole) fit(); else fromTop();
  history.replaceState(null, "", `#${DATA.views[view].name}/${ranks}`);
}

// ------------------------------------------------------------------ moving about

function move() {
  at("world").setAttribute("transform", `translate(${state.x} ${state.y}) scale(${state.scale})`);
}

function fit() {
  const area = at("canvas").getBoundingClientRect();
  state.scale = Math.min(1.6, (area.width - 20) / drawn.total, (area.height - 20) / drawn.height);
  state.x = (area.width - state.scale * drawn.total) / 2;
  state.y = 10;
  move();
}

/* As wide as the window, from the top: readable, whatever the height. */
function fromTop() {
  const area = at("canvas").getBoundingClientRect();
  state.scale = Math.max(0.28, Math.min(1.1, (area.width - 20) / drawn.total));
  state.x = Math.max(0, (area.width - state.scale * drawn.total) / 2);
  state.y = 10;
  move();
}

function zoom(factor, x, y) {
  const scale = Math.min(4, Math.max(0.02, state.scale * factor));
  state.x = x - (x - state.x) * (scale / state.scale);
  state.y = y - (y - state.y) * (scale / state.scale);
  state.scale = scale;
  move();
}

function start() {
  at("summary").textContent = DATA.summary;
  const failed = DATA.checks.filter((check) => !check.passed).length;
  at("checks").textContent = !DATA.checks.length ? "" : failed ? `${plural(failed, "check")} failed` : `${DATA.checks.length} checks passed`;
  at("checks").className = failed ? "bad" : "good";
  at("checks").addEventListener("click", showChecks);
  DATA.views.forEach((view, i) => {
    state.open.push(new Set(view.open));
    const button = html("button", at("views"), view.name);
    button.setAttribute("role", "tab");
    button.addEventListener("click", () => show(i, state.ranks));
  });
  const option = (value, words) => { html("option", at("ranks"), words).value = value; };
  option("folded", "folded: equal ranks as one");
  option("all", `all ${DATA.ranks.length}`);
  DATA.ranks.forEach((entry) => option(String(entry.rank), `rank ${entry.rank}`));
  at("ranks").addEventListener("change", (event) => show(state.view, event.target.value));
  at("search").addEventListener("input", (event) => { state.query = event.target.value.trim().toLowerCase(); state.hit = -1; mark(); });
  at("search").addEventListener("keydown", (event) => { if (event.key === "Enter") nextHit(); });
  at("expand").addEventListener("click", () => { openAll(); draw(); });
  at("collapse").addEventListener("click", () => { state.open[state.view] = new Set(DATA.views[state.view].open); draw(); });
  at("fit").addEventListener("click", fit);
  const canvas = at("canvas"), centre = () => canvas.getBoundingClientRect();
  at("plus").addEventListener("click", () => zoom(1.25, centre().width / 2, centre().height / 2));
  at("minus").addEventListener("click", () => zoom(0.8, centre().width / 2, centre().height / 2));
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    const area = centre();
    if (event.ctrlKey || event.metaKey || !event.shiftKey) zoom(Math.exp(-event.deltaY / 500), event.clientX - area.left, event.clientY - area.top);
    else { state.y -= event.deltaY; move(); }
  }, { passive: false });
  let from = null;
  canvas.addEventListener("pointerdown", (event) => { from = [event.clientX - state.x, event.clientY - state.y]; });
  addEventListener("pointermove", (event) => {
    if (!from) return;
    canvas.classList.add("dragging");
    state.x = event.clientX - from[0]; state.y = event.clientY - from[1];
    move();
  });
  addEventListener("pointerup", () => { from = null; canvas.classList.remove("dragging"); });
  addEventListener("keydown", (event) => {
    if (event.target.tagName === "INPUT") return;
    if (event.key === "f") fit();
    if (event.key === "/") { event.preventDefault(); at("search").focus(); }
  });
  const [name, ranks, query] = decodeURIComponent(location.hash.slice(1)).split("/");
  const view = Math.max(0, DATA.views.findIndex((one) => one.name === name));
  const known = [...at("ranks").options].some((one) => one.value === ranks);
  showChecks();
  if (query) { state.query = query.toLowerCase(); at("search").value = query; }
  show(view, known ? ranks : "folded");
}

start();

"use strict";
const DATA = JSON.parse(document.getElementById("data").textContent);
const NS = "http://www.w3.org/2000/svg";
const GAP = 20, BROAD = 300, NARROW = 170, TOP = 46;
const [KIND, OP, MODULE, PHASE, INPUTS, OUTPUTS, FLOPS, BYTES, SENT, VIEW] = Array(10).keys();
const [BLOCK_LABEL, BLOCK_PATH, BLOCK_CHILDREN] = Array(3).keys();
const at = (id) => document.getElementById(id);
const text = (index) => DATA.strings[index];
const state = { view: 0, ranks: "folded", open: [], query: "", chosen: null, hit: -1, scale: 1, x: 0, y: 0 };
let drawn = { lanes: [], bars: [], width: 0, height: 0 };

// ------------------------------------------------------------------ numbers and names

function scaled(value, base, units) {
  let power = 0;
  while (Math.abs(value) >= base - 0.5 && power < units.length - 1) { value /= base; power += 1; }
  const digits = (power === 0 && Number.isInteger(value)) || value >= 100 ? 0 : value >= 10 ? 1 : 2;
  return value.toFixed(digits) + units[power];
}
const size = (value) => scaled(value, 1024, [" B", " KiB", " MiB", " GiB", " TiB", " PiB"]);
const flop = (value) => scaled(value, 1000, [" FLOP", " kFLOP", " MFLOP", " GFLOP", " TFLOP", " PFLOP"]);
const groupName = (name) => name.replace(/_GROUP$/, "").replaceAll("_", " ").toLowerCase();
const short = (name, letters) => (name.length > letters ? name.slice(0, letters - 1) + "…" : name);
const plural = (number, word) => `${number} ${word}${number === 1 ? "" : "s"}`;

function rankText(ranks) {
  if (ranks.length === 1) return `rank ${ranks[0]}`;
  const run = ranks.every((rank, i) => rank === ranks[0] + i);
  return "ranks " + (run ? `${ranks[0]}–${ranks[ranks.length - 1]}` : ranks.join(", "));
}

function color(module) {
  const parts = [["layernorm", "norm"], ["self_attention", "attention"], ["router", "router"], ["mlp", "mlp"],
    ["embedding", "ends"], ["output_layer", "ends"]];
  const found = parts.find(([part]) => module.includes(part));
  return found ? found[1] : "plain";
}

// ------------------------------------------------------------------ what is drawn of a rank

/* The items of a rank's program: boxes of modules that are closed, operators of those that are open. A collective is
   always an item of its own, and cuts the box that it lies in. */
function itemsOf(one, open) {
  const found = [], nodes = one.nodes;
  const special = (place) => nodes[place][KIND] === "collective" || nodes[place][KIND] === "input";
  const single = (place, frames) =>
    found.push({ type: nodes[place][KIND] === "operator" ? "op" : nodes[place][KIND], places: [place], frames });
  const closed = (block, frames) => {
    let item = null;
    for (const place of placesOf(block)) {
      if (special(place)) { single(place, frames); item = null; continue; }
      if (!item) { item = { type: "block", label: block[BLOCK_LABEL], path: block[BLOCK_PATH], places: [], frames };
        found.push(item); }
      item.places.push(place);
    }
  };
  const visit = (block, frames) => {
    if (!open.has(block[BLOCK_PATH])) { closed(block, frames); return; }
    let inner = frames;
    if (block[BLOCK_LABEL]) {
      inner = [...frames, block[BLOCK_PATH] + "@" + found.length];
      found.push({ type: "head", label: block[BLOCK_LABEL], path: block[BLOCK_PATH], places: [], frames: inner });
    }
    let run = [];
    const flush = () => {
      if (!run.length) return;
      const path = `${block[BLOCK_PATH]}#${run[0]}`;
      if (run.length === 1 || open.has(path) || open.has("*")) run.forEach((place) => single(place, inner));
      else found.push({ type: "block", label: block[BLOCK_LABEL], path, places: run, frames: inner });
      run = [];
    };
    for (const child of block[BLOCK_CHILDREN]) {
      if (typeof child !== "number") { flush(); visit(child, inner); }
      else if (special(child)) { flush(); single(child, inner); }
      else run.push(child);
    }
    flush();
  };
  visit(one.tree, []);
  return found;
}

function placesOf(block) {
  return block[BLOCK_CHILDREN].flatMap((child) => (typeof child === "number" ? [child] : placesOf(child)));
}

function describe(item, one, broad) {
  const letters = broad ? 52 : 27, nodes = item.places.map((place) => one.nodes[place]);
  const first = nodes[0], last = nodes[nodes.length - 1];
  const shapes = (node) => node[OUTPUTS].map(text);
  if (item.type === "op" || item.type === "input") {
    const lines = [text(first[OP]), ...shapes(first).slice(0, 2)];
    if (first[FLOPS]) lines.push(flop(first[FLOPS]));
    return lines.map((line) => short(line, letters));
  }
  const operators = nodes.filter((node) => !node[VIEW]);
  const names = [...new Set(operators.map((node) => text(node[OP]).replace(/^aten\./, "").split(".")[0]))];
  const residual = item.label.startsWith("layer ") && text(first[OP]).startsWith("aten.add");
  const lines = [residual ? `${item.label}: residual` : item.label];
  if (names.length) lines.push(names.join(", "));
  lines.push(shapes(last)[0] || "");
  const flops = nodes.reduce((sum, node) => sum + node[FLOPS], 0);
  lines.push([plural(nodes.length, "operator"), flops ? flop(flops) : ""].filter(Boolean).join(", "));
  return lines.filter(Boolean).map((line) => short(line, letters));
}

// ------------------------------------------------------------------ layout

function lanesOf(view) {
  const lanes = [];
  for (const one of view.classes) {
    if (state.ranks === "folded") lanes.push({ one, rank: one.ranks[0], ranks: one.ranks });
    else for (const rank of one.ranks)
      if (state.ranks === "all" || Number(state.ranks) === rank) lanes.push({ one, rank, ranks: [rank] });
  }
  return lanes.sort((a, b) => a.rank - b.rank);
}

function layout() {
  const view = DATA.views[state.view], lanes = lanesOf(view), broad = lanes.length <= 4;
  const width = broad ? BROAD : NARROW, pitch = width + (broad ? 84 : 52);
  const owners = new Map(), cache = new Map();
  lanes.forEach((lane, number) => {
    if (!cache.has(lane.one)) cache.set(lane.one, itemsOf(lane.one, state.open[state.view]));
    lane.items = cache.get(lane.one).map((item) => ({ ...item }));
    lane.x = 70 + number * pitch;
    for (const item of lane.items) {
      item.lane = number;
      if (item.type === "head") { item.height = 16; continue; }
      if (item.type === "collective") {
        item.shared = view.at[lane.rank][item.places[0]];
        item.lines = [""]; item.height = 34;
        if (item.shared !== undefined) {
          if (!owners.has(item.shared)) owners.set(item.shared, new Set());
          owners.get(item.shared).add(number);
        }
        continue;
      }
      item.lines = describe(item, lane.one, broad);
      item.height = 10 + 13 * item.lines.length;
    }
    lane.next = 0; lane.free = TOP;
  });
  settle(lanes, owners);
  const bars = [...owners].map(([index, numbers]) => bar(view, lanes, index, [...numbers].sort((a, b) => a - b), width));
  for (const lane of lanes) for (const item of lane.items) if (item.shared === undefined) {
    item.x = lane.x; item.width = width;
  }
  const height = Math.max(TOP, ...lanes.map((lane) => lane.free)) + 20;
  return { view, lanes, bars, width, broad, total: 100 + lanes.length * pitch, height };
}

/* Every lane from top to bottom; a collective lies at one height in all of its lanes. */
function settle(lanes, owners) {
  const head = (lane) => lane.items[lane.next];
  const put = (lane, item, y) => {
    item.y = y; lane.next += 1;
    lane.free = y + item.height + (item.type === "head" ? 5 : GAP);
  };
  for (let moved = true; moved;) {
    moved = false;
    for (const [number, lane] of lanes.entries()) {
      for (let item = head(lane); item; item = head(lane)) {
        const together = item.shared === undefined ? [number] : [...owners.get(item.shared)];
        const heads = together.map((other) => head(lanes[other]));
        if (together.length > 1 && heads.some((one) => !one || one.shared !== item.shared)) break;
        const y = Math.max(...together.map((other) => lanes[other].free));
        together.forEach((other, i) => put(lanes[other], heads[i], y));
        moved = true;
      }
    }
    const stuck = lanes.find((lane) => head(lane));
    if (!moved && stuck) { put(stuck, head(stuck), stuck.free); moved = true; }
  }
}

function bar(view, lanes, index, numbers, width) {
  const one = view.collectives[index], first = lanes[numbers[0]], last = lanes[numbers[numbers.length - 1]];
  const itemOf = (lane) => lane.items.find((candidate) => candidate.shared === index);
  const item = itemOf(first);
  const purpose = text(one.purpose), group = text(one.group);
  const place = item.places[0];
  const alike = new Set(numbers.flatMap((n) =>
    lanes[n].ranks.map((rank) => view.at[rank][itemOf(lanes[n]).places[0]])));
  const groups = alike.size > 1 ? `${alike.size} groups of ${one.ranks.length} ranks` : plural(one.ranks.length, "rank");
  const each = size(one.bytes / one.members.length);
  const kind = purpose.startsWith("exchange") ? "exchange" : text(one.kind) === "send" ? "message" : "collective";
  return { index, alike: [...alike], numbers, kind, y: item.y, height: item.height, x: first.x,
    width: last.x + width - first.x, place, lane: numbers[0],
    title: text(one.kind) + (purpose !== group ? ` ${purpose}` : ""),
    small: `${groups}, ${groupName(group)}, ${each} sent by each` };
}

// ------------------------------------------------------------------ drawing

function element(name, attributes, parent, content) {
  const made = document.createElementNS(NS, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (content !== undefined) made.textContent = content;
  parent.appendChild(made);
  return made;
}

function draw() {
  const world = at("world");
  world.replaceChildren();
  drawn = layout();
  const layers = ["frames", "tensors", "boxes", "labels"].map((name) => element("g", { id: name }, world));
  for (const lane of drawn.lanes) drawLane(lane, layers);
  for (const one of drawn.bars) drawBar(one, layers);
  mark();
  document.body.dataset.ready = `${DATA.views[state.view].name} ${drawn.lanes.length} lanes ${drawn.bars.length} collectives`;
}

function drawLane(lane, [frames, tensors, boxes, labels]) {
  const middle = lane.x + drawn.width / 2;
  const info = DATA.ranks.find((entry) => entry.rank === lane.rank);
  const many = lane.ranks.length > 1;
  element("text", { x: middle, y: 14, "text-anchor": "middle", class: "lane" }, labels, rankText(lane.ranks));
  const under = many ? `${lane.ranks.length} of equal structure` : `head group ${info.head_group}, segment ${info.segment}`
    + (DATA.settings.pipeline > 1 ? `, stage ${info.pipeline}` : "");
  element("text", { x: middle, y: 28, "text-anchor": "middle", class: "small" }, labels, under);
  const header = element("rect", { x: lane.x, y: 0, width: drawn.width, height: 34, class: "handle" }, labels);
  header.addEventListener("click", () => showRank(lane));
  drawFrames(lane, frames);
  drawTensors(lane, tensors);
  for (const item of lane.items) {
    if (item.type === "head") {
      element("text", { x: lane.x, y: item.y + 12, class: "head" }, labels, `▾ ${item.label}`);
      const handle = element("rect", { x: lane.x - 4, y: item.y, width: drawn.width * 0.7, height: 16, class: "handle" }, boxes);
      handle.addEventListener("click", () => toggle(item.path));
    } else if (item.type !== "collective" || item.shared === undefined) drawBox(lane, item, boxes, labels);
  }
}

function drawFrames(lane, frames) {
  const ends = new Map();
  for (const item of lane.items) item.frames.forEach((frame, depth) => {
    const top = item.y, bottom = item.y + item.height;
    const seen = ends.get(frame) || { top, bottom, depth };
    ends.set(frame, { top: Math.min(seen.top, top), bottom: Math.max(seen.bottom, bottom), depth });
  });
  for (const { top, bottom, depth } of ends.values()) {
    const inset = Math.max(4, 22 - 5 * depth);
    element("rect", { x: lane.x - inset, y: top - 2, width: drawn.width + 2 * inset, height: bottom - top + 8, rx: 6,
      class: "frame" }, frames);
  }
}

function drawBox(lane, item, boxes, labels) {
  const node = lane.one.nodes[item.places[0]], round = item.type === "input" ? item.height / 2 : 6;
  const kind = item.type === "input" ? "input" : color(text(node[MODULE]));
  const box = element("rect", { x: item.x, y: item.y, width: item.width, height: item.height, rx: round,
    class: `box ${kind} ${item.type === "op" && node[VIEW] ? "viewop" : ""}` }, boxes);
  item.shape = box;
  const middle = item.x + item.width / 2;
  item.lines.forEach((line, i) => element("text", { x: middle, y: item.y + 16 + 13 * i, "text-anchor": "middle",
    class: i ? "small" : "title" }, labels, line));
  const expandable = item.type === "block";
  if (expandable) {
    element("text", { x: item.x + 8, y: item.y + 16, class: "small" }, labels, "▸");
    const handle = element("rect", { x: item.x, y: item.y, width: 24, height: 24, rx: 5, class: "handle" }, labels);
    handle.addEventListener("click", () => toggle(item.path));
  }
  hover(box, () => item.places.slice(0, 8).map((place) => line(lane.one.nodes[place])).join("\n")
    + (item.places.length > 8 ? `\n… ${item.places.length - 8} more` : ""), item);
  box.addEventListener("click", () => { choose(lane, item); });
  box.addEventListener("dblclick", () => { if (expandable) toggle(item.path); });
}

function line(node) {
  return `${text(node[OP])}  ${node[INPUTS].map(text).join(", ")} → ${node[OUTPUTS].slice(0, 3).map(text).join(", ")}`;
}

function drawBar(one, [, , boxes, labels]) {
  const shape = element("rect", { x: one.x, y: one.y, width: one.width, height: one.height, rx: 4, class: `bar ${one.kind}` },
    boxes);
  one.shape = shape;
  if (one.numbers.length > 1) for (const number of one.numbers)
    element("rect", { x: drawn.lanes[number].x + drawn.width / 2 - 3, y: one.y - 3, width: 6, height: 6, class: "member" }, boxes);
  const wide = one.width > 420, middle = one.x + one.width / 2, letters = Math.floor(one.width / 5.6);
  const lines = wide ? [`${one.title}: ${one.small}`] : [one.title, one.small];
  lines.forEach((words, i) => element("text", { x: middle, y: one.y + (wide ? 21 : 14 + 13 * i), "text-anchor": "middle",
    class: i ? "small" : "title" }, labels, short(words, letters)));
  hover(shape, () => `${one.title}\n${one.small}\n${line(drawn.lanes[one.lane].one.nodes[one.place])}`, one);
  shape.addEventListener("click", () => showCollective(one));
}

function drawTensors(lane, layer) {
  const where = new Map();
  lane.items.forEach((item, index) => item.places.forEach((place) => where.set(place, index)));
  const between = new Map();
  for (const [source, output, target] of lane.one.edges) {
    const a = where.get(source), b = where.get(target);
    if (a === undefined || b === undefined || a === b) continue;
    const key = `${a} ${b}`;
    if (!between.has(key)) between.set(key, new Set());
    between.get(key).add(text(lane.one.nodes[source][OUTPUTS][output]));
  }
  const steps = lane.items.map(() => 0);
  let count = 0;
  lane.items.forEach((item, i) => { steps[i] = count; if (item.type !== "head") count += 1; });
  const middle = lane.x + drawn.width / 2;
  for (const [key, specs] of between) {
    const [i, j] = key.split(" ").map(Number), a = lane.items[i], b = lane.items[j];
    const phase = (item) => lane.one.nodes[item.places[0]][PHASE];
    const saved = phase(a) !== phase(b), far = steps[j] - steps[i];
    let path = `M${middle} ${a.y + a.height}L${middle} ${b.y}`;
    if (far > 1) {
      const side = saved ? -1 : 1, edge = middle + (side * drawn.width) / 2;
      const out = edge + side * Math.min(14 + 3 * far, drawn.broad ? 70 : 42);
      path = `M${edge} ${a.y + a.height / 2}C${out} ${a.y + a.height / 2 + 8} ${out} ${b.y + b.height / 2 - 8} ${edge} ${b.y + b.height / 2}`;
    }
    const made = element("path", { d: path, class: `tensor ${saved ? "saved far" : far > 12 ? "far" : ""}` }, layer);
    (a.out ||= []).push(made); (b.in ||= []).push(made);
    const caught = element("path", { d: path, class: "catch" }, layer);
    const label = [...specs].slice(0, 6).join("\n") + (specs.size > 6 ? `\n… ${specs.size - 6} more` : "");
    hover(caught, () => label, { in: [made] });
    if (drawn.broad && far === 1 && b.y - a.y - a.height >= GAP - 1)
      element("text", { x: middle + 6, y: (a.y + a.height + b.y) / 2 + 3, class: "small" }, layer,
        [...specs][0] + (specs.size > 1 ? ` +${specs.size - 1}` : ""));
  }
}

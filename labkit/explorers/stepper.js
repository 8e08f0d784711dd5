function (key, spec) {
"use strict";
// Twin of stepper.py: picks a state that labkit computed, and draws it.  It knows no formula of
// attention; every number on the page is text that arrived in `spec`.
const num = v => { const t = v.toFixed(1).replace(/\.0$/, ""); return t === "-0" ? "0" : t; };
const blocks = size => Math.ceil(spec.n / size);
const long = (index, size) => Math.min(spec.n, index * size + size) - index * size;
const same = (a, b) => String(a) === String(b);
const cross = (x, y, r) => [-r, r].map(a =>
  ["path", `M${num(x - r)} ${num(y + a)}L${num(x + r)} ${num(y - a)}`, "skip"]);
function pick(state) {
  return spec.variants[[state.tile, state.causal ? 1 : 0, state.order].join(",")];
}
function before(frames, at) {
  const frame = frames[at];
  if (at && same(frames[at - 1].r, frame.r)) return frames[at - 1].a.replace(/\*/g, "");
  const row = ["−∞", "0.00"].concat(Array(spec.dv).fill("30.00")).join(" ");
  return Array(frame.r[1]).fill(row).join(";");
}
function draw(variant, at, layout) {
  const box = spec.layouts[layout], frames = variant.frames, frame = frames[at], font = box.font;
  const shapes = [];
  const write = (x, y, what, style = "num", anchor = "middle") =>
    shapes.push(["text", x, y, what, style, anchor]);
  const cell = (x, y, w, h, tinted, style) => {
    if (tinted[0] !== "x") {
      const n = Number(tinted[0]) - 3;
      shapes.push(["rect", x, y, w, h, `heat ${n < 0 ? "b" : "a"} h${Math.abs(n)}`]);
    }
    if (style) write(x + w / 2, y + h / 2 + font * 0.36, tinted.slice(1), style);
  };
  // the map: what of S exists
  const s = box.strip, gap = box.gap, n = spec.n;
  const x0 = box.map.x, y0 = box.map.y, c = box.map.cell, end = n * c;
  const [bm, bn] = variant.tile, tiled = frame.t.length === 2;
  write(x0 - gap - s / 2, y0 - 6, "Q", "name");
  write(x0 + end + gap + s / 2, y0 - 6, "O", "name");
  write(x0 + end / 2, y0 - gap - s - 6, "K and V", "name");
  for (let i = 0; i < blocks(bm); i++) {
    const y = y0 + i * bm * c, h = long(i, bm) * c;
    const done = frames.findIndex(f => same(f.t, [i])) <= at;
    shapes.push(["rect", x0 - gap - s, y, s, h, frame.t[0] === i ? "solid a" : "box"]);
    shapes.push(["rect", x0 + end + gap, y, s, h, done ? "solid c" : "box"]);
    for (let j = 0; j < blocks(bn); j++) {
      const x = x0 + j * bn * c, w = long(j, bn) * c;
      const visit = frames.findIndex(f => same(f.t, [i, j]));
      if (visit === at) {
        frame.S.split(";").forEach((row, r) => row.split(" ").forEach((value, k) =>
          cell(x + k * c, y + r * c, c, c, value, "")));
      }
      shapes.push(["rect", x, y, w, h, visit >= 0 && visit < at ? "box gone" : "box"]);
      if (visit < 0) shapes.push(...cross(x + w / 2, y + h / 2, c / 2));
    }
  }
  for (let j = 0; j < blocks(bn); j++) {
    const now = tiled && frame.t[1] === j;
    shapes.push(["rect", x0 + j * bn * c, y0 - gap - s, long(j, bn) * c, s, now ? "solid a" : "box"]);
  }
  if (tiled) {
    const [i, j] = frame.t;
    shapes.push(["rect", x0 + j * bn * c, y0 + i * bm * c, long(j, bn) * c, long(i, bm) * c, "box a"]);
  }
  // legend
  const g = box.legend;
  spec.legend.forEach(([style, what], index) => {
    const x = g.x + index % g.columns * g.dx, y = g.y + Math.floor(index / g.columns) * g.dy;
    shapes.push(["rect", x, y - 11, 14, 14, style]);
    if (style === "box skipped") shapes.push(...cross(x + 7, y - 4, 4));
    write(x + 20, y, what, "tick", "start");
  });
  // the tile in numbers
  const t = box.tile;
  write(t.x - 18, t.y - 27, frame.title, "name", "start");
  if (tiled) {
    const rows = frame.S.split(";").map(row => row.split(" "));
    rows[0].forEach((_, k) => write(t.x + (k + 0.5) * t.w, t.y - 6, String(frame.k + k), "tick"));
    rows.forEach((row, r) => {
      const y = t.y + r * t.h;
      write(t.x - 5, y + t.h / 2 + font * 0.36, String(frame.r[0] + r), "tick", "end");
      row.forEach((value, k) => cell(t.x + k * t.w, y, t.w, t.h, value, "num"));
    });
    shapes.push(["rect", t.x, t.y, rows[0].length * t.w, rows.length * t.h, "box a"]);
  } else {
    write(t.x, t.y + 16, "no tile on chip", "tick", "start");
  }
  // the state: before, factor, after
  const z = box.state, w = z.w, h = z.h, right = z.x + (3 + spec.dv) * w;
  const factor = z.x + (2.5 + spec.dv) * w;
  const heads = [["m", "ℓ", "O"], tiled ? ["m", "ℓ", "O"] : ["LSE", "", "O ÷ ℓ"]];
  [[z.x, "before", heads[0]], [right, "after", heads[1]]].forEach(([x, head, names]) => {
    write(x, z.y - 24, head, "name", "start");
    names.forEach((name, k) =>
      write(x + (k < 2 ? k + 0.5 : 2 + spec.dv / 2) * w, z.y - 6, name, "tick"));
  });
  write(factor, z.y - 6, tiled ? "α" : "", "tick");
  const factors = frame.f.split(" ");
  const sides = [[z.x, before(frames, at).split(";")], [right, frame.a.split(";")]];
  factors.forEach((value, r) => {
    const y = z.y + r * h, base = y + h / 2 + font * 0.36;
    write(z.x - 5, base, String(frame.r[0] + r), "tick", "end");
    write(factor, base, value, value === "1.00" ? "num" : "value");
    for (const [x, rows] of sides) {
      const [a, b, ...out] = rows[r].split(" "), grown = a.startsWith("*");
      write(x + w / 2, base, grown ? a.slice(1) : a, grown ? "value" : "num");
      write(x + 1.5 * w, base, b);
      out.forEach((v, k) => cell(x + (2 + k) * w, y, w, h, v, "num"));
    }
  });
  for (const [x] of sides) {
    shapes.push(["rect", x, z.y, (2 + spec.dv) * w, factors.length * h, "box"]);
  }
  return shapes;
}
const escaped = t => t.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const classes = style => style.split(" ").map(name => "lkx-" + name).join(" ");
function svg(shapes) {
  return shapes.map(s => {
    if (s[0] === "path") return `<path class="${classes(s[2])}" d="${s[1]}"/>`;
    const c = classes(s[s[0] === "rect" ? 5 : 4]), [a, b] = [num(s[1]), num(s[2])];
    if (s[0] === "rect") return `<rect class="${c}" x="${a}" y="${b}" width="${num(s[3])}" height="${num(s[4])}"/>`;
    return `<text class="${c}" x="${a}" y="${b}" text-anchor="${s[5]}">${escaped(s[3])}</text>`;
  }).join("");
}
// -- words -------------------------------------------------------------------------------
function plain(row) {
  const [m, total, ...out] = row.replace(/\*/g, "").split(" ");
  return [m, total, `(${out.map(o => o.slice(1)).join(", ")})`].filter(p => p).join(", ");
}
function label(variant, at) {
  const frames = variant.frames, frame = frames[at], old = before(frames, at).split(";");
  const after = frame.t.length === 2 ? "m, ℓ, O" : "LSE, O", now = frame.a.split(";");
  return [`${spec.title} ${frame.title}.`].concat(frame.f.split(" ").map((factor, r) =>
    `Query ${frame.r[0] + r}: m, ℓ, O from ${plain(old[r])}; factor ${factor}; ${after} now ${plain(now[r])}.`
  )).join(" ");
}
function summary(variant, at) {
  return `Step ${at + 1} of ${variant.frames.length}. ${variant.frames[at].say}`;
}
function table(variant, at) {
  return [spec.table.head].concat(spec.table.rows.map(([name, three], r) =>
    [name, String(variant.frames[at].io[r]), String(variant.all[r]), three]));
}
// -- inputs ------------------------------------------------------------------------------
function mount(root) {
  const state = {}, find = (node, selector) => node.querySelector(selector);
  const form = find(root, ".lkx-controls"), message = find(root, ".lkx-error"), parts = {};
  for (const control of spec.controls) {
    const holder = find(root, `[data-control="${control.name}"]`);
    parts[control.name] = {holder, box: find(holder, "select, input[type=checkbox]")};
    state[control.name] = control.value;
  }
  const holder = parts.step.holder, number = find(holder, "input[type=number]");
  const range = find(holder, "input[type=range]"), of = find(holder, ".lkx-of");
  const back = find(holder, ".lkx-back"), next = find(holder, ".lkx-next");
  function redraw(used) {
    const variant = pick(state), last = variant.frames.length;
    state.step = Math.min(state.step, last);
    const at = state.step - 1;
    for (const layout in spec.layouts) {
      const node = find(root, ".lkx-" + layout);
      node.innerHTML = svg(draw(variant, at, layout));
      node.setAttribute("aria-label", label(variant, at));
    }
    const line = find(root, ".lkx-summary"), said = summary(variant, at);
    if (line.textContent !== said) line.textContent = said;
    const cells = root.querySelectorAll(".lkx-table th, .lkx-table td");
    table(variant, at).flat().forEach((t, i) => { cells[i].textContent = t; });
    number.max = range.max = last;
    of.textContent = "of " + last;
    if (used !== number) number.value = state.step;
    if (used !== range) range.value = state.step;
    range.setAttribute("aria-valuetext", `step ${state.step} of ${last}`);
    number.removeAttribute("aria-invalid");
    message.textContent = "";
    // not `disabled`: the button that was just pressed would lose the focus
    back.setAttribute("aria-disabled", String(state.step === 1));
    next.setAttribute("aria-disabled", String(state.step === last));
  }
  function move(step, used) {
    state.step = Math.max(1, Math.min(step, pick(state).frames.length));
    redraw(used);
  }
  for (const control of spec.controls) {
    const box = parts[control.name].box;
    if (!box) continue;
    box.addEventListener("change", () => {
      state[control.name] = control.kind === "check" ? box.checked : box.value;
      redraw();
    });
  }
  range.addEventListener("input", () => move(Number(range.value), range));
  back.addEventListener("click", () => move(state.step - 1));
  next.addEventListener("click", () => move(state.step + 1));
  number.addEventListener("input", () => {
    const value = number.valueAsNumber, last = pick(state).frames.length;
    if (Number.isInteger(value) && value >= 1 && value <= last) { move(value, number); return; }
    number.setAttribute("aria-invalid", "true");
    message.textContent = `step must be a whole number from 1 to ${last}; the figure still shows ${state.step}.`;
  });
  find(root, ".lkx-reset").addEventListener("click", () => {
    for (const control of spec.controls) {
      state[control.name] = control.value;
      const box = parts[control.name].box;
      if (box && control.kind === "check") box.checked = control.value;
      else if (box) box.value = control.value;
    }
    redraw();
  });
  form.addEventListener("submit", event => event.preventDefault());
  // JupyterLab takes arrow keys, Space and Enter from whatever does not say this of itself
  for (const node of form.querySelectorAll("input, select, button")) {
    node.setAttribute("data-lm-suppress-shortcuts", "true");
  }
  redraw();
  form.hidden = false;
  find(root, ".lkx-still").hidden = true;
  // for the console, and for the tests that compare this script with labkit
  root.explorer = {
    state,
    at(changes) {
      const st = Object.assign({}, state, changes), variant = pick(st);
      const at = Math.min(st.step, variant.frames.length) - 1;
      return {
        summary: summary(variant, at), table: table(variant, at), label: label(variant, at),
        svg: Object.fromEntries(Object.keys(spec.layouts).map(layout =>
          [layout, svg(draw(variant, at, layout))])),
      };
    },
  };
}
// One explorer may stand twice on a page, and a script may run twice: wire each node once.
const done = window.labkitExplorers = window.labkitExplorers || new WeakSet();
const here = document.currentScript && document.currentScript.closest(".lkx");
for (const root of new Set([here, ...document.querySelectorAll(`.lkx[data-lkx="${key}"]`)])) {
  if (root && !done.has(root)) { done.add(root); mount(root); }
}
}

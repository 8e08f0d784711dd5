function (key, spec) {
"use strict";
// Twin of model.py and scene.py: evaluates the description, draws it, listens to inputs.
// It holds no formula of attention: forms, expressions and texts arrive as data in `spec`.
// Comments and indentation do not reach the page.

// -- numbers as labkit.units writes them -------------------------------------------------
function fixed(v, places) {
  // toFixed, but an exact tie goes to the even digit, as in Python
  const scaled = Math.abs(v) * Math.pow(10, places);
  const whole = Math.floor(scaled);
  if (scaled - whole !== 0.5 || !/^5?0*$/.test((Math.abs(v).toFixed(100).split(".")[1] || "").slice(places))) {
    return v.toFixed(places);
  }
  const even = whole % 2 === 0 ? whole : whole + 1;
  return (v < 0 ? "-" : "") + (even / Math.pow(10, places)).toFixed(places);
}
function exponent(v) {
  return Number(v.toExponential().split("e")[1]);
}
function significant(v, digits = 3) {
  if (v === 0 || !isFinite(v)) return String(v || 0);
  const places = Math.max(0, digits - 1 - exponent(Math.abs(v)));
  const text = fixed(v, places);
  return text.includes(".") ? text.replace(/0+$/, "").replace(/\.$/, "") : text;
}
function prefixed(v, unit) {
  const prefixes = ["", "k", "M", "G", "T", "P", "E"];
  let step = 0;
  while (Math.abs(v) >= 1000 && step < 6) { v /= 1000; step += 1; }
  return significant(v) + " " + prefixes[step] + unit;
}
function bytes(v) {
  const names = ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
  let size = Math.abs(v), step = 0;
  while (size >= 1024 && step < 6) { size /= 1024; step += 1; }
  const digits = Math.max(3, String(Math.trunc(size)).length);
  return (v < 0 ? "−" : "") + significant(size, digits) + " " + names[step];
}
function seconds(v) {
  for (const [scale, unit] of [[1, "s"], [1e-3, "ms"], [1e-6, "µs"]]) {
    if (Math.abs(v) >= scale) return significant(v / scale) + " " + unit;
  }
  return significant(v / 1e-9) + " ns";
}
function grouped(v) {
  return BigInt(Math.trunc(v)).toString().replace(/\B(?=(\d{3})+$)/g, ",");
}
const formats = {
  bytes: bytes,
  flop: v => prefixed(v, "FLOP"),
  flops: v => prefixed(v, "FLOP/s"),
  int: grouped,
  percent: v => significant(v * 100) + " %",
  rate: v => prefixed(v, "B/s"),
  seconds: seconds,
  sig: v => significant(v),
};

// -- the model ---------------------------------------------------------------------------
function sizesOf(state) {
  const sizes = Object.assign({}, spec.constants);
  for (const control of spec.controls) {
    const value = state[control.name];
    if (control.kind === "choice") {
      Object.assign(sizes, control.options.find(o => o.value === value).sets);
    } else {
      sizes[control.name] = Number(value);
    }
  }
  return sizes;
}
// A form's value as a BigInt over 2^32: exact, whatever the sizes.
const UNIT = 2 ** 32, SHIFT = 32n;
function exact(terms, sizes) {
  let total = 0n;
  for (const [coefficient, powers] of terms) {
    let term = BigInt(coefficient * UNIT);
    for (const name in powers) term *= BigInt(sizes[name]) ** BigInt(powers[name]);
    total += term;
  }
  return total;
}
function longest(terms, name, limit, sizes) {
  const most = BigInt(Math.floor(limit)) << SHIFT;
  const fits = n => exact(terms, Object.assign({}, sizes, {[name]: n})) <= most;
  let low = 0n, high = 1n;
  while (high < 2n ** 62n && fits(high)) { low = high; high *= 2n; }
  while (high - low > 1n) {
    const middle = (low + high) / 2n;
    if (fits(middle)) low = middle; else high = middle;
  }
  return Number(low);
}
function makeModel(state, sizes) {
  const truth = v => (v ? 1 : 0);
  function which(w) {
    while (Array.isArray(w)) w = w[2][wordOf(state[w[1]])];
    return spec.forms[w];
  }
  function value(e) {
    if (typeof e === "number") return e;
    if (typeof e === "string") return e in spec.quantities ? value(spec.quantities[e]) : sizes[e];
    const [op, ...rest] = e;
    if (op === "form") {
      const all = Object.assign({}, sizes);
      for (const name in rest[1] || {}) all[name] = value(rest[1][name]);
      return Number(exact(which(rest[0]), all)) / UNIT;
    }
    if (op === "longest") return longest(which(rest[0]), rest[1], value(rest[2]), sizes);
    if (op === "case") return value(rest[1][wordOf(state[rest[0]])]);
    if (op === "if") return value(value(rest[0]) ? rest[1] : rest[2]);
    const v = rest.map(value);
    switch (op) {
      case "+": return v.reduce((a, b) => a + b);
      case "*": return v.reduce((a, b) => a * b);
      case "-": return v[0] - v[1];
      case "/": return v[0] / v[1];
      case "//": return Math.floor(v[0] / v[1]);
      case "min": return Math.min(...v);
      case "max": return Math.max(...v);
      case "<": return truth(v[0] < v[1]);
      case "<=": return truth(v[0] <= v[1]);
      case "==": return truth(v[0] === v[1]);
    }
    throw new Error("unknown operation " + op);
  }
  function text(t) {
    if (typeof t === "string") {
      return t.replace(/\{(\w+)(?::(\w+))?\}/g, (_, name, format) =>
        format ? formats[format](value(name)) : String(value(name)));
    }
    const [op, ...rest] = t;
    if (op === "cat") return rest.map(text).join("");
    if (op === "case") return text(rest[1][wordOf(state[rest[0]])]);
    return text(value(rest[0]) ? rest[1] : rest[2]);
  }
  const withSize = (name, v) => makeModel(state, Object.assign({}, sizes, {[name]: v}));
  return {value, text, withSize};
}
function wordOf(v) {
  return v === true ? "True" : v === false ? "False" : String(v);
}

// -- drawing -----------------------------------------------------------------------------
function num(v) {
  const text = fixed(v, 1).replace(/\.0$/, "");
  return text === "-0" ? "0" : text;
}
const path = points => "M" + points.map(([x, y]) => num(x) + " " + num(y)).join("L");
function logAxis(low, high, start, end) {
  const origin = Math.log2(low);
  const scale = (end - start) / (Math.log2(high) - origin);
  const axis = v => start + (Math.log2(v) - origin) * scale;
  return Object.assign(axis, {
    low, high, start, end,
    holds: v => low <= v && v <= high,
    clamp: v => axis(Math.min(Math.max(v, low), high)),
  });
}
function clip(points, y) {
  const bottom = y.start, top = y.end, out = [];
  for (let i = 0; i + 1 < points.length; i += 1) {
    let [x0, y0] = points[i], [x1, y1] = points[i + 1];
    if (y0 < top || y1 > bottom) continue;
    if (y0 > bottom) { x0 = x0 + (x1 - x0) * (bottom - y0) / (y1 - y0); y0 = bottom; }
    if (y1 < top) { x1 = x0 + (x1 - x0) * (top - y0) / (y1 - y0); y1 = top; }
    if (!out.length) out.push([x0, y0]);
    out.push([x1, y1]);
  }
  return out;
}
const marks = {
  curve(m, mark, x, y, font) {
    let points = [];
    const low = Math.log2(x.low), high = Math.log2(x.high);
    for (let k = Math.trunc(low * 2); k <= Math.trunc(high * 2); k += 1) {
      const size = Math.floor(2 ** (k / 2));
      const v = m.withSize(mark.over, size).value(mark.value);
      if (v > 0) points.push([x(size), y(v)]);
    }
    points = clip(points, y);
    if (points.length < 2) return [];
    const shapes = [["path", path(points), "line " + mark.style]];
    if ("label" in mark) {
      const label = m.text(mark.label);
      if (mark.side === "above") {
        const [px, py] = points[points.length - 1];
        shapes.push(["text", px - 2.6 * font, py + font, label, "name", "end"]);
      } else {
        const [px, py] = points[Math.floor(points.length / 3)];
        shapes.push(["text", px + 10, py + font * 0.9, label, "name", "start"]);
      }
    }
    return shapes;
  },
  level(m, mark, x, y, font) {
    const v = m.value(mark.value);
    if (!y.holds(v)) return [];
    const py = y(v), dy = mark.side === "above" ? -0.4 * font : 1.05 * font;
    const px = mark.align === "start" ? x.start + 6 : x.end - 6;
    return [
      ["path", path([[x.start, py], [x.end, py]]), "level"],
      ["text", px, py + dy, m.text(mark.label), "level-name", mark.align],
    ];
  },
  point(m, mark, x, y) {
    const px = m.value(mark.x), py = m.value(mark.y);
    if (px <= 0 || !x.holds(px) || !y.holds(py)) return [];
    return [["circle", x(px), y(py), mark.r, mark.style]];
  },
  cursor(m, mark, x, y, font) {
    const px = x.clamp(m.value(mark.x)), py = y.clamp(m.value(mark.y));
    const room = px < x.start + (x.end - x.start) * 0.66;
    const dx = room ? 12 : -12;
    let dy = room ? font * 1.3 : -font * 0.6;
    if (py + dy > y.start - 4) dy = -font * 0.6;
    if (py + dy < y.end + font) dy = font * 1.3;
    return [
      ["path", path([[px, y.end], [px, y.start]]), "cursor"],
      ["circle", px, py, 6, "dot a"],
      ["text", px + dx, py + dy, m.text(mark.label), "value", room ? "start" : "end"],
    ];
  },
  polyline(m, mark, x, y) {
    const points = mark.points.map(([a, b]) => [x.clamp(m.value(a)), y.clamp(m.value(b))]);
    return [["path", path(points), "line " + mark.style]];
  },
  note(m, mark, x, y, font) {
    const px = x.clamp(m.value(mark.x)) + mark.dx * font;
    const py = y.clamp(m.value(mark.y)) + mark.dy * font;
    return [["text", px, py, m.text(mark.label), mark.style, mark.anchor]];
  },
  drop(m, mark, x, y, font) {
    const px = x.clamp(m.value(mark.x)), py = y.clamp(m.value(mark.y));
    const lane = y.start - font * (0.6 + 1.35 * mark.lane);
    const left = px > x.start + (x.end - x.start) * 0.75;
    return [
      ["path", path([[px, py], [px, y.start]]), "drop " + mark.style],
      ["text", px + (left ? -6 : 6), lane, m.text(mark.label), "name", left ? "end" : "start"],
      ["circle", px, py, mark.r, mark.dot],
    ];
  },
};
const gcd = (a, b) => (b ? gcd(b, a % b) : a);
const spans = {
  comb(m, bar, unit) {
    let start = m.value(bar.start);
    const step = m.value(bar.step), end = m.value(bar.end), out = [];
    if (end <= start) return [];
    if (step * unit < 4) return [[start, (end - start) * unit]];
    for (; start < end; start += step) out.push([start, Math.min(step, end - start) * unit - 1]);
    return out;
  },
  scatter(m, bar, unit) {
    const [first, candidates, chosen, step, seed] =
      ["first", "candidates", "chosen", "step", "seed"].map(name => m.value(bar[name]));
    if (candidates < 1) return [];
    let stride = Math.max(1, Math.floor(0.618 * candidates));
    while (gcd(stride, candidates) !== 1) stride += 1;
    const gap = step * unit >= 4 ? 1 : 0, out = [];
    for (let i = 0; i < chosen; i += 1) {
      out.push([(first + (i * stride + seed) % candidates) * step, step * unit - gap]);
    }
    return out;
  },
};
const figures = {
  reads(m, figure, layout) {
    const box = spec.layouts[layout], font = box.font, left = 2, right = box.w - 2;
    const unit = (right - left) / m.value(figure.keys), tall = font * 1.5;
    const position = left + (m.value(figure.query) + 0.5) * unit;
    const early = position < left + (right - left) * 0.6;
    const shapes = [["text", position + (early ? 6 : -6), font * 1.1, m.text(figure.label), "value",
      early ? "start" : "end"]];
    let y = font * 1.5;
    for (const lane of figure.lanes) {
      shapes.push(["text", left, y + font * 1.3, m.text(lane.label), "name", "start"]);
      shapes.push(["text", right, y + font * 1.3, m.text(lane.note), "tick", "end"]);
      y += font * 1.7;
      for (const bar of lane.bars) {
        for (const [start, width] of spans[bar.bar](m, bar, unit)) {
          shapes.push(["rect", left + start * unit, y, Math.max(width, 1.5), tall, "bar " + bar.style]);
        }
      }
      shapes.push(["path", path([[position, y - 3], [position, y + tall]]), "cursor"]);
      y += tall;
      shapes.push(["path", path([[left, y], [right, y]]), "axis"]);
      y += font * 0.4;
    }
    shapes.push(["path", path([[position, font * 0.2], [position, font * 1.5]]), "cursor"]);
    for (const [name, share, anchor] of figure.ticks) {
      if (anchor === "middle" && layout === "narrow" && share !== 0.5) continue;
      shapes.push(["text", left + share * (right - left), y + font * 1.1, m.text(name), "tick", anchor]);
    }
    return shapes;
  },
  loglog(m, figure, layout) {
    const box = spec.layouts[layout], font = box.font;
    const left = box.l, right = box.w - box.r, top = box.t, bottom = box.h - box.b;
    const x = logAxis(figure.x.low, figure.x.high, left, right);
    const y = logAxis(figure.y.low, figure.y.high, bottom, top);
    const shapes = [];
    for (const [value, label, wideOnly] of figure.x.ticks) {
      if (wideOnly && layout === "narrow") continue;
      shapes.push(["path", path([[x(value), top], [x(value), bottom]]), "grid"]);
      shapes.push(["text", x(value), bottom + font * 1.4, label, "tick", "middle"]);
    }
    for (const [value, label, wideOnly] of figure.y.ticks) {
      if (wideOnly && layout === "narrow") continue;
      shapes.push(["path", path([[left, y(value)], [right, y(value)]]), "grid"]);
      shapes.push(["text", left - 8, y(value) + font * 0.35, label, "tick", "end"]);
    }
    shapes.push(["path", path([[left, top], [left, bottom], [right, bottom]]), "axis"]);
    shapes.push(["text", 2, font * 1.1, m.text(figure.y.label), "label", "start"]);
    shapes.push(["text", right, box.h - font * 0.5, m.text(figure.x.label), "label", "end"]);
    const marked = figure.marks.filter(mark => !("if" in mark) || m.value(mark.if))
      .flatMap(mark => marks[mark.mark](m, mark, x, y, font));
    const line = shape => shape[0] === "path";
    return [...shapes, ...marked.filter(line), ...marked.filter(shape => !line(shape))];
  },
  doubling(m, figure, layout) {
    const box = spec.layouts[layout], columns = figure.columns, font = box.font;
    const wide = layout === "wide", shapes = [];
    const left = wide ? 112 : 4;
    const step = wide ? (box.w - left) / columns.length : box.w - 8;
    const unit = (step - 22) / 4;
    let y = font * 1.2;
    if (wide) {
      columns.forEach((column, c) =>
        shapes.push(["text", left + c * step, y, m.text(column.label), "name", "start"]));
      y += font * 0.9;
    }
    for (const row of figure.rows) {
      if (wide) {
        shapes.push(["path", path([[0, y], [box.w, y]]), "grid"]);
        shapes.push(["text", 0, y + font * 1.9, m.text(row.label), "name", "start"]);
        shapes.push(["text", 0, y + font * 3.2, m.text(row.note), "tick", "start"]);
      } else {
        shapes.push(["text", left, y, m.text(row.label) + ": " + m.text(row.note), "name", "start"]);
        y += font * 0.5;
      }
      row.cells.forEach((cell, c) => {
        const x0 = wide ? left + c * step : left;
        let y0 = wide ? y + font * 1.0 : y + font * 1.15;
        if (!wide) {
          shapes.push(["text", x0, y0, m.text(columns[c].label), "tick", "start"]);
          shapes.push(["text", x0 + step, y0, m.text(cell.text), "tick", "end"]);
          y0 += font * 0.4;
        }
        const factor = m.value(cell.factor), tall = font * (wide ? 1.25 : 1.05);
        const grown = unit * Math.min(factor, 4), style = columns[c].style;
        shapes.push(["rect", x0, y0, grown, tall, "grown " + style]);
        shapes.push(["rect", x0, y0, unit, tall, "bar " + style]);
        const outside = factor < 3.2;
        shapes.push(["text", x0 + grown + (outside ? 5 : -5), y0 + tall * 0.78,
          m.text(cell.times), "value", outside ? "start" : "end"]);
        if (wide) {
          shapes.push(["text", x0, y0 + tall + font * 1.15, m.text(cell.text), "tick", "start"]);
        } else {
          y = y0 + tall + font * 0.25;
        }
      });
      y += font * (wide ? 5.0 : 2.1);
    }
    return shapes;
  },
};
// parts
const escaped = t => t.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const classes = style => style.split(" ").map(name => "lkx-" + name).join(" ");
function svg(shapes) {
  return shapes.map(s => {
    if (s[0] === "path") return `<path class="${classes(s[2])}" d="${s[1]}"/>`;
    const c = classes(s[s[0] === "rect" ? 5 : 4]), [a, b] = [num(s[1]), num(s[2])];
    if (s[0] === "rect") return `<rect class="${c}" x="${a}" y="${b}" width="${num(s[3])}" height="${num(s[4])}"/>`;
    if (s[0] === "circle") return `<circle class="${c}" cx="${a}" cy="${b}" r="${num(s[3])}"/>`;
    return `<text class="${c}" x="${a}" y="${b}" text-anchor="${s[5]}">${escaped(s[3])}</text>`;
  }).join("");
}

// -- inputs ------------------------------------------------------------------------------
function mount(root) {
  const state = {}, find = (node, selector) => node.querySelector(selector);
  const message = find(root, ".lkx-error"), form = find(root, ".lkx-controls");
  const faults = new Map();
  const parts = {};
  function redraw() {
    const m = makeModel(state, sizesOf(state));
    for (const layout in spec.layouts) {
      find(root, ".lkx-" + layout).innerHTML = svg(figures[spec.figure.kind](m, spec.figure, layout));
    }
    const summary = m.text(spec.summary), line = find(root, ".lkx-summary");
    if (line.textContent !== summary) line.textContent = summary;
    const cells = root.querySelectorAll(".lkx-table th, .lkx-table td");
    const texts = [spec.table.head, ...spec.table.rows].flat().map(m.text);
    texts.forEach((t, i) => { cells[i].textContent = t; });
  }
  function complain() {
    message.textContent = [...faults.values()].join(" ");
  }
  function nearest(control, value) {
    let best = 0;
    control.stops.forEach((stop, i) => {
      if (Math.abs(stop - value) < Math.abs(control.stops[best] - value)) best = i;
    });
    return best;
  }
  // writes the state of one control into its inputs, except the one in use
  function reflect(control, used) {
    const {box, number, range} = parts[control.name], value = state[control.name];
    if (control.kind === "choice") {
      if (used !== box) box.value = value;
    } else if (control.kind === "check") {
      box.checked = value;
    } else {
      if (used !== number) number.value = value;
      if (used !== range) range.value = nearest(control, value);
      range.setAttribute("aria-valuetext", grouped(value));
      number.removeAttribute("aria-invalid");
      faults.delete(control.name);
    }
  }
  function set(control, value, used) {
    state[control.name] = value;
    reflect(control, used);
    complain();
    redraw();
  }
  for (const control of spec.controls) {
    const holder = find(root, `[data-control="${control.name}"]`);
    const part = parts[control.name] = {
      box: find(holder, "select, input[type=checkbox]"),
      number: find(holder, "input[type=number]"),
      range: find(holder, "input[type=range]"),
    };
    state[control.name] = control.value;
    if (control.kind === "choice") {
      part.box.addEventListener("change", () => set(control, part.box.value, part.box));
    } else if (control.kind === "check") {
      part.box.addEventListener("change", () => set(control, part.box.checked, part.box));
    } else {
      part.range.addEventListener("input", () =>
        set(control, control.stops[part.range.value], part.range));
      part.number.addEventListener("input", () => {
        const value = part.number.valueAsNumber;
        if (Number.isInteger(value) && value >= control.min && value <= control.max) {
          set(control, value, part.number);
          return;
        }
        part.number.setAttribute("aria-invalid", "true");
        faults.set(control.name, `${control.label} must be a whole number from ` +
          `${grouped(control.min)} to ${grouped(control.max)}; ` +
          `the figure still shows ${grouped(state[control.name])}.`);
        complain();
      });
    }
    reflect(control);
  }
  find(root, ".lkx-reset").addEventListener("click", () => {
    for (const control of spec.controls) {
      state[control.name] = control.value;
      reflect(control);
    }
    complain();
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
    values() {
      const m = makeModel(state, sizesOf(state));
      return Object.fromEntries(Object.keys(spec.quantities).map(name => [name, m.value(name)]));
    },
    at(changes) {
      const s = Object.assign({}, state, changes), m = makeModel(s, sizesOf(s));
      return {
        values: Object.fromEntries(Object.keys(spec.quantities).map(name => [name, m.value(name)])),
        summary: m.text(spec.summary),
        table: [spec.table.head, ...spec.table.rows].map(row => row.map(m.text)),
        svg: Object.fromEntries(Object.keys(spec.layouts).map(layout =>
          [layout, svg(figures[spec.figure.kind](m, spec.figure, layout))])),
      };
    },
    format: (name, v) => formats[name](v),
  };
}
// One explorer may stand twice on a page, and a script may run twice: wire each node once.
const done = window.labkitExplorers = window.labkitExplorers || new WeakSet();
const here = document.currentScript && document.currentScript.closest(".lkx");
for (const root of new Set([here, ...document.querySelectorAll(`.lkx[data-lkx="${key}"]`)])) {
  if (root && !done.has(root)) { done.add(root); mount(root); }
}
}

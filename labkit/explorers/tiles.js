// Twin of patterns.py: a mask as squares, the tiles that it touches, and bars beside them.
const digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
function unpack(text, n) {
  const mask = [];
  for (let i = 0, at = 0; i < n; i += 1) {
    const bit = j => (digits.indexOf(text[at + Math.floor(j / 6)]) >> (j % 6)) & 1;
    mask.push(Array.from({length: n}, (_, j) => j <= i && bit(j) === 1));
    at += Math.floor(i / 6) + 1;
  }
  return mask;
}
function runs(length, test) {
  const out = [];
  for (let j = 0; j < length; j += 1) {
    if (!test(j)) continue;
    const start = j;
    while (j < length && test(j)) j += 1;
    out.push([start, j]);
  }
  return out;
}
figures.tiles = (m, figure, layout) => {
  const box = spec.layouts[layout], font = box.font, n = figure.n, at = figure.at[layout];
  const mask = unpack(figure.masks[m.value("p")][m.value("k")], n);
  const b = m.value("b"), c = at.cell, x = at.x, y = at.y, count = n / b;
  const touched = (r, k) => mask.slice(r * b, r * b + b).some(row =>
    row.slice(k * b, k * b + b).includes(true));
  const square = (left, right, top, bottom) =>
    `M${num(x + left * c)} ${num(y + top * c)}h${num((right - left) * c)}v${num((bottom - top) * c)}` +
    `h-${num((right - left) * c)}z`;
  let cells = "", tiles = "", rules = "";
  for (let i = 0; i < n; i += 1) {
    for (const [from, to] of runs(n, j => mask[i][j])) cells += square(from, to, i, i + 1);
  }
  for (let r = 0; r < count; r += 1) {
    for (const [from, to] of runs(count, k => touched(r, k))) {
      tiles += square(from * b, to * b, r * b, r * b + b);
    }
  }
  if (b >= 4) {
    for (let k = b; k < n; k += b) {
      rules += path([[x + k * c, y], [x + k * c, y + n * c]]);
      rules += path([[x, y + k * c], [x + n * c, y + k * c]]);
    }
  }
  const end = n * c, frame = path([[x, y], [x + end, y], [x + end, y + end], [x, y + end], [x, y]]);
  const shapes = [["text", x, y - 6, m.text(figure.across), "tick", "start"],
    ["text", x + end, y - 6, m.text(figure.down), "tick", "end"]];
  shapes.push(["path", tiles, "cells b"], ["path", cells, "cells a"]);
  if (rules) shapes.push(["path", rules, "rule"]);
  shapes.push(["path", frame, "axis"]);
  let line = at.bars.y;
  for (const bar of figure.bars) {
    const share = m.value(bar.share), x0 = at.bars.x;
    shapes.push(["text", x0, line + font, m.text(bar.label), "name", "start"]);
    shapes.push(["text", x0 + at.bars.w, line + font, m.text(bar.note), "tick", "end"]);
    line += font * 1.4;
    shapes.push(["rect", x0, line, at.bars.w, font * 1.1, "box"]);
    shapes.push(["rect", x0, line, Math.max(share * at.bars.w, 1), font * 1.1, bar.style]);
    line += font * 1.8;
  }
  return shapes;
};

// Twin of fits.py: the parts with their bytes, then a frame for each card and what fills it.
figures.fits = (m, figure, layout) => {
  const box = spec.layouts[layout], font = box.font, left = 2, right = box.w - 2;
  const columns = layout === "wide" ? 3 : 2, step = (right - left) / columns, shapes = [];
  let y = font * 0.4;
  figure.parts.forEach((part, i) => {
    const x = left + (i % columns) * step;
    shapes.push(["rect", x, y, font, font, part.style]);
    shapes.push(["text", x + font * 1.4, y + font * 0.85, m.text(part.label), "tick", "start"]);
    if (i % columns === columns - 1) y += font * 1.6;
  });
  y += font * 0.6;
  const full = (right - left) * 0.86, tall = font * 1.5;
  for (const lane of figure.cards) {
    y += font * 1.3;
    shapes.push(["text", left, y, m.text(lane.label), "name", "start"]);
    shapes.push(["text", right, y, m.text(lane.note), "tick", "end"]);
    y += font * 0.5;
    const memory = m.value(lane.memory);
    let start = 0;
    for (const part of figure.parts) {
      const v = m.value(part.value);
      const x0 = Math.min(start * full / memory, right - left);
      const x1 = Math.min((start + v) * full / memory, right - left);
      start += v;
      if (x1 - x0 >= 0.05) shapes.push(["rect", left + x0, y, x1 - x0, tall, part.style]);
    }
    shapes.push(["path", path([[left, y], [left + full, y], [left + full, y + tall],
      [left, y + tall], [left, y]]), "axis"]);
    y += tall + font * 0.4;
  }
  return shapes;
};

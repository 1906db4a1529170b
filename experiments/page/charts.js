"use strict";

// Charts of lines as SVG, drawn for the width that there is. Curves differ by marker and dashes as well as by colour.

const SVG = new Set(["svg", "g", "path", "line", "text"]);
const MARKERS = [
  "M4.4 0A4.4 4.4 0 1 1-4.4 0A4.4 4.4 0 1 1 4.4 0Z",
  "M-4-4H4V4H-4Z",
  "M0-5.2L4.8 3.6H-4.8Z",
  "M0-5.4L5.4 0L0 5.4L-5.4 0Z",
  "M0 5.2L4.8-3.6H-4.8Z",
  "M-1.6-5H1.6V-1.6H5V1.6H1.6V5H-1.6V1.6H-5V-1.6H-1.6Z",
  "M-4.8-4.8H4.8L-4.8 4.8H4.8Z",
  "M0-5.6L1.4-1.8L5.4-1.7L2.2.7L3.3 4.5L0 2.2L-3.3 4.5L-2.2.7L-5.4-1.7L-1.4-1.8Z",
];
const DASHES = ["", "8 3", "9 3 2 3", "4 3"];
const MARGIN = {left: 54, right: 16, top: 30, bottom: 44};
const tip = document.getElementById("tip");

function element(name, attributes = {}, ...children) {
  const made = SVG.has(name)
    ? document.createElementNS("http://www.w3.org/2000/svg", name)
    : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value !== false && value != null) made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

function styleOf(index, measured) {
  return {
    colour: `var(--c${index % 8})`,
    marker: MARKERS[index % MARKERS.length],
    dash: measured ? DASHES[index % DASHES.length] : "1 4",
    fill: measured ? `var(--c${index % 8})` : "var(--card)",
  };
}

const marker = (style, x, y, scale = 1) =>
  element("path", {
    class: "marker",
    d: style.marker,
    stroke: style.colour,
    fill: style.fill,
    transform: `translate(${x} ${y}) scale(${scale})`,
  });
const line = (style, d) => element("path", {class: "line", d, stroke: style.colour, "stroke-dasharray": style.dash});

// Charts that share curves: a legend that hides and shows them, and a drawing of each that follows its width.
function chartGroup(group) {
  const curves = new Map(group.charts.flatMap(chart => chart.curves).map(curve => [curve.label, curve.measured]));
  const styles = new Map([...curves].map(([label, measured], index) => [label, styleOf(index, measured)]));
  const hidden = new Set();
  const drawings = group.charts.map(chart => drawing(chart, styles, hidden));
  const entries = [...styles].map(([label, style]) =>
    element(
      "button",
      {
        type: "button",
        "aria-pressed": "true",
        onclick: event => {
          hidden.delete(label) || hidden.add(label);
          event.currentTarget.setAttribute("aria-pressed", String(!hidden.has(label)));
          drawings.forEach(each => each.draw());
        },
      },
      element("svg", {width: 40, height: 14, "aria-hidden": "true"}, line(style, "M1 7H39"), marker(style, 20, 7)),
      label,
    ),
  );
  const figures = element("div", {class: "charts"}, ...drawings.map(each => each.figure));
  new ResizeObserver(() => drawings.forEach(each => each.draw())).observe(figures);
  return element(
    "div",
    {class: "group"},
    element("h3", {}, group.title),
    element("div", {class: "legend", role: "group", "aria-label": "Curves"}, ...entries),
    figures,
  );
}

function drawing(chart, styles, hidden) {
  const svg = element("svg", {
    tabindex: 0,
    role: "application",
    "aria-roledescription": "chart",
    "aria-label": `${chart.title} by ${chart.x}: ${chart.y}. Arrow keys walk along its points.`,
  });
  const figure = element(
    "figure",
    {class: "chart"},
    element("h3", {}, chart.title),
    svg,
    chart.told ? element("figcaption", {}, chart.told) : "",
  );
  let points = [],
    at = null;

  function draw() {
    const width = svg.clientWidth,
      height = Math.round(Math.min(330, Math.max(240, width * 0.64)));
    if (!width) return;
    const shown = chart.curves.filter(curve => !hidden.has(curve.label));
    const all = shown.flatMap(curve => curve.points);
    const x = axis(
      all.map(point => point[0]),
      MARGIN.left,
      width - MARGIN.right,
      chart.log,
      Math.floor(width / 80),
    );
    const y = axis(
      all.map(point => point[1]),
      height - MARGIN.bottom,
      MARGIN.top,
      false,
      5,
    );
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.style.height = `${height}px`;
    svg.replaceChildren(element("text", {x: 2, y: 12}, chart.y), ...frame(x, y, width, height, chart.x));
    points = [];
    for (const curve of shown) {
      const style = styles.get(curve.label),
        places = curve.points.map(([a, b]) => [x.place(a), y.place(b)]);
      svg.append(line(style, "M" + places.map(place => place.map(v => v.toFixed(1)).join(" ")).join("L")));
      places.forEach(([px, py], i) => {
        const mark = marker(style, px, py);
        svg.append(mark);
        points.push({px, py, mark, style, curve, value: curve.points[i]});
      });
    }
    leave();
  }

  function show(point) {
    leave();
    at = point;
    svg.append(point.mark); // above the others
    point.mark.replaceWith((point.mark = marker(point.style, point.px, point.py, 1.7)));
    const [a, b, told] = point.value,
      box = svg.getBoundingClientRect();
    tip.replaceChildren(
      element("b", {}, point.curve.label),
      `${short(b)} at ${short(a)} ${chart.unit}`,
      ...(told ? [element("br"), told] : []),
    );
    tip.hidden = false;
    const left = box.left + point.px - tip.offsetWidth / 2,
      above = box.top + point.py - tip.offsetHeight - 14;
    tip.style.left = `${Math.max(6, Math.min(left, document.documentElement.clientWidth - tip.offsetWidth - 6))}px`;
    tip.style.top = `${above > 4 ? above : box.top + point.py + 16}px`;
  }

  function leave() {
    if (at) at.mark.replaceWith((at.mark = marker(at.style, at.px, at.py)));
    at = null;
    tip.hidden = true;
  }

  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect(),
      far = point => Math.hypot(point.px - event.clientX + box.left, point.py - event.clientY + box.top);
    const nearest = points.reduce((a, b) => (a && far(a) <= far(b) ? a : b), null);
    if (!nearest || far(nearest) > 48) leave();
    else if (nearest !== at) show(nearest);
  });
  svg.addEventListener("pointerleave", leave);
  svg.addEventListener("blur", leave);
  svg.addEventListener("keydown", event => {
    const step = {ArrowRight: 1, ArrowLeft: -1, ArrowDown: 1, ArrowUp: -1}[event.key];
    if (event.key === "Escape") leave();
    if (!step || !points.length) return;
    event.preventDefault();
    const sideways = event.key === "ArrowRight" || event.key === "ArrowLeft",
      i = points.indexOf(at);
    let next = i < 0 ? points[0] : points[(i + step + points.length) % points.length];
    if (!sideways && at) {
      // the nearest rate of the next curve
      const curves = [...new Set(points.map(point => point.curve))];
      const curve = curves[(curves.indexOf(at.curve) + step + curves.length) % curves.length];
      const far = point => Math.abs(point.px - at.px);
      next = points.filter(point => point.curve === curve).reduce((a, b) => (far(a) <= far(b) ? a : b));
    }
    show(next);
  });
  return {figure, draw};
}

// A scale over values, with ticks at round numbers, that places values between two pixels.
function axis(values, from, to, log, count) {
  let low = Math.min(...values),
    high = Math.max(...values);
  if (!values.length) [low, high] = [0, 1];
  if (log) [low, high] = [low * 0.85, high * 1.15];
  else {
    const pad = (high - low || Math.abs(high) || 1) * 0.07;
    [low, high] = [low >= 0 ? Math.max(0, low - pad) : low - pad, high + pad];
  }
  const ticks = log ? logTicks(low, high) : linearTicks(low, high, count);
  const scale = log ? Math.log : value => value;
  return {
    ticks,
    from,
    to,
    place: value => from + ((to - from) * (scale(value) - scale(low))) / (scale(high) - scale(low)),
  };
}

function linearTicks(low, high, count) {
  const rough = (high - low) / Math.max(2, count),
    power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(times => times * power).find(step => step >= rough);
  const first = Math.ceil(low / step),
    last = Math.floor(high / step + 1e-9);
  const decimals = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  return Array.from({length: last - first + 1}, (_, i) => [(first + i) * step, ((first + i) * step).toFixed(decimals)]);
}

function logTicks(low, high) {
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
    for (const times of [1, 2, 5]) found.push(Number((times * 10 ** power).toPrecision(1)));
  return found.filter(value => low <= value && value <= high).map(value => [value, String(value)]);
}

function frame(x, y, width, height, told) {
  const bottom = y.from,
    parts = [];
  for (const [value, label] of y.ticks) {
    parts.push(element("line", {class: "grid", x1: x.from, x2: x.to, y1: y.place(value), y2: y.place(value)}));
    parts.push(element("text", {x: x.from - 8, y: y.place(value) + 4, "text-anchor": "end"}, label));
  }
  for (const [value, label] of x.ticks) {
    parts.push(element("line", {class: "axis", x1: x.place(value), x2: x.place(value), y1: bottom, y2: bottom + 5}));
    parts.push(element("text", {x: x.place(value), y: bottom + 19, "text-anchor": "middle"}, label));
  }
  parts.push(element("line", {class: "axis", x1: x.from, x2: x.to, y1: bottom, y2: bottom}));
  parts.push(element("text", {x: (x.from + x.to) / 2, y: height - 5, "text-anchor": "middle"}, told));
  return parts;
}

const short = value => String(Number(value.toPrecision(4)));

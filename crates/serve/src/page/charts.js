// Colour scale, heat map and small charts, drawn by hand.

import { element, shape } from "./dom.js";

/** OKLab (https://bottosson.github.io/posts/oklab/) to sRGB bytes. */
function srgb(lightness, a, b) {
  const l = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3;
  const m = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3;
  const s = (lightness - 0.0894841775 * a - 1.291485548 * b) ** 3;
  const linear = [
    4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s,
    -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s,
    -0.0041960863 * l - 0.7034186147 * m + 1.707614701 * s,
  ];
  return linear.map((value) => {
    const v = Math.min(1, Math.max(0, value));
    return Math.round(255 * (v <= 0.0031308 ? 12.92 * v : 1.055 * v ** (1 / 2.4) - 0.055));
  });
}

/**
 * 0..1 to a colour from deep blue over grey-green to yellow. Lightness rises evenly and the hues lie on the blue-yellow
 * axis, which every common kind of colour blindness keeps apart; in grey print the order stays.
 */
export function scale(share) {
  const t = Math.min(1, Math.max(0, Number.isFinite(share) ? share : 0));
  return srgb(0.27 + 0.63 * t, -0.012 - 0.03 * Math.sin(Math.PI * t), -0.085 + 0.215 * t);
}

export function css([r, g, b]) {
  return `rgb(${r} ${g} ${b})`;
}

/** Black or white, whichever can be read on the colour of this share. */
export function ink(share) {
  return share > 0.46 ? "#101418" : "#ffffff";
}

/** The scale as a strip with labels at 0, the middle and the top. */
export function legend(low, middle, high) {
  const canvas = element("canvas", { width: 256, height: 1, class: "legend-strip", "aria-hidden": "true" });
  const context = canvas.getContext("2d");
  for (let x = 0; x < 256; x += 1) {
    context.fillStyle = css(scale(x / 255));
    context.fillRect(x, 0, 1, 1);
  }
  const labels = [low, middle, high].map((text) => element("span", {}, text));
  return element("div", { class: "legend" }, canvas, element("div", { class: "legend-labels" }, ...labels));
}

/**
 * A heat map that the keyboard can walk. `draw` takes rows of numbers 0..1; `describe(row, column)` gives the words for a
 * cell, `choose(row, column)` is called on click and Enter.
 */
export class HeatMap {
  constructor({ label, rowName, columnName, describe, choose }) {
    Object.assign(this, { rowName, columnName, describe, choose });
    this.rows = [];
    this.cell = null;
    this.canvas = element("canvas", {
      class: "heat", tabindex: 0, role: "application", "aria-roledescription": "heat map", "aria-label": label,
      onmousemove: (event) => this.point(event),
      onmouseleave: () => this.show(null),
      onclick: (event) => { this.point(event); if (this.cell) this.choose(...this.cell); },
      onkeydown: (event) => this.key(event),
      onfocus: () => { if (!this.cell && this.rows.length) this.show([0, 0]); },
    });
    this.words = element("output", { class: "words", "aria-live": "polite" });
    this.node = element("figure", { class: "heat-figure" }, this.canvas, element("figcaption", {}, this.words));
    new ResizeObserver(() => this.paint()).observe(this.canvas);
  }

  draw(rows, labels) {
    this.rows = rows;
    this.labels = labels;
    this.paint();
    if (this.cell) this.show(this.cell);
  }

  /** Where things stand: a gutter at the left for the rows' labels, one below for the columns'. */
  layout() {
    const width = Math.max(160, this.canvas.clientWidth);
    const columns = this.rows[0]?.length ?? 1;
    const gutter = 30;
    const side = (width - gutter) / columns;
    const height = Math.max(9, Math.min(28, side, 420 / Math.max(1, this.rows.length)));
    return { width, columns, gutter, side, height, total: height * this.rows.length + 18 };
  }

  paint() {
    if (!this.rows.length || !this.canvas.clientWidth) return;
    const { width, columns, gutter, side, height, total } = this.layout();
    const ratio = window.devicePixelRatio || 1;
    this.canvas.style.height = `${total}px`;
    this.canvas.width = Math.round(width * ratio);
    this.canvas.height = Math.round(total * ratio);
    const context = this.canvas.getContext("2d");
    context.scale(ratio, ratio);
    const gap = side > 7 ? 1 : 0;
    this.rows.forEach((row, r) => row.forEach((value, c) => {
      context.fillStyle = css(scale(value));
      context.fillRect(gutter + c * side, r * height, side - gap, height - gap);
    }));
    const style = getComputedStyle(this.canvas);
    context.fillStyle = style.color;
    context.font = `11px ${style.fontFamily}`;
    context.textBaseline = "middle";
    context.textAlign = "right";
    const everyRow = Math.ceil(13 / height);
    this.rows.forEach((_, r) => { if (r % everyRow === 0) context.fillText(this.labels[r], gutter - 6, (r + 0.45) * height); });
    context.textAlign = "center";
    const everyColumn = [1, 2, 4, 8, 16, 32, 64].find((step) => step * side >= 22) ?? 128;
    for (let c = 0; c < columns; c += everyColumn) context.fillText(c, gutter + (c + 0.5) * side, total - 7);
    if (this.cell) this.mark(context, style.color);
  }

  mark(context, colour) {
    const { gutter, side, height } = this.layout();
    const [r, c] = this.cell;
    context.lineWidth = 2;
    context.strokeStyle = "#ffffff";
    context.strokeRect(gutter + c * side - 1, r * height - 1, side + 1, height + 1);
    context.strokeStyle = colour;
    context.strokeRect(gutter + c * side - 2.5, r * height - 2.5, side + 4, height + 4);
  }

  show(cell) {
    const [rows, columns] = [this.rows.length, this.rows[0]?.length ?? 0];
    this.cell = cell && rows ? [Math.min(rows - 1, cell[0]), Math.min(columns - 1, cell[1])] : null;
    this.words.textContent = this.cell ? this.describe(...this.cell) : "";
    this.paint();
  }

  point(event) {
    const { gutter, side, height } = this.layout();
    const row = Math.floor(event.offsetY / height);
    const column = Math.floor((event.offsetX - gutter) / side);
    const inside = row >= 0 && row < this.rows.length && column >= 0 && column < this.rows[0].length;
    this.show(inside ? [row, column] : null);
  }

  key(event) {
    const [r, c] = this.cell ?? [0, 0];
    const moves = { ArrowUp: [r - 1, c], ArrowDown: [r + 1, c], ArrowLeft: [r, c - 1], ArrowRight: [r, c + 1], Home: [r, 0], End: [r, 1e9] };
    if (moves[event.key]) this.show(moves[event.key].map((v) => Math.max(0, v)));
    else if ((event.key === "Enter" || event.key === " ") && this.cell) this.choose(...this.cell);
    else return;
    event.preventDefault();
  }
}

/** A line over time with a filled area, newest value at the right. */
export function timeline(values, { label, unit, top, seconds }) {
  const [width, height] = [320, 64];
  const highest = top ?? niceTop(Math.max(...values, 0));
  const step = width / Math.max(1, values.length - 1);
  const y = (value) => height - 1 - (Math.min(value, highest) / highest) * (height - 4);
  const line = values.map((value, i) => `${(i * step).toFixed(1)} ${y(value).toFixed(1)}`).join("L");
  const now = values.at(-1) ?? 0;
  const svg = shape("svg", { class: "timeline", viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", role: "img", "aria-label": `${label}: now ${unit(now)}, highest ${unit(Math.max(...values, 0))}` });
  svg.append(shape("line", { class: "grid", x1: 0, x2: width, y1: y(highest), y2: y(highest) }), shape("line", { class: "grid", x1: 0, x2: width, y1: y(highest / 2), y2: y(highest / 2) }));
  if (values.length > 1) svg.append(shape("path", { class: "area", d: `M0 ${height}L${line}L${width} ${height}Z` }), shape("path", { class: "line", d: `M${line}` }));
  const head = element("div", { class: "chart-head" }, element("span", {}, label), element("strong", {}, unit(now)));
  const foot = element("div", { class: "chart-foot", "aria-hidden": "true" }, element("span", {}, seconds), element("span", {}, `top ${unit(highest)}`), element("span", {}, "now"));
  return element("div", { class: "chart" }, head, svg, foot);
}

/** The next of 1, 2, 5, 10, ... above the value. */
function niceTop(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((step) => step * power).find((step) => step >= value * 1.05) ?? 10 * power;
}

/** Labelled bars with their values; `bars` is a list of [label, value, words]. */
export function barList(bars, top) {
  const row = ([label, value, words]) => {
    const fill = element("span", { class: "bar-fill" });
    fill.style.inlineSize = `${Math.min(100, (100 * value) / top)}%`;
    return element("div", { class: "bar-row" }, element("span", { class: "bar-label" }, label), element("span", { class: "bar-track" }, fill), element("span", { class: "bar-value" }, words));
  };
  return element("div", { class: "bars" }, ...bars.map(row));
}

// Building the document. Text always becomes a text node: nothing that a model or a user wrote is ever parsed as HTML.

const SVG = "http://www.w3.org/2000/svg";

function fill(node, properties, children) {
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  node.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

/** An HTML element with attributes, listeners (`onclick: f`) and children (nodes or text). */
export function element(tag, properties = {}, ...children) {
  return fill(document.createElement(tag), properties, children);
}

/** The same for SVG. */
export function shape(tag, properties = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), properties, children);
}

/** The element of the page with this id. */
export function byId(id) {
  return document.getElementById(id);
}

/** A value kept in the browser; the default where storage is forbidden, empty or damaged. */
export function remembered(key, fallback) {
  try {
    const text = localStorage.getItem(`moebius.${key}`);
    return text === null ? fallback : JSON.parse(text);
  } catch {
    return fallback;
  }
}

/** Keeps a value in the browser where that is allowed. */
export function remember(key, value) {
  try {
    localStorage.setItem(`moebius.${key}`, JSON.stringify(value));
  } catch {
    // A browser without storage forgets: nothing else depends on it.
  }
}

/** 1234567 as "1.23 M". */
export function short(count) {
  for (const [limit, unit] of [[1e12, " T"], [1e9, " B"], [1e6, " M"], [1e4, " k"]]) {
    if (count >= limit) return `${trimmed(count / (unit === " k" ? 1e3 : limit))}${unit}`;
  }
  return Number.isInteger(count) ? count.toLocaleString("en") : trimmed(count);
}

/** A count of bytes in binary units. */
export function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (count >= 1024 && unit < units.length - 1) {
    count /= 1024;
    unit += 1;
  }
  return `${unit === 0 ? count : trimmed(count)} ${units[unit]}`;
}

/** Seconds as "3 h 12 min". */
export function duration(seconds) {
  const s = Math.floor(seconds);
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${s % 60} s`;
  if (s < 86400) return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
  return `${Math.floor(s / 86400)} d ${Math.floor((s % 86400) / 3600)} h`;
}

function trimmed(value) {
  return value >= 100 ? value.toFixed(0) : value >= 10 ? value.toFixed(1) : value.toFixed(2);
}

/** A key of an accessible name for whitespace and control characters in a token. */
export function visible(text) {
  const names = { " ": "␣", "\n": "↵", "\r": "␍", "\t": "⇥" };
  const shown = text.replace(/[ \n\r\t]/g, (c) => names[c]).replace(/[\u0000-\u001f\u007f]/g, "␀");
  return shown === "" ? "∅" : shown;
}

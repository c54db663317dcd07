// Markdown as a model writes it, turned into nodes of the document. Only `element` makes nodes and only from text, so
// hostile text stays text. Every step is linear in the text, and nesting is bounded: no answer can freeze the page.

import { element } from "./dom.js";

const DEEPEST = 8;
const LONGEST_LINK = 2000;

/** The nodes of a whole text. */
export function markdown(text) {
  return blocks(text.replace(/\r\n?/g, "\n").split("\n"), 0);
}

const FENCE = /^ {0,3}(`{3,}|~{3,})[ \t]*([^\s`]*)/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+(.*)$/;
const RULE = /^ {0,3}([-*_])[ \t]*(?:\1[ \t]*){2,}$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( {0,12})([-*+]|\d{1,9}[.)])[ \t]+(.*)$/;
const TABLE_RULE = /^ {0,3}\|?[ \t]*:?-+:?[ \t]*(\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;

function blocks(lines, depth) {
  const nodes = [];
  let at = 0;
  while (at < lines.length) {
    const line = lines[at];
    if (line.trim() === "") {
      at += 1;
      continue;
    }
    const reader = readers.find(([starts]) => starts(lines, at));
    const [node, next] = depth < DEEPEST && reader ? reader[1](lines, at, depth) : paragraph(lines, at);
    nodes.push(node);
    at = next;
  }
  return nodes;
}

const isTable = (lines, at) => lines[at].includes("|") && at + 1 < lines.length && lines[at + 1].includes("|") && TABLE_RULE.test(lines[at + 1]);

const readers = [
  [(lines, at) => FENCE.test(lines[at]), fence],
  [(lines, at) => HEADING.test(lines[at]), heading],
  [(lines, at) => RULE.test(lines[at]), (lines, at) => [element("hr"), at + 1]],
  [(lines, at) => QUOTE.test(lines[at]), quote],
  [(lines, at) => ITEM.test(lines[at]), list],
  [isTable, table],
];

function paragraph(lines, at) {
  let end = at + 1;
  while (end < lines.length && lines[end].trim() !== "" && !readers.some(([starts]) => starts(lines, end))) end += 1;
  return [element("p", {}, ...inline(lines.slice(at, end).join("\n"))), end];
}

function fence(lines, at) {
  const [, marks, language] = FENCE.exec(lines[at]);
  let end = at + 1;
  const closes = (line) => line.trim().length >= marks.length && line.trim() === marks[0].repeat(line.trim().length);
  while (end < lines.length && !closes(lines[end])) end += 1;
  const code = lines.slice(at + 1, end).join("\n");
  const copy = element("button", { class: "copy", type: "button", "aria-label": "Copy the code" }, "Copy");
  copy.addEventListener("click", () => navigator.clipboard?.writeText(code).then(() => { copy.textContent = "Copied"; }));
  const head = element("div", { class: "code-head" }, element("span", {}, language.slice(0, 24) || "code"), copy);
  return [element("div", { class: "code" }, head, element("pre", { tabindex: 0 }, element("code", {}, code))), end + 1];
}

function heading(lines, at) {
  const [, marks, text] = HEADING.exec(lines[at]);
  // The page has its own h1 and h2.
  const closed = text.trimEnd();
  const words = closed.endsWith("#") ? closed.slice(0, closed.lastIndexOf(" ") + 1) : closed;
  const bare = words !== closed && /^#+$/.test(closed.slice(words.length)) ? words.trimEnd() : closed;
  return [element(`h${Math.min(6, marks.length + 2)}`, {}, ...inline(bare)), at + 1];
}

function quote(lines, at, depth) {
  let end = at;
  while (end < lines.length && QUOTE.test(lines[end])) end += 1;
  const inner = lines.slice(at, end).map((line) => line.replace(QUOTE, ""));
  return [element("blockquote", {}, ...blocks(inner, depth + 1)), end];
}

function list(lines, at, depth) {
  const ordered = /\d/.test(ITEM.exec(lines[at])[2]);
  const indent = ITEM.exec(lines[at])[1].length;
  const first = ordered ? Number.parseInt(ITEM.exec(lines[at])[2], 10) : 1;
  const items = [];
  let end = at;
  while (end < lines.length) {
    const item = ITEM.exec(lines[end]);
    if (!item || item[1].length < indent || item[1].length > indent + 1 || /\d/.test(item[2]) !== ordered) break;
    const content = [item[3]];
    const width = lines[end].length - item[3].length;
    end += 1;
    // What is indented under the item belongs to it; so does a line that simply goes on.
    while (end < lines.length) {
      const line = lines[end];
      const deep = line.length - line.trimStart().length;
      if (line.trim() === "" ? !continues(lines, end, indent) : deep <= indent && (ITEM.test(line) || lines[end - 1].trim() === "" || startsBlock(lines, end))) break;
      content.push(line.slice(Math.min(deep, width)));
      end += 1;
    }
    items.push(element("li", {}, ...tight(blocks(content, depth + 1))));
    while (end < lines.length && lines[end].trim() === "" && ITEM.test(lines[end + 1] ?? "")) end += 1;
  }
  const tag = ordered ? "ol" : "ul";
  return [element(tag, { start: ordered && first !== 1 ? first : null }, ...items), end];
}

function startsBlock(lines, at) {
  return FENCE.test(lines[at]) || HEADING.test(lines[at]) || QUOTE.test(lines[at]) || RULE.test(lines[at]);
}

/** Whether after the blank line at `at` the item goes on. */
function continues(lines, at, indent) {
  const next = lines[at + 1];
  return next !== undefined && next.trim() !== "" && next.length - next.trimStart().length > indent;
}

/** An item of one paragraph needs no paragraph element. */
function tight(nodes) {
  return nodes.flatMap((node, i) => (i === 0 && node.tagName === "P" ? [...node.childNodes] : [node]));
}

function cells(line) {
  const row = line.trim().replace(/^\|/, "").replace(/(^|[^\\])\|$/, "$1");
  return row.split(/(?<!\\)\|/).slice(0, 64).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function table(lines, at) {
  const head = cells(lines[at]);
  const align = cells(lines[at + 1]).map((c) => (c.endsWith(":") ? (c.startsWith(":") ? "center" : "end") : "start"));
  let end = at + 2;
  while (end < lines.length && lines[end].includes("|") && lines[end].trim() !== "") end += 1;
  const row = (tag, values) =>
    element("tr", {}, ...head.map((_, i) => element(tag, { class: `align-${align[i] ?? "start"}` }, ...inline(values[i] ?? ""))));
  const body = lines.slice(at + 2, end).map((line) => row("td", cells(line)));
  const whole = element("table", {}, element("thead", {}, row("th", head)), element("tbody", {}, ...body));
  return [element("div", { class: "table", tabindex: 0, role: "region", "aria-label": "Table" }, whole), end];
}

// Inline: one pass over the text. Open marks wait on a stack; a mark that never closes turns back into text.

const WORD = /[\p{L}\p{N}]/u;
const TAGS = { "*": "em", _: "em", "**": "strong", __: "strong", "~~": "del" };

function inline(text) {
  const ticks = tickRuns(text);
  const stack = [{ mark: null, nodes: [] }];
  let plain = "";
  let at = 0;
  const top = () => stack[stack.length - 1];
  const flush = () => {
    if (plain) top().nodes.push(plain);
    plain = "";
  };
  while (at < text.length) {
    const c = text[at];
    if (c === "\\" && /[!-/:-@[-`{-~]/.test(text[at + 1] ?? "")) {
      plain += text[at + 1];
      at += 2;
    } else if (c === "`") {
      const [node, next] = codeSpan(text, at, ticks);
      flush();
      top().nodes.push(node);
      at = next;
    } else if (c === "\n") {
      flush();
      top().nodes.push(element("br"));
      at += 1;
    } else if (c === "[" && stack.length < DEEPEST) {
      flush();
      stack.push({ mark: "[", nodes: [] });
      at += 1;
    } else if (c === "]" && stack.some((open) => open.mark === "[")) {
      flush();
      at = closeLink(text, at, stack);
    } else if (c === "*" || c === "_" || (c === "~" && text[at + 1] === "~")) {
      // Of three marks in a row the inner emphasis closes first.
      const three = text.startsWith(c.repeat(3), at) && top().mark === c;
      const mark = text[at + 1] === c && !three ? c + c : c;
      flush();
      plain += emphasis(text, at, mark, stack);
      at += mark.length;
    } else if (c === "h" && /^https?:\/\/[^\s<>"'`]/.test(text.slice(at, at + 12)) && !WORD.test(text[at - 1] ?? "")) {
      const url = bareAddress(text.slice(at, at + LONGEST_LINK));
      flush();
      top().nodes.push(link(url, [url]));
      at += url.length;
    } else {
      plain += c;
      at += 1;
    }
  }
  flush();
  while (stack.length > 1) unwind(stack);
  return stack[0].nodes;
}

/** The web address at the start of the text, without the punctuation of the sentence around it. */
function bareAddress(text) {
  const whole = /^[^\s<>"'`]+/.exec(text)[0];
  let end = whole.length;
  while (end > 8 && ".,;:!?)]*_".includes(whole[end - 1])) end -= 1;
  return whole.slice(0, end);
}

/** Where the runs of backticks of each length stand. */
function tickRuns(text) {
  const runs = new Map();
  for (const match of text.matchAll(/`+/g)) {
    if (!runs.has(match[0].length)) runs.set(match[0].length, []);
    runs.get(match[0].length).push(match.index);
  }
  return runs;
}

function codeSpan(text, at, runs) {
  let length = 1;
  while (text[at + length] === "`") length += 1;
  const places = runs.get(length) ?? [];
  while (places.length && places[0] <= at) places.shift();
  if (!places.length) return [text.slice(at, at + length), at + length];
  const inner = text.slice(at + length, places[0]);
  const padded = inner.startsWith(" ") && inner.endsWith(" ") && inner.trim() !== "";
  return [element("code", {}, padded ? inner.slice(1, -1) : inner), places[0] + length];
}

/** Opens or closes emphasis; returns the text that stays where the mark is neither. */
function emphasis(text, at, mark, stack) {
  const before = text[at - 1] ?? " ";
  const after = text[at + mark.length] ?? " ";
  const inWord = mark[0] === "_" && WORD.test(before) && WORD.test(after);
  const place = stack.findLastIndex((open) => open.mark === mark);
  if (place > 0 && !/\s/.test(before) && !inWord) {
    while (stack.length - 1 > place) unwind(stack);
    const { nodes } = stack.pop();
    stack[stack.length - 1].nodes.push(element(TAGS[mark], {}, ...nodes));
    return "";
  }
  if (!/\s/.test(after) && !inWord && stack.length < DEEPEST) {
    stack.push({ mark, nodes: [] });
    return "";
  }
  return mark;
}

/** The innermost open mark becomes text again. */
function unwind(stack) {
  const { mark, nodes } = stack.pop();
  stack[stack.length - 1].nodes.push(mark, ...nodes);
}

function closeLink(text, at, stack) {
  const place = stack.findLastIndex((open) => open.mark === "[");
  while (stack.length - 1 > place) unwind(stack);
  const target = text[at + 1] === "(" ? /^\(\s*<?([^\s()<>]*(?:\([^\s()<>]*\)[^\s()<>]*)*)>?[^()\n]{0,200}\)/.exec(text.slice(at + 1, at + 1 + LONGEST_LINK)) : null;
  if (!target) {
    unwind(stack);
    stack[stack.length - 1].nodes.push("]");
    return at + 1;
  }
  const { nodes } = stack.pop();
  stack[stack.length - 1].nodes.push(link(target[1], nodes));
  return at + 1 + target[0].length;
}

/** A link for web and mail addresses; the address beside the text for anything else (javascript:, data:, ...). */
function link(address, nodes) {
  if (!/^(https?:\/\/|mailto:)/i.test(address)) return element("span", {}, ...nodes, ` (${address})`);
  return element("a", { href: address, target: "_blank", rel: "noopener noreferrer nofollow" }, ...nodes);
}

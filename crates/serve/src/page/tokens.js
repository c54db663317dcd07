// Tokens that can be opened: the strip of a text's tokens, and what one token's routing looks like.

import { css, ink, scale } from "./charts.js";
import { element, shape, visible } from "./dom.js";

/** How sure the routers were of a token: the strongest expert's share, mean over layers, from even (0) to alone (1). */
export function certainty(token) {
  const shares = token.layers.filter((layer) => layer.weights.length > 0).map((layer) => {
    const total = layer.weights.reduce((sum, weight) => sum + Math.abs(weight), 0) || 1;
    const even = 1 / layer.weights.length;
    const strongest = Math.max(...layer.weights.map(Math.abs)) / total;
    return even < 1 ? (strongest - even) / (1 - even) : 1;
  });
  return shares.length ? shares.reduce((sum, share) => sum + share, 0) / shares.length : null;
}

/** The weight that a token gave to one expert of one layer, as a share of its strongest; null where it did not go there. */
export function shareOf(token, layer, expert) {
  const found = token.layers.find((entry) => entry.layer === layer);
  const slot = found ? found.experts.indexOf(expert) : -1;
  return slot < 0 ? null : found.weights[slot] / (Math.max(...found.weights) || 1);
}

/** A list of tokens with one stop for the Tab key: arrows walk it, focus selects. */
export class TokenStrip {
  constructor(label, onSelect) {
    this.tokens = [];
    this.onSelect = onSelect;
    this.current = 0;
    this.tint = () => null;
    this.node = element("div", {
      class: "tokens", role: "listbox", "aria-label": label,
      onclick: (event) => this.chosen(event.target), onkeydown: (event) => this.key(event),
    });
  }

  append(tokens) {
    for (const token of tokens) {
      const shown = token.text.replaceAll("\n", "↵\n");
      const item = element("span", { role: "option", "aria-selected": "false", tabindex: this.tokens.length === 0 ? 0 : -1, class: "token" }, shown === "" ? "∅" : shown);
      item.setAttribute("aria-label", `${visible(token.text)}, position ${token.position}`);
      this.tokens.push(token);
      this.node.append(item);
      this.paint(item, token);
    }
  }

  /** Colours every token by `tint(token)`: a share 0..1, or null for none. */
  colour(tint) {
    this.tint = tint;
    this.tokens.forEach((token, i) => this.paint(this.node.children[i], token));
  }

  paint(item, token) {
    const share = this.tint(token);
    item.style.backgroundColor = share === null ? "" : css(scale(share));
    item.style.color = share === null ? "" : ink(share);
  }

  chosen(item) {
    const index = [...this.node.children].indexOf(item);
    if (index >= 0) this.select(index);
  }

  select(index) {
    const item = this.node.children[index];
    this.node.children[this.current]?.setAttribute("tabindex", "-1");
    this.current = index;
    item.setAttribute("tabindex", "0");
    item.focus();
    this.onSelect(this.tokens[index], item);
  }

  key(event) {
    const last = this.tokens.length - 1;
    const steps = { ArrowLeft: this.current - 1, ArrowRight: this.current + 1, Home: 0, End: last, ArrowUp: this.line(-1), ArrowDown: this.line(1) };
    if (!(event.key in steps)) {
      if (event.key !== "Enter" && event.key !== " ") return;
      this.select(this.current);
    } else {
      this.select(Math.max(0, Math.min(last, steps[event.key])));
    }
    event.preventDefault();
  }

  /** The token above (-1) or below (1) the current one. */
  line(direction) {
    const items = this.node.children;
    const here = items[this.current].getBoundingClientRect();
    let index = this.current + direction;
    while (items[index]) {
      const there = items[index].getBoundingClientRect();
      const otherLine = direction > 0 ? there.top > here.top + 4 : there.top < here.top - 4;
      if (otherLine && (direction > 0 ? there.right >= here.left + 1 : there.left <= here.right - 1)) return index;
      index += direction;
    }
    return this.current;
  }
}

/** One token's way through the layers, as the nodes of the Token panel. */
export function tokenCard(token, model, choice) {
  const facts = element("p", { class: "facts" }, `${token.in_prompt ? "Prompt" : "Answer"} · position ${token.position} · id ${token.token}`);
  const head = [element("h2", { class: "token-title" }, element("q", {}, visible(token.text))), facts];
  if (token.layers.length === 0) return [...head, element("p", { class: "note" }, model?.n_experts ? "No router of this model saw this token." : dense)];
  const rows = token.layers.map((layer) => layerRow(layer, model?.n_experts ?? Math.max(...layer.experts) + 1));
  const sure = certainty(token);
  const body = element("tbody", {}, ...rows);
  const table = element("table", { class: "route" },
    element("caption", { class: "unseen" }, "Experts and weights by layer"),
    element("thead", {}, element("tr", {}, ...["Layer", "Experts and their weights"].map((name) => element("th", { scope: "col" }, name)))), body);
  const note = sure === null ? null : element("p", { class: "facts" }, `Router certainty ${(100 * sure).toFixed(0)} %: 0 is an even split, 100 is one expert alone.`);
  return [...head, note, choice, table];
}

export const dense = "This model is dense: every token goes through all of the feed-forward weights, so there is no routing to show.";

function layerRow({ layer, experts, weights }, n_experts) {
  const strip = shape("svg", { class: "route-strip", viewBox: `0 0 ${n_experts} 1`, preserveAspectRatio: "none", "aria-hidden": "true" });
  const thick = Math.max(1, n_experts / 50);
  const strongest = Math.max(...weights) || 1;
  const order = experts.map((_, slot) => slot).sort((a, b) => weights[b] - weights[a]);
  // Height and colour both say the weight, so that colour alone is never needed.
  for (const slot of [...order].reverse()) {
    const x = Math.min(n_experts - thick, Math.max(0, experts[slot] + 0.5 - thick / 2));
    const height = Math.max(0.14, weights[slot] / strongest);
    strip.append(shape("rect", { x, y: 1 - height, width: thick, height, fill: css(scale(weights[slot] / strongest)) }));
  }
  const chips = order.map((slot) => {
    const swatch = element("i", { "aria-hidden": "true" });
    swatch.style.backgroundColor = css(scale(weights[slot] / strongest));
    return element("span", { class: "chip" }, swatch, element("b", {}, String(experts[slot])), ` ${weights[slot].toFixed(2)}`);
  });
  const cell = element("td", {}, element("div", { class: "route-cell" }, strip, element("div", { class: "chips" }, ...chips)));
  return element("tr", { class: experts.length > 2 ? "many" : null }, element("th", { scope: "row" }, String(layer)), cell);
}

// System prompt, sampling, API key: a form whose empty fields leave the choice to the server.

import { useKey } from "./api.js";
import { element, remember, remembered } from "./dom.js";

// name, label, lowest, highest, step, explanation
const NUMBERS = [
  ["temperature", "Temperature", 0, 2, 0.05, "0 always takes the likeliest token"],
  ["top_p", "Top p", 0.01, 1, 0.01, "keeps the likeliest tokens up to this share"],
  ["top_k", "Top k", 1, 1000, 1, "keeps this many tokens"],
  ["min_p", "Min p", 0, 1, 0.01, "drops tokens below this share of the likeliest"],
  ["repetition_penalty", "Repetition penalty", 0.5, 2, 0.01, "above 1 avoids what was already said"],
  ["max_tokens", "Longest answer", 1, 1000000, 1, "in tokens"],
  ["seed", "Seed", 0, 4294967295, 1, "the same seed gives the same answer"],
];

export class Settings {
  constructor(panel) {
    this.values = remembered("settings", {});
    if (typeof this.values !== "object" || this.values === null) this.values = {};
    const system = element("textarea", { id: "system", rows: 5, placeholder: "How the model should behave" });
    system.value = this.values.system ?? "";
    system.addEventListener("input", () => this.keep("system", system.value));
    const key = element("input", { id: "key", type: "password", autocomplete: "off", placeholder: "only where the server asks for one" });
    key.addEventListener("input", () => useKey(key.value));
    panel.append(
      element("h2", {}, "Settings"),
      field("system", "System prompt", system),
      element("h3", {}, "Sampling"),
      element("p", { class: "note" }, "An empty field leaves the choice to the server."),
      element("div", { class: "numbers" }, ...NUMBERS.map((row) => this.number(row))),
      element("h3", {}, "Access"),
      field("key", "API key", key, "kept until this page is closed"));
  }

  number([name, label, min, max, step, words]) {
    const input = element("input", { id: `set-${name}`, type: "number", min, max, step, inputmode: "decimal", "aria-describedby": `about-${name}` });
    input.value = this.values[name] ?? "";
    input.addEventListener("input", () => this.keep(name, input.value));
    return field(`set-${name}`, label, input, words, `about-${name}`);
  }

  keep(name, value) {
    this.values[name] = value;
    remember("settings", this.values);
  }

  system() {
    return (this.values.system ?? "").trim();
  }

  /** The request's fields for what is filled in. */
  sampling() {
    const filled = NUMBERS.map(([name]) => [name, Number.parseFloat(this.values[name])]).filter(([, value]) => Number.isFinite(value));
    return Object.fromEntries(filled);
  }
}

function field(id, label, input, words, about) {
  return element("div", { class: "setting" }, element("label", { for: id }, label), input, words ? element("small", { id: about ?? null }, words) : null);
}

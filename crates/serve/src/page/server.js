// What the server says of itself: model card, load by expert, cache and throughput over time.

import { HeatMap, barList, legend, timeline } from "./charts.js";
import { bytes, duration, element, short } from "./dom.js";
import { dense } from "./tokens.js";

const REMEMBERED_POLLS = 120;
const RECENT_POLLS = 30;

/** Samples of /v1/moebius/stats, newest last. */
export class History {
  constructor() {
    this.samples = [];
  }

  push(stats) {
    // A smaller total means that the server was started again.
    if (this.samples.length && stats.uptime_s < this.samples.at(-1).uptime_s) this.samples = [];
    this.samples.push(stats);
    if (this.samples.length > REMEMBERED_POLLS) this.samples.shift();
  }

  latest() {
    return this.samples.at(-1);
  }

  /** Counts by layer and expert: since the start, or of the last half minute. */
  load(recent) {
    const now = this.latest()?.expert_load ?? [];
    if (!recent) return now;
    const before = this.samples[Math.max(0, this.samples.length - 1 - RECENT_POLLS)]?.expert_load ?? [];
    return now.map((row, layer) => row.map((count, expert) => count - (before[layer]?.[expert] ?? 0)));
  }
}

/** MaxVio of one layer: how far the busiest expert stands above an even share (0 is perfect balance). */
export function maxViolation(row) {
  const total = row.reduce((sum, count) => sum + count, 0);
  return total > 0 ? (Math.max(...row) * row.length) / total - 1 : 0;
}

/** The counts of a list of routed tokens, rows in the order of the model's MoE layers. */
export function countTokens(tokens, model) {
  const rows = model.moe_layers.map(() => new Array(model.n_experts).fill(0));
  const place = new Map(model.moe_layers.map((layer, i) => [layer, i]));
  for (const { layers } of tokens) for (const { layer, experts } of layers) for (const expert of experts) if (place.has(layer)) rows[place.get(layer)][expert] += 1;
  return rows;
}

/** The panel with the heat map; `choose(layer, expert)` colours the conversation, `load(source)` gives the counts. */
export class ExpertsPanel {
  constructor(panel, { load, choose }) {
    this.load = load;
    this.source = "total";
    this.map = new HeatMap({
      label: "Load by layer and expert. Arrow keys move, Enter colours the conversation's tokens by this expert.",
      describe: (row, column) => this.words(row, column),
      choose: (row, column) => choose(this.model.moe_layers[row], column),
    });
    const option = ([value, label]) => element("label", {}, element("input", { type: "radio", name: "source", value, checked: value === this.source, onchange: () => { this.source = value; this.update(); } }), element("span", {}, label));
    const choice = element("fieldset", { class: "segments" }, element("legend", { class: "unseen" }, "Whose tokens are counted"), ...[["total", "Since start"], ["recent", "Last 30 s"], ["conversation", "This chat"]].map(option));
    this.legend = element("div");
    this.empty = element("p", { class: "note" });
    this.bars = element("div");
    this.content = element("div", {}, choice, this.empty, this.map.node, this.legend,
      element("h3", {}, "Balance by layer"),
      element("p", { class: "note" }, "MaxVio: how far the busiest expert stands above an even share. 0 is perfect balance, 1 is twice the even share."),
      this.bars);
    this.note = element("p", { class: "note" }, "Waiting for the server.");
    panel.append(element("h2", {}, "Load by layer and expert"), this.note, this.content);
    this.content.hidden = true;
  }

  setModel(model) {
    this.model = model;
    const sparse = model.n_experts > 0 && model.moe_layers.length > 0;
    this.content.hidden = !sparse;
    this.note.textContent = sparse ? "Rows are layers, columns are experts. Choose a cell to colour the chat's tokens by that expert." : dense;
    this.update();
  }

  update() {
    if (!this.model || this.content.hidden) return;
    this.rows = this.load(this.source).filter((row) => row.length);
    const totals = this.rows.map((row) => row.reduce((sum, count) => sum + count, 0));
    this.shares = this.rows.map((row, i) => row.map((count) => (totals[i] > 0 ? (count * row.length) / totals[i] : 0)));
    const some = totals.some((total) => total > 0);
    this.empty.hidden = some;
    this.empty.textContent = { total: "No token has been routed yet.", recent: "No token was routed in the last 30 seconds.", conversation: "This chat has no routed token yet." }[this.source];
    this.map.node.hidden = this.legend.hidden = !some;
    const top = Math.max(2, Math.ceil(2 * Math.max(...this.shares.flat(), 0)) / 2);
    this.map.draw(this.shares.map((row) => row.map((share) => share / top)), this.model.moe_layers);
    if (top !== this.top) this.legend.replaceChildren(legend("unused", `${top / 2} × even share`, `${top} ×`));
    this.top = top;
    const violations = this.rows.map(maxViolation);
    const widest = Math.max(1, ...violations);
    this.bars.replaceChildren(barList(violations.map((value, i) => [`Layer ${this.model.moe_layers[i] ?? i}`, some ? value : 0, some ? value.toFixed(2) : "–"]), widest));
  }

  words(row, column) {
    const total = this.rows[row].reduce((sum, count) => sum + count, 0);
    const percent = total > 0 ? (100 * this.rows[row][column]) / total : 0;
    return `Layer ${this.model.moe_layers[row]}, expert ${column}: ${percent.toFixed(1)} %, ${this.shares[row][column].toFixed(2)} × the even share`;
  }
}

/** The Server panel's nodes. */
export function serverPanel(history, model) {
  const stats = history.latest();
  if (!stats) return [element("h2", {}, "Server"), element("p", { class: "note" }, "No figures yet.")];
  const { cache } = stats;
  const samples = history.samples;
  const budget = cache.bytes_budget;
  const sparse = (model?.n_experts ?? 0) > 0;
  const mean = (values) => (values.length ? values.reduce((sum, v) => sum + v, 0) / values.length : 0);
  const figure = (name, value) => element("div", { class: "figure" }, element("dt", {}, name), element("dd", {}, value));
  const past = `${Math.round(stats.uptime_s - samples[0].uptime_s)} s ago`;
  return [
    element("h2", {}, "Server"),
    element("dl", { class: "figures" },
      figure("Running", String(stats.running)), figure("Waiting", String(stats.waiting)), figure("Up for", duration(stats.uptime_s)),
      figure("Prompt tokens", short(stats.prompt_tokens_total)), figure("Generated", short(stats.generated_tokens_total)),
      sparse ? figure("Expert bytes a token", bytes(Math.round(stats.expert_bytes_per_token ?? 0))) : null),
    timeline(stats.tokens_per_s, { label: "Generated tokens a second", unit: (v) => `${v < 10 ? v.toFixed(1) : v.toFixed(0)}`, seconds: `${stats.tokens_per_s.length} s ago` }),
    timeline(samples.map((s) => s.cache.bytes_used), { label: "Key and value cache", unit: (v) => bytes(Math.round(v)), top: budget > 0 ? budget : undefined, seconds: past }),
    sparse ? timeline(samples.map((s) => mean(s.max_violation)), { label: "MaxVio, mean of layers", unit: (v) => v.toFixed(2), seconds: past }) : null,
    element("h3", {}, "Prefix cache"),
    element("dl", { class: "figures" }, figure("Hits", short(cache.prefix_hits)), figure("Tokens not computed again", short(cache.prefix_tokens_reused)), figure("In use", budget > 0 ? `${((100 * cache.bytes_used) / budget).toFixed(1)} %` : bytes(cache.bytes_used))),
  ].filter(Boolean);
}

/** The model card's nodes. */
export function modelCard(model) {
  const sparse = model.n_experts > 0 && model.moe_layers.length > 0;
  const { total, active } = model.parameters;
  const rows = [
    ["Family", model.family],
    ["Weights", model.weights],
    ["Layers", sparse && model.moe_layers.length !== model.layers ? `${model.layers}, ${model.moe_layers.length} of them with experts` : String(model.layers)],
    ["Experts", sparse ? `${model.n_experts} a layer, ${model.top_k} for each token` : "none: a dense model"],
    ["Hidden width", model.hidden?.toLocaleString("en")],
    ["Vocabulary", model.vocab?.toLocaleString("en")],
    ["Context", model.context ? `${model.context.toLocaleString("en")} tokens` : null],
    ["Cache a token", model.kv_bytes_per_token ? bytes(model.kv_bytes_per_token) : null],
  ].filter(([, value]) => value);
  const list = element("dl", { class: "card" }, ...rows.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, String(value))]));
  const share = total > 0 ? active / total : 1;
  const bar = barList([["Active", share, `${(100 * share).toFixed(0)} %`]], 1);
  const words = sparse ? `${short(total)} parameters, of which each token uses ${short(active)}.` : `${short(total)} parameters, all of them used by each token.`;
  return [element("h2", {}, model.name), element("p", { class: "lead" }, words), bar, list];
}

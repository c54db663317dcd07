// The page: joins conversation, panels and the server's figures.

import { ServerError, getJson } from "./api.js";
import { Conversation } from "./conversation.js";
import { byId, element, remember, remembered } from "./dom.js";
import { ExpertsPanel, History, countTokens, modelCard, serverPanel } from "./server.js";
import { Settings } from "./settings.js";
import { certainty, dense, tokenCard, shareOf } from "./tokens.js";

const POLL_MS = 1000;
const SLOWEST_POLL_MS = 15000;
const THEMES = ["system", "light", "dark"];
const WIDE = window.matchMedia("(min-width: 62rem)");

const history = new History();
const settings = new Settings(byId("panel-settings"));
let model = null;
let token = null;
let tint = { kind: "none" };

const conversation = new Conversation(settings, {
  select: (chosen) => { token = chosen; showToken(); if (WIDE.matches) openTab("token"); else offerToken(); },
  changed: () => { if (current() === "experts") experts.update(); },
  busy: (busy) => { byId("send").hidden = busy; byId("stop").hidden = !busy; },
});

const experts = new ExpertsPanel(byId("panel-experts"), {
  load: (source) => (source === "conversation" ? countTokens(conversation.routing(), model) : history.load(source === "recent")),
  choose: (layer, expert) => { setTint({ kind: "expert", layer, expert }); conversation.messages.filter((m) => m.routing?.length).forEach((m) => { m.asTokens = true; conversation.show(m); }); },
});

// Tabs (https://www.w3.org/WAI/ARIA/apg/patterns/tabs/)

const tabs = [...document.querySelectorAll('[role="tab"]')];

function current() {
  return document.body.dataset.tab;
}

function openTab(name) {
  document.body.dataset.tab = name;
  for (const tab of tabs) {
    const open = tab.dataset.tab === name;
    tab.setAttribute("aria-selected", String(open));
    tab.tabIndex = open ? 0 : -1;
    if (tab.dataset.tab !== "chat") byId(`panel-${tab.dataset.tab}`).hidden = !open;
  }
  if (name === "experts") experts.update();
  if (name === "server") showServer();
}

for (const tab of tabs) {
  tab.addEventListener("click", () => openTab(tab.dataset.tab));
  tab.addEventListener("keydown", (event) => {
    const seen = tabs.filter((other) => other.offsetParent !== null);
    const place = seen.indexOf(tab);
    const next = { ArrowRight: place + 1, ArrowLeft: place - 1, Home: 0, End: seen.length - 1 }[event.key];
    if (next === undefined) return;
    const other = seen[(next + seen.length) % seen.length];
    openTab(other.dataset.tab);
    other.focus();
    event.preventDefault();
  });
}

function fitTabs() {
  const chat = byId("panel-chat");
  if (WIDE.matches) chat.removeAttribute("role");
  else { chat.setAttribute("role", "tabpanel"); chat.setAttribute("aria-labelledby", "tab-chat"); }
  openTab(WIDE.matches && current() === "chat" ? "token" : current());
}
WIDE.addEventListener("change", fitTabs);

// The token panel

const TINTS = [["none", "Plain"], ["certainty", "Router certainty"], ["expert", "One expert"]];

function setTint(next) {
  tint = next;
  const functions = {
    none: () => null,
    certainty,
    expert: (t) => shareOf(t, tint.layer, tint.expert),
  };
  conversation.colour(functions[tint.kind]);
  showToken();
}

function tintChoice() {
  const option = ([kind, label]) => {
    if (kind === "expert" && tint.kind !== "expert") return null;
    const shown = kind === "expert" ? `Layer ${tint.layer}, expert ${tint.expert}` : label;
    return element("label", {}, element("input", { type: "radio", name: "tint", value: kind, checked: tint.kind === kind, onchange: () => { setTint({ ...tint, kind }); byId("panel-token").querySelector("[name=tint]:checked")?.focus(); } }), element("span", {}, shown));
  };
  const choice = element("fieldset", { class: "segments" }, element("legend", { class: "unseen" }, "Colour of the tokens"), ...TINTS.map(option).filter(Boolean));
  return element("div", {}, element("p", { class: "facts segments-label", "aria-hidden": "true" }, "Colour of the tokens"), choice);
}

function showToken() {
  const sparse = (model?.n_experts ?? 0) > 0;
  const nothing = [element("h2", {}, "Token"), element("p", { class: "note" }, sparse || !model ? "Press “Tokens” under an answer, then choose a token: here stand its experts and their weights, layer by layer." : dense)];
  const choice = sparse ? tintChoice() : null;
  const parts = token ? tokenCard(token, model, choice) : [...nothing, choice];
  byId("panel-token").replaceChildren(...parts.filter(Boolean));
}

/** On a narrow screen the chat stays in sight; the tab shows that there is something new. */
function offerToken() {
  byId("tab-token").classList.add("fresh");
  byId("announcer").textContent = "The Token tab shows this token.";
}
byId("tab-token").addEventListener("click", (event) => event.currentTarget.classList.remove("fresh"));

function showServer() {
  byId("panel-server").replaceChildren(...serverPanel(history, model));
}

// The server's figures

function showStatus(state, words) {
  const status = byId("status");
  if (status.textContent !== words) status.textContent = words;
  status.dataset.state = state;
}

async function poll(wait) {
  let next = POLL_MS;
  if (!document.hidden) {
    try {
      if (!model) await learnModel();
      history.push(await getJson("/v1/moebius/stats"));
      const { running, waiting } = history.latest();
      showStatus("ready", waiting ? `${running} running, ${waiting} waiting` : running ? `${running} running` : "ready");
      if (current() === "experts") experts.update();
      if (current() === "server") showServer();
    } catch (error) {
      showStatus("down", error instanceof ServerError && error.status === 401 ? "needs a key" : "not reachable");
      next = Math.min(SLOWEST_POLL_MS, wait * 2);
    }
  }
  setTimeout(() => poll(next), next);
}

async function learnModel() {
  model = await getJson("/v1/moebius/model");
  conversation.model = model.name;
  conversation.dense = !(model.n_experts > 0);
  byId("model-name").textContent = model.name;
  document.title = `${model.name} · Moebius`;
  byId("panel-model").replaceChildren(...modelCard(model));
  if (model.chat_template === false) {
    document.querySelector('[name="mode"][value="complete"]').checked = true;
    document.querySelector('[name="mode"][value="chat"]').disabled = true;
    byId("mode").title = "This model has no chat template";
  }
  showMode();
  experts.setModel(model);
  showToken();
}

// Composer

const prompt = byId("prompt");

function mode() {
  return document.querySelector('[name="mode"]:checked').value;
}

function showMode() {
  prompt.placeholder = mode() === "chat" ? "Write a message" : "Begin a text; the model writes on";
  if (!conversation.messages.length) conversation.welcome(mode());
}

function send() {
  const text = prompt.value;
  if (text.trim() === "" || conversation.abort) return;
  prompt.value = "";
  fit();
  conversation.ask(mode() === "chat" ? text.trim() : text, mode());
}

function fit() {
  prompt.style.height = "auto";
  prompt.style.height = `${Math.min(prompt.scrollHeight, 240)}px`;
}

byId("mode").addEventListener("change", showMode);
prompt.addEventListener("input", fit);
prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
byId("composer").addEventListener("submit", (event) => { event.preventDefault(); send(); });
byId("stop").addEventListener("click", () => { conversation.stop(); prompt.focus(); });
document.addEventListener("keydown", (event) => { if (event.key === "Escape") conversation.stop(); });
byId("new-chat").addEventListener("click", () => {
  conversation.clear();
  token = null;
  showMode();
  showToken();
  prompt.focus();
});

// Theme

function showTheme(theme) {
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  byId("theme").replaceChildren(element("span", { class: "wide" }, "Theme: "), theme);
  byId("theme").setAttribute("aria-label", `Theme: ${theme}`);
  experts.update();
}

let theme = THEMES.includes(remembered("theme", "system")) ? remembered("theme", "system") : "system";
byId("theme").addEventListener("click", () => {
  theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
  remember("theme", theme);
  showTheme(theme);
});

byId("panel-model").append(element("p", { class: "note" }, "Waiting for the server."));
showTheme(theme);
fitTabs();
showToken();
poll(POLL_MS);

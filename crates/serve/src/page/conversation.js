// The conversation: what was said, how it is shown, and the request that asks for more.

import { postForEvents } from "./api.js";
import { byId, element } from "./dom.js";
import { markdown } from "./markdown.js";
import { TokenStrip } from "./tokens.js";

const EXAMPLES = {
  complete: ["Once upon a time", "The sea was calm and", "The purpose of this chapter is"],
  chat: ["Explain what a mixture of experts is, in three sentences.", "Write a haiku about the sea.", "List five prime numbers and say why each is prime."],
};

export class Conversation {
  /** `events`: select(token), changed() when a message's routing grew, busy(flag). */
  constructor(settings, events) {
    this.settings = settings;
    this.events = events;
    this.messages = [];
    this.tint = () => null;
    this.abort = null;
    this.model = "";
    this.dense = false;
    this.node = byId("messages");
    this.scroller = byId("scroller");
    this.welcome();
  }

  clear() {
    this.stop();
    this.messages = [];
    this.events.changed();
    this.welcome();
  }

  /** What an empty conversation shows: beginnings that fit the mode. */
  welcome(mode = "chat") {
    const offers = EXAMPLES[mode].map((text) => element("button", { class: "offer", type: "button", onclick: () => this.ask(text, mode) }, text));
    this.node.replaceChildren(element("div", { class: "welcome" },
      element("h2", {}, "Ask, then look inside"),
      element("p", {}, this.dense ? "This model has no experts; the tokens of prompt and answer can be opened all the same." : "Every token of prompt and answer can be opened to see which experts it went through."),
      element("div", { class: "offers" }, ...offers)));
  }

  /** All tokens whose routing is known. */
  routing() {
    return this.messages.flatMap((message) => message.routing ?? []);
  }

  /** Colours the tokens of all messages. */
  colour(tint) {
    this.tint = tint;
    for (const { view } of this.messages) view.strips?.forEach((strip) => strip.colour(tint));
  }

  stop() {
    this.abort?.abort();
  }

  /** Sends a text, `mode` "chat" or "complete", and shows the answer as it comes. */
  async ask(text, mode) {
    if (this.abort) return;
    if (this.messages.length === 0) this.node.replaceChildren();
    this.add({ role: "user", content: text, mode });
    const answer = this.add({ role: "assistant", content: mode === "complete" ? text : "", reasoning: "", routing: [], mode });
    this.abort = new AbortController();
    this.events.busy(true);
    const started = performance.now();
    try {
      for await (const chunk of postForEvents(...this.request(text, mode), this.abort.signal)) this.take(answer, chunk, started);
    } catch (error) {
      if (error.name === "AbortError") answer.finish = "stopped";
      else answer.error = error instanceof TypeError ? "The connection to the server broke off." : error.message;
    }
    answer.seconds = (performance.now() - started) / 1000;
    this.abort = null;
    answer.done = true;
    this.show(answer);
    this.events.busy(false);
    byId("announcer").textContent = answer.error ?? `Answer complete: ${answer.content.slice(0, 400)}`;
  }

  request(text, mode) {
    const common = { model: this.model, ...this.settings.sampling(), stream: true, stream_options: { include_usage: true }, routing: true };
    if (mode === "complete") return ["/v1/completions", { ...common, prompt: text }];
    const system = this.settings.system();
    const past = this.messages.filter((m) => m.mode === "chat" && !m.error && (m.role === "user" || m.done));
    const messages = past.map(({ role, content }) => ({ role, content }));
    return ["/v1/chat/completions", { ...common, messages: system ? [{ role: "system", content: system }, ...messages] : messages }];
  }

  take(answer, chunk, started) {
    const choice = chunk.choices?.[0];
    const text = choice?.delta?.content ?? choice?.text ?? "";
    const thought = choice?.delta?.reasoning_content ?? "";
    if ((text || thought) && answer.first === undefined) answer.first = (performance.now() - started) / 1000;
    answer.content += text;
    answer.reasoning += thought;
    if (choice?.finish_reason) answer.finish = choice.finish_reason;
    if (chunk.usage) answer.usage = chunk.usage;
    const tokens = chunk.routing ?? choice?.routing ?? [];
    if (tokens.length) {
      answer.routing.push(...tokens);
      this.events.changed();
    }
    if (!answer.scheduled) {
      answer.scheduled = true;
      requestAnimationFrame(() => { answer.scheduled = false; this.show(answer); });
    }
  }

  add(message) {
    const view = { body: element("div", { class: "body" }), foot: element("footer", {}) };
    view.node = element("article", { class: `message ${message.role}`, "aria-label": message.role === "user" ? "You" : "Answer" }, view.body, view.foot);
    message.view = view;
    this.messages.push(message);
    this.node.append(view.node);
    if (message.role === "user") view.body.append(element("p", { class: "said" }, message.content));
    else this.show(message);
    this.scroller.scrollTop = this.scroller.scrollHeight;
    return message;
  }

  show(message) {
    const nearEnd = this.scroller.scrollHeight - this.scroller.scrollTop - this.scroller.clientHeight < 80;
    const { view } = message;
    view.node.classList.toggle("waiting", !message.done);
    if (message.asTokens) this.showTokens(message);
    else this.showText(message);
    if (message.done) this.showFoot(message);
    if (nearEnd) this.scroller.scrollTop = this.scroller.scrollHeight;
  }

  showText(message) {
    const nodes = [];
    if (message.reasoning) {
      const open = message.view.body.querySelector(".reasoning")?.open ?? !message.content;
      nodes.push(element("details", { class: "reasoning", open }, element("summary", {}, "Reasoning"), ...markdown(message.reasoning)));
    }
    if (message.mode === "complete") nodes.push(element("p", { class: "said" }, message.content));
    else nodes.push(...markdown(message.content));
    if (!message.done) nodes.push(element("span", { class: "cursor", "aria-hidden": "true" }));
    if (message.error) nodes.push(element("p", { class: "error", role: "alert" }, message.error));
    message.view.strips = null;
    message.view.body.replaceChildren(...nodes);
  }

  showTokens(message) {
    const { view } = message;
    if (!view.strips) {
      const select = (token, item) => this.select(token, item);
      view.strips = [new TokenStrip("Tokens of the prompt", select), new TokenStrip("Tokens of the answer", select)];
      view.strips.forEach((strip) => strip.colour(this.tint));
      view.count = element("span", {});
      view.shown = 0;
      view.body.replaceChildren(
        element("details", { class: "prompt-tokens", open: true }, element("summary", {}, "Prompt as the model read it, ", view.count), view.strips[0].node),
        view.strips[1].node);
    }
    const fresh = message.routing.slice(view.shown);
    view.shown = message.routing.length;
    view.strips[0].append(fresh.filter((token) => token.in_prompt));
    view.strips[1].append(fresh.filter((token) => !token.in_prompt));
    view.count.textContent = `${view.strips[0].tokens.length} tokens`;
  }

  select(token, item) {
    this.node.querySelectorAll('[aria-selected="true"]').forEach((other) => other.setAttribute("aria-selected", "false"));
    item.setAttribute("aria-selected", "true");
    this.events.select(token);
  }

  showFoot(message) {
    const facts = [];
    const made = message.usage?.completion_tokens;
    if (made) {
      const during = message.seconds - (message.first ?? 0);
      // A short answer may arrive in one piece: then only its whole time says anything.
      const rate = during > 0.2 ? (made - 1) / during : made / message.seconds;
      facts.push(`${made} tokens`, `${rate.toFixed(1)} tokens/s`);
    }
    if (message.first !== undefined) facts.push(`first after ${message.first.toFixed(2)} s`);
    if (message.finish === "stopped") facts.push("stopped");
    if (message.finish === "length") facts.push("ended at its length limit");
    const copy = element("button", { class: "quiet", type: "button" }, "Copy");
    copy.addEventListener("click", () => navigator.clipboard?.writeText(message.content).then(() => { copy.textContent = "Copied"; }));
    const buttons = [copy];
    if (message.routing.length) {
      buttons.unshift(element("button", {
        class: "quiet toggle", type: "button", "aria-pressed": String(Boolean(message.asTokens)),
        onclick: (event) => {
          message.asTokens = !message.asTokens;
          this.show(message);
          message.view.foot.querySelector(".toggle").focus();
          event.preventDefault();
        },
      }, "Tokens"));
    }
    message.view.foot.replaceChildren(element("span", { class: "facts" }, facts.join(" · ")), ...buttons);
  }
}

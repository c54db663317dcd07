// Judge: the page in real Chromium. Needs Debian's `chromium` and npm's `playwright-core` (in any folder that NODE_PATH
// or a node_modules above this file reaches).
//
//     node bench/server/page.mjs http://127.0.0.1:8080 [FOLDER FOR SCREENSHOTS]

import assert from "node:assert/strict";
import { createRequire } from "node:module";

const require = createRequire(process.env.PLAYWRIGHT_FROM ?? import.meta.url);
const { chromium } = require("playwright-core");
const [base = "http://127.0.0.1:8080", folder] = process.argv.slice(2);
const executablePath = process.env.CHROMIUM ?? "/usr/bin/chromium";

// Text that a model could write to do harm, or that is hard to read.
const HOSTILE = [
  "<script>window.harmed = 1</script>",
  "<img src=x onerror='window.harmed = 1'>",
  "[a](javascript:window.harmed=1) [b](JaVaScRiPt:window.harmed=1) [c](data:text/html,<script>1</script>) [d](vbscript:x)",
  "![i](https://example.org/track.png) <https://example.org> <a href=x onmouseover=1>q</a>",
  "`<b>` ``` <i> ``` **<u>x</u>**",
  "```html\n</code></pre><script>window.harmed = 1</script>\n```",
  "| <script> | b |\n|---|---|\n| <img src=x onerror=1> | [x](javascript:1) |",
  "[x](https://example.org/\"onclick=\"1)",
];
const HARD = ["*".repeat(40000), "[".repeat(40000), "`".repeat(20000) + "a".repeat(20000), "> ".repeat(20000), "- ".repeat(20000), "_a ".repeat(20000), "# " + " ".repeat(40000) + "x", "|".repeat(40000) + "\n" + "|-".repeat(20000), "[a](".repeat(10000), "1. a\n".repeat(4000), "https://" + ".".repeat(40000), "**a ".repeat(10000), "~~".repeat(20000), ("  ".repeat(8) + "- x\n").repeat(2000)];

const checks = [];
const check = (name, run) => checks.push([name, run]);
const browser = await chromium.launch({ executablePath, args: ["--no-sandbox"] });

async function open(options = {}) {
  const context = await browser.newContext({ viewport: { width: 1280, height: 840 }, ...options });
  const page = await context.newPage();
  page.problems = [];
  page.foreign = [];
  page.on("console", (message) => { if (message.type() === "error" || message.type() === "warning") page.problems.push(message.text()); });
  page.on("pageerror", (error) => page.problems.push(error.message));
  page.on("request", (request) => { if (!request.url().startsWith(base) && !request.url().startsWith("data:")) page.foreign.push(request.url()); });
  await page.goto(base);
  await page.waitForSelector('.status[data-state="ready"]');
  return page;
}

/** Asks and waits for the whole answer. */
async function ask(page, text, tokens = "12") {
  if (await page.isVisible("#tab-chat")) await page.click("#tab-chat");
  await page.evaluate((n) => { const field = document.getElementById("set-max_tokens"); field.value = n; field.dispatchEvent(new Event("input")); }, tokens);
  await page.fill("#prompt", text);
  await page.press("#prompt", "Enter");
  await page.waitForSelector(".message.assistant:last-child:not(.waiting) footer button", { timeout: 120000 });
}

async function shot(page, name) {
  if (folder) await page.screenshot({ path: `${folder}/${name}.png` });
}

const model = await (await fetch(`${base}/v1/moebius/model`)).json();
const sparse = model.n_experts > 0;

check("an answer arrives, with its figures", async (page) => {
  await ask(page, "Once upon a time");
  assert.equal(await page.locator(".error").count(), 0, await page.locator(".error").allInnerTexts());
  assert.match(await page.innerText(".message.assistant:last-child .facts"), /tokens/);
  assert.ok((await page.innerText(".message.assistant:last-child .body")).length > 0);
  await shot(page, "answer");
});

check("every token of prompt and answer opens, by mouse and by keyboard", async (page) => {
  await ask(page, "The sea was calm");
  await page.click(".message.assistant:last-child .toggle");
  const groups = await page.locator(".message.assistant:last-child .tokens").all();
  assert.equal(groups.length, 2);
  for (const group of groups) {
    const tokens = await group.locator(".token").all();
    assert.ok(tokens.length > 0, "no tokens");
    for (const token of tokens) {
      await token.click();
      assert.equal(await token.getAttribute("aria-selected"), "true");
      const rows = await page.locator("#panel-token .route tbody tr").count();
      // The last token of an answer is not read by the model any more.
      if (sparse && token !== tokens.at(-1)) assert.equal(rows, model.moe_layers.length);
    }
    await tokens[0].click();
    await page.keyboard.press("End");
    assert.equal(await group.locator(".token").last().getAttribute("aria-selected"), "true");
    await page.keyboard.press("Home");
    await page.keyboard.press("ArrowRight");
    if (tokens.length > 1) assert.equal(await tokens[1].getAttribute("aria-selected"), "true");
  }
  await shot(page, "tokens");
});

check("the heat map is walked by keyboard and colours tokens", async (page) => {
  if (!sparse) return;
  await ask(page, "A long day at the harbour");
  await page.click("#tab-experts");
  await page.getByLabel("This chat").check();
  await page.focus(".heat");
  await page.keyboard.press("ArrowRight");
  assert.match(await page.innerText("#panel-experts .words"), new RegExp(`Layer ${model.moe_layers[0]}, expert 1: `));
  await page.keyboard.press("Enter");
  assert.equal(await page.locator(".message.assistant:last-child .tokens").count(), 2);
  await page.click("#tab-token");
  assert.ok(await page.locator("#panel-token").getByText(`Layer ${model.moe_layers[0]}, expert 1`, { exact: true }).isVisible());
  await shot(page, "heat");
});

check("panels say what the server says", async (page) => {
  await page.click("#tab-model");
  assert.ok((await page.innerText("#panel-model")).includes(model.name));
  await page.click("#tab-server");
  assert.match(await page.innerText("#panel-server"), /Generated tokens a second[\s\S]*cache/i);
  await page.click("#tab-experts");
  const text = await page.innerText("#panel-experts");
  assert.match(text, sparse ? /MaxVio/ : /dense/);
  if (!sparse) assert.equal(await page.isVisible(".heat"), false);
  await shot(page, "server");
});

check("stop ends an answer, and the server hears of it", async (page) => {
  await page.fill("#set-max_tokens", "").catch(() => {});
  await page.evaluate(() => { const field = document.getElementById("set-max_tokens"); field.value = "2000"; field.dispatchEvent(new Event("input")); });
  // An answer whose end is out of the model's hands: a stream that the test holds open.
  await page.route("**/completions", (route) => route.fulfill({ status: 200, contentType: "text/event-stream", body: 'data: {"choices":[{"index":0,"delta":{"content":"half"},"text":"half"}]}\n\n' }));
  await ask(page, "x");
  await page.unroute("**/completions");
  await page.evaluate(() => {
    window.aborted = false;
    window.fetchBefore = window.fetch;
    window.fetch = (path, options) => String(path).includes("completions")
      ? new Promise((_, refuse) => options.signal.addEventListener("abort", () => { window.aborted = true; refuse(new DOMException("", "AbortError")); }))
      : window.fetchBefore(path, options);
  });
  await page.fill("#prompt", "y");
  await page.press("#prompt", "Enter");
  await page.click("#stop");
  await page.waitForSelector(".message.assistant:last-child:not(.waiting)");
  assert.equal(await page.evaluate(() => window.aborted), true);
  assert.match(await page.innerText(".message.assistant:last-child .facts"), /stopped/);
});

check("errors are shown in words", async (page) => {
  await page.route("**/completions", (route) => route.fulfill({ status: 429, headers: { "retry-after": "7" }, contentType: "application/json", body: '{"error":{"message":"full <b>house</b>","type":"x"}}' }));
  await page.fill("#prompt", "x");
  await page.press("#prompt", "Enter");
  await page.waitForSelector(".error");
  assert.equal(await page.innerText(".error"), "full <b>house</b> (try again in 7 s)");
  page.problems = page.problems.filter((text) => !text.includes("429"));
});

check("hostile markdown stays text", async (page) => {
  const made = await page.evaluate(async (texts) => {
    const { markdown } = await import("/assets/markdown.js");
    const room = document.createElement("div");
    document.body.append(room);
    for (const text of texts) room.append(...markdown(text));
    room.querySelectorAll("a").forEach((a) => a.dispatchEvent(new MouseEvent("mouseover")));
    const allowed = new Set("P,A,CODE,PRE,DIV,SPAN,BUTTON,TABLE,THEAD,TBODY,TR,TH,TD,STRONG,EM,BR,UL,OL,LI,DEL,H3,H4,H5,H6,HR,BLOCKQUOTE".split(","));
    const all = [...room.querySelectorAll("*")];
    return {
      strange: all.filter((node) => !allowed.has(node.tagName)).map((node) => node.tagName),
      handlers: all.flatMap((node) => [...node.attributes]).filter((a) => a.name.startsWith("on") || a.name === "style").map((a) => a.name),
      links: [...room.querySelectorAll("a")].map((a) => a.protocol),
      harmed: window.harmed,
      text: room.textContent,
    };
  }, HOSTILE);
  assert.deepEqual([made.strange, made.handlers, made.harmed], [[], [], undefined]);
  assert.ok(made.links.length > 0 && made.links.every((protocol) => protocol === "https:"), made.links);
  assert.ok(made.text.includes("<script>window.harmed = 1</script>"));
});

check("markdown that is hard to read takes no time", async (page) => {
  const slow = await page.evaluate(async (texts) => {
    const { markdown } = await import("/assets/markdown.js");
    return texts.map((text) => { const begun = performance.now(); markdown(text); return [text.slice(0, 12), performance.now() - begun]; }).filter(([, time]) => time > 1500);
  }, HARD);
  assert.deepEqual(slow, []);
});

check("markdown means what it says", async (page) => {
  const cases = [
    ["**a** *b* ~~c~~ `d`", "<p><strong>a</strong> <em>b</em> <del>c</del> <code>d</code></p>"],
    ["***both***", "<p><strong><em>both</em></strong></p>"],
    ["2 * 3 * 4 snake_case_name", "<p>2 * 3 * 4 snake_case_name</p>"],
    ["## T ##\ntext", "<h4>T</h4><p>text</p>"],
    ["- a\n  - b\n- c", "<ul><li>a<ul><li>b</li></ul></li><li>c</li></ul>"],
    ["3. x\n4. y", '<ol start="3"><li>x</li><li>y</li></ol>'],
    ["> a\n> b", "<blockquote><p>a<br>b</p></blockquote>"],
    ["open **never", "<p>open **never</p>"],
    ["a \\*b\\*", "<p>a *b*</p>"],
    ["see https://example.org/x.", '<p>see <a href="https://example.org/x" target="_blank" rel="noopener noreferrer nofollow">https://example.org/x</a>.</p>'],
  ];
  const made = await page.evaluate(async (texts) => {
    const { markdown } = await import("/assets/markdown.js");
    return texts.map((text) => { const room = document.createElement("div"); room.append(...markdown(text)); return room.innerHTML; });
  }, cases.map(([text]) => text));
  cases.forEach(([text, wanted], i) => assert.equal(made[i], wanted, text));
});

check("themes and widths: nothing runs over, names for all controls", async () => {
  for (const colorScheme of ["light", "dark"]) {
    for (const viewport of [{ width: 1280, height: 840 }, { width: 390, height: 844 }, { width: 320, height: 640 }]) {
      const page = await open({ colorScheme, viewport });
      await ask(page, "The wind");
      for (const tab of ["token", "experts", "server", "model", "settings"]) {
        await page.click(`#tab-${tab}`);
        const over = await page.evaluate(() => document.documentElement.scrollWidth - window.innerWidth);
        assert.ok(over <= 0, `${tab} runs ${over} pixels over at ${viewport.width}`);
        await shot(page, `${colorScheme}-${viewport.width}-${tab}`);
      }
      const unnamed = await page.evaluate(() => [...document.querySelectorAll("button, input, textarea, [role=tab]")].filter((node) => !(node.innerText || node.ariaLabel || node.labels?.length)).map((node) => node.outerHTML));
      assert.deepEqual(unnamed, []);
      await page.context().close();
    }
  }
});

check("text has contrast enough in both themes", async () => {
  for (const colorScheme of ["light", "dark"]) {
    const page = await open({ colorScheme });
    const ratio = await page.evaluate(() => {
      const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
      const light = (colour) => {
        canvas.fillStyle = colour;
        canvas.fillRect(0, 0, 1, 1);
        const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((v) => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
      };
      const paper = light(getComputedStyle(document.body).backgroundColor);
      return [...document.querySelectorAll("p, button, h2, span, label")].filter((n) => n.offsetParent && n.innerText && getComputedStyle(n).backgroundColor === "rgba(0, 0, 0, 0)" && !n.closest(".primary, .segments")).map((n) => {
        const ink = light(getComputedStyle(n).color);
        return [(Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05), n.innerText];
      }).filter(([r]) => r < 4.5);
    });
    assert.deepEqual(ratio, [], colorScheme);
    await page.context().close();
  }
});

check("the switch of themes, and tabs by arrow keys", async (page) => {
  const paper = () => page.evaluate(() => getComputedStyle(document.body).backgroundColor);
  const before = await paper();
  await page.click("#theme");
  await page.click("#theme");
  assert.notEqual(await paper(), before);
  await page.reload();
  assert.equal(await page.getAttribute("html", "data-theme"), "dark");
  await page.focus("#tab-token");
  await page.keyboard.press("ArrowRight");
  assert.equal(await page.getAttribute("#tab-experts", "aria-selected"), "true");
  await page.keyboard.press("End");
  assert.equal(await page.isVisible("#panel-settings"), true);
});

let failed = 0;
for (const [name, run] of checks) {
  const page = await open();
  try {
    await run(page);
    assert.deepEqual(page.foreign, [], "a request to another host");
    assert.deepEqual(page.problems.filter((text) => !text.includes("favicon")), [], "the browser complains");
    console.log(`  ok  ${name}`);
  } catch (error) {
    failed += 1;
    console.log(`FAIL  ${name}\n${error.stack}`);
  }
  await page.context().close();
}
await browser.close();
console.log(`${checks.length - failed} ok, ${failed} failed`);
process.exit(failed ? 1 : 0);

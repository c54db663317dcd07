// Talking to the server that this page came from, and to no other.

let key = "";

/** The API key that requests carry; it is kept for this visit only. */
export function useKey(value) {
  key = value.trim();
}

/** An answer that is no success, with the server's own words where it gave some. */
export class ServerError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

function headers(more = {}) {
  return key ? { ...more, authorization: `Bearer ${key}` } : more;
}

async function refuse(response) {
  let message = `the server answered ${response.status}`;
  try {
    const body = await response.json();
    if (body?.error?.message) message = String(body.error.message);
  } catch {
    // No JSON in it: the status says enough.
  }
  if (response.status === 401) message += " (an API key can be given under Settings)";
  const wait = response.headers.get("retry-after");
  if (response.status === 429 && wait) message += ` (try again in ${wait} s)`;
  throw new ServerError(message, response.status);
}

/** GET of a JSON document. */
export async function getJson(path, signal) {
  const response = await fetch(path, { headers: headers(), signal, cache: "no-store" });
  if (!response.ok) await refuse(response);
  return response.json();
}

/** POST whose answer is a stream of server-sent events: yields each event's JSON until `[DONE]` or the stream's end. */
export async function* postForEvents(path, body, signal) {
  const response = await fetch(path, {
    method: "POST",
    headers: headers({ "content-type": "application/json", accept: "text/event-stream" }),
    body: JSON.stringify(body),
    signal,
  });
  if (!response.ok) await refuse(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    held += done ? "\n\n" : value;
    const events = held.split(/\r?\n\r?\n/);
    held = events.pop();
    for (const event of events) {
      const data = dataOf(event);
      if (data === "[DONE]") return;
      if (data === "") continue;
      const json = JSON.parse(data);
      if (json.error) throw new ServerError(String(json.error.message ?? "the server broke off"), 500);
      yield json;
    }
    if (done) return;
  }
}

/** The joined `data:` lines of one event (https://html.spec.whatwg.org/multipage/server-sent-events.html). */
function dataOf(event) {
  const lines = event.split(/\r?\n/).filter((line) => line.startsWith("data:"));
  return lines.map((line) => line.slice(line.startsWith("data: ") ? 6 : 5)).join("\n");
}

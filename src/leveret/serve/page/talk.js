// The server's API as the page uses it: models, a streamed answer, a look inside; every fault with a kind of its own.

const TOKEN = "leveret.token";
// Relative, so that the page works below any prefix.
const address = (path) => new URL(path, document.baseURI);

export const token = () => { try { return sessionStorage.getItem(TOKEN) ?? ""; } catch { return ""; } };
export function setToken(text) {
  try {
    if (text) sessionStorage.setItem(TOKEN, text);
    else sessionStorage.removeItem(TOKEN);
  } catch { /* a browser that keeps nothing asks again */ }
}

// kind: "away" (nothing answers), "lost" (it stopped in mid-answer), "busy" (429), "token" (401), "closing" (the
// server ends), "refused" (the request will not do), "server" (its fault). retry: seconds, where the server told.
export class Fault extends Error {
  constructor(kind, message, parts = {}) {
    super(message);
    Object.assign(this, { kind, status: 0, retry: null, param: null }, parts);
  }
}

const headers = () => {
  const made = { "Content-Type": "application/json" };
  if (token()) made.Authorization = `Bearer ${token()}`;
  return made;
};

async function refusal(response) {
  let told = null;
  try { told = (await response.json()).error; } catch { /* not JSON: its status has to do */ }
  const words = typeof told?.message === "string" ? told.message : `The server answered ${response.status}.`;
  const wait = response.headers.get("Retry-After");
  const seconds = wait === null ? NaN : Number.isFinite(Number(wait)) ? Number(wait) : (Date.parse(wait) - Date.now()) / 1000;
  const kind = response.status === 429 ? "busy"
    : response.status === 401 ? "token"
    : told?.code === "server_shutdown" ? "closing"
    : response.status >= 500 ? "server" : "refused";
  const retry = Number.isFinite(seconds) ? Math.min(Math.max(seconds, 1), 600) : null;
  return new Fault(kind, words, { status: response.status, retry, param: told?.param ?? null });
}

async function call(path, options) {
  let response;
  try {
    response = await fetch(address(path), { ...options, headers: headers(), cache: "no-store", redirect: "error" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Fault("away", "The server does not answer.");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

export const models = async (signal) => (await (await call("v1/models", { signal })).json()).data;

export const look = async (body, signal) =>
  (await call("v1/look", { method: "POST", body: JSON.stringify(body), signal })).json();

// Server-sent events out of a body, one `data` at a time.
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      rest += value;
      let from = 0;
      for (let to; (to = rest.indexOf("\n", from)) >= 0; from = to + 1) {
        const line = rest.slice(from, to).replace(/\r$/, "");
        if (line.startsWith("data:")) yield line.slice(5).trimStart();
      }
      rest = rest.slice(from);
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

// What a token may be told by: [text, log probability, [[text, log probability], ...]]. Half a character has no text of
// its own and is shown as its bytes.
const shown = (told) =>
  (told.token.includes("\ufffd") && told.bytes?.length
    ? told.bytes.map((byte) => `\\x${byte.toString(16).padStart(2, "0")}`).join("") : told.token);
const chance = (told) =>
  [shown(told), told.logprob, (told.top_logprobs ?? []).map((other) => [shown(other), other.logprob])];

// Yields {text, told, finish, usage}: whatever of it has come. Ends after [DONE]; whatever else ends it is a Fault.
export async function* answer(body, signal) {
  const response = await call("v1/chat/completions", { method: "POST", body: JSON.stringify(body), signal });
  try {
    for await (const data of events(response.body)) {
      if (data === "[DONE]") return;
      let chunk;
      try { chunk = JSON.parse(data); } catch { throw new Fault("server", "The server sent what is not JSON."); }
      if (chunk.error) {
        const kind = chunk.error.code === "server_shutdown" ? "closing" : "server";
        throw new Fault(kind, String(chunk.error.message ?? "The server gave up."));
      }
      const choice = chunk.choices?.[0];
      yield {
        text: choice?.delta?.content ?? "",
        told: (choice?.logprobs?.content ?? []).map(chance),
        finish: choice?.finish_reason ?? null,
        usage: chunk.usage ?? null,
      };
    }
  } catch (error) {
    if (error instanceof Fault || error.name === "AbortError") throw error;
    throw new Fault("lost", "The connection was lost.");
  }
  throw new Fault("lost", "The connection was lost.");
}

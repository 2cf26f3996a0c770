// An answer while it is being made: asked for, read as it comes, timed, kept; stopped, or failed with its reason.

import { say } from "./dom.js";
import { answer, Fault } from "./talk.js";

const PULSE = 1000; // ms between two drafts in the database: a reload loses no more, and other tabs see that it lives
const TRIES = 6; // of a full server, before the reader has to ask again

export const running = new Map(); // message id -> {message, controller, hurry}

export const isRunning = (conversation) =>
  [...running.values()].some((one) => one.message.conversation === conversation);

export function stop(conversation) {
  for (const one of running.values()) if (one.message.conversation === conversation) one.controller.abort();
}

// Says each sentence once it is finished: single words would drown who listens.
function speaker(isOpen) {
  let told = 0;
  return (text, whole) => {
    const rest = text.slice(told);
    const ends = [...rest.matchAll(/[.!?:;]["')\]]*\s|\n/g)].at(-1);
    const upTo = whole ? rest.length : ends ? ends.index + ends[0].length : 0;
    const words = rest.slice(0, upTo).replace(/[*_`#|]+/g, "").trim();
    told += upTo;
    if (words && isOpen()) say(words);
  };
}

// Waits, told in message.waiting = {until, why}; false where the reader stopped it.
function pause(entry, seconds, why, changed) {
  return new Promise((done, stopped) => {
    const { message, controller } = entry;
    message.waiting = { until: Date.now() + seconds * 1000, why };
    const over = () => {
      clearTimeout(timer);
      clearInterval(beat);
      controller.signal.removeEventListener("abort", left);
      entry.hurry = null;
      message.waiting = null;
      changed();
    };
    const left = () => { over(); stopped(new DOMException("stopped", "AbortError")); };
    const timer = setTimeout(() => { over(); done(); }, seconds * 1000);
    const beat = setInterval(changed, 1000);
    controller.signal.addEventListener("abort", left);
    entry.hurry = () => { over(); done(); };
    changed();
  });
}

// Fills `message` with the answer. `body` makes the request; `changed` hears of every piece, `keep` writes the message
// down, `isOpen` tells whether its conversation is the one on the page.
export async function ask(message, body, { changed, keep, isOpen }) {
  const entry = { message, controller: new AbortController(), hurry: null };
  running.set(message.id, entry);
  const speak = speaker(isOpen);
  const { signal } = entry.controller;
  let began = performance.now();
  let [first, last, pieces, usage] = [0, 0, 0, null];
  const pulse = setInterval(() => { message.beat = Date.now(); keep(message); }, PULSE);

  const read = async (request) => {
    began = performance.now();
    for await (const piece of answer(request, signal)) {
      const now = performance.now();
      usage = piece.usage ?? usage;
      if (piece.finish) message.finish = piece.finish;
      if (!piece.text && !piece.told.length) continue;
      pieces += 1;
      first ||= now;
      last = now;
      message.text += piece.text;
      message.told.push(...piece.told);
      speak(message.text, false);
      changed();
    }
  };

  changed();
  try {
    const request = await body();
    const [first] = request.messages;
    message.asked = { temperature: request.temperature, top_p: request.top_p, seed: request.seed ?? null,
      system: first?.role === "system" ? first.content : "" };
    for (let left = TRIES; ; left -= 1) {
      try {
        await read(request);
        break;
      } catch (error) {
        if (error.kind !== "busy" || message.text || left <= 1) throw error;
        await pause(entry, error.retry ?? 2 ** (TRIES - left), error.message, changed);
      }
    }
    message.state = "done";
  } catch (error) {
    if (error.name === "AbortError") message.state = "stopped";
    else {
      message.state = "failed";
      const { kind = "page", retry = null } = error instanceof Fault ? error : {};
      message.fault = { kind, retry, words: error.message };
      console.debug(error);
    }
  }
  const tokens = usage?.completion_tokens ?? (message.told.length || pieces);
  const spent = last > first ? (last - first) / 1000 : 0;
  message.stats = pieces === 0 ? null : {
    first: (first - began) / 1000,
    tokens,
    rate: tokens > 1 && spent > 0.005 ? (tokens - 1) / spent : null,
    read: usage?.prompt_tokens ?? null,
    reused: usage?.prompt_tokens_details?.cached_tokens ?? null,
  };
  clearInterval(pulse);
  running.delete(message.id);
  speak(message.text, true);
  if (isOpen()) {
    if (message.state === "failed") say(message.fault.words, true);
    else say(message.state === "stopped" ? "Stopped." : "The answer is complete.");
  }
  changed();
  await keep(message);
}

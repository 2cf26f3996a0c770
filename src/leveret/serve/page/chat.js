// The chat page: which conversation is open, what is drawn of it, and who does what.
//
// dom      elements, icons, what is spoken        store      what is kept in this browser
// talk     the server's API                        thread     a conversation as a tree
// asking   an answer while it is made              turns      turns on the page
// composer where a message is written              pictures   pictures made small enough
// album    pictures of what is open                saved      a conversation as a file
// boxes    boxes that an answer names              frame      the list's place, light and dark
// inside   probabilities and attention             words      Markdown as elements
// side     the list of conversations               settings   how answers are sampled; light and dark

import { enlarge, keepOpen, picture, uri } from "./album.js";
import { ask, isRunning, running, stop } from "./asking.js";
import { boxed, boxesIn } from "./boxes.js";
import { Composer } from "./composer.js";
import { $, fresh, icon, make, note, plural, say, tool } from "./dom.js";
import { closeAside, drawTheme, menu, sidebar, theme } from "./frame.js";
import { chances, looking, toldOf } from "./inside.js";
import * as config from "./settings.js";
import { save } from "./saved.js";
import { drawList } from "./side.js";
import * as store from "./store.js";
import { look, models, setToken } from "./talk.js";
import { ROOT, Thread, titled, written } from "./thread.js";
import { tokenForm, Turn } from "./turns.js";

const STALE = 6000; // ms without a sign of life, after which an answer that another tab made counts as cut off

let all = []; // conversations, newest first
let thread = null; // the open one; null: a new one, not begun
let model = null; // {id, name, vision, max_images, max_tokens, parameters}
let offered = [];
let kept = true;
let looks = true; // whether the server can tell where the model looked
let pinned = true; // whether the newest words are kept in view
const turns = new Map(); // message id -> Turn
const tab = (() => {
  try {
    const known = sessionStorage.getItem("leveret.tab") ?? fresh();
    sessionStorage.setItem("leveret.tab", known);
    return known;
  } catch {
    return fresh();
  }
})();

const picturesUpTo = (message) => (message && thread ? thread.upTo(message).flatMap((turn) => turn.pictures) : []);
const openId = () => thread?.conversation.id ?? "";
const busy = () => thread !== null && isRunning(openId());

// --- drawing ----------------------------------------------------------------------------------------------------

let waiting = 0;
function redraw() {
  if (!waiting) waiting = requestAnimationFrame(() => { waiting = 0; draw(); });
}

function draw() {
  const path = thread?.path() ?? [];
  const wanted = new Set(path.map((message) => message.id));
  for (const [id, turn] of turns) {
    if (wanted.has(id)) continue;
    turn.element.remove();
    turns.delete(id);
  }
  $("hello").hidden = path.length > 0;
  const working = busy();
  const editing = composer.editing ? path.findIndex((message) => message.id === composer.editing.id) : -1;
  path.forEach((message, at) => {
    if (!turns.has(message.id)) turns.set(message.id, new Turn(message, hooks));
    const turn = turns.get(message.id);
    const versions = thread.versions(message);
    const place = versions.indexOf(message);
    const before = versions[place - 1];
    const sight = path.slice(0, at).some((one) => one.pictures.length);
    turn.update(message, place, versions.length, {
      busy: working, sight, looks: looks && sight && model?.vision !== false,
      same: message.state === "done" && message.asked?.temperature === 0 && before?.text === message.text
        && message.text !== "",
    });
    turn.element.classList.toggle("edited", at === editing);
    turn.element.classList.toggle("later", editing >= 0 && at > editing);
    const there = $("turns").children[at] ?? null;
    if (there !== turn.element) $("turns").insertBefore(turn.element, there);
  });
  $("title").textContent = thread?.conversation.title ?? "New conversation";
  document.title = thread ? `${thread.conversation.title} \u2013 leveret` : "leveret";
  $("export").disabled = !path.length;
  composer.drawSend();
  follow();
}

function follow() {
  const box = $("scroll");
  if (pinned) box.scrollTop = box.scrollHeight;
  $("newest").hidden = pinned;
}

async function list() {
  all = await store.conversations();
  drawList(all, openId(), isRunning, { open, gone: (id) => (id === openId() ? begin() : list()), redraw: list });
}

function drawModel() {
  const facts = [];
  if (model?.parameters) {
    const [unit, words] = model.parameters >= 1e9 ? [1e9, "B"] : [1e6, "M"];
    facts.push(`${(model.parameters / unit).toFixed(model.parameters / unit < 10 ? 1 : 0)}${words} parameters`);
  }
  if (model && !model.vision) facts.push("reads text only");
  const choose = offered.length > 1 && make("select", { "aria-label": "Model",
    onchange: (event) => meetOne(event.target.value) },
    offered.map((one) => make("option", { value: one.id, selected: one.id === model.id }, one.id)));
  const more = facts.length ? ` \u00b7 ${facts.join(" \u00b7 ")}` : "";
  $("model").replaceChildren(...(model ? [choose || model.name, more] : ["\u00a0"]));
  const seen = model?.vision !== false;
  $("attach").hidden = !seen;
  $("text").placeholder = seen ? "Ask about a picture" : "Ask something";
  const tries = seen ? ["What is in the image?", "How many objects are there?", "What colour is it?"]
    : ["What can you do?"];
  $("hello").replaceChildren(make("img", { src: "page/leveret.svg", alt: "", width: 56, height: 56 }),
    make("h2", {}, seen ? "Show me a picture" : "Ask me something"),
    make("p", { class: "soft" }, seen ? "Drop it anywhere on this page, paste it, or add it below. Then ask."
      : "This model reads text only."),
    make("div", { class: "tries" }, tries.map((words) => make("button", { type: "button", onclick: () => {
      $("text").value = words;
      composer.grow();
      $("text").focus();
    } }, words))));
}

// --- conversations ----------------------------------------------------------------------------------------------

async function load(id) {
  const conversation = await store.conversation(id);
  if (!conversation) return null;
  const rows = (await store.messages(id)).map((row) => {
    const live = running.get(row.id);
    if (live) return live.message;
    if (row.state === "making" && (row.tab === tab || Date.now() - row.beat > STALE)) row.state = "cut";
    if (row.state === "making") setTimeout(() => { if (openId() === id) refresh(); }, STALE);
    return row;
  });
  // What this tab is making may not be written down yet.
  const known = new Set(rows.map((row) => row.id));
  for (const { message } of running.values()) {
    if (message.conversation === id && !known.has(message.id)) rows.push(message);
  }
  return new Thread(conversation, rows);
}

// Shows what the address names; an address without a conversation is a new one.
async function show() {
  const id = location.hash.slice(1);
  const found = id ? await load(id) : null;
  if (id !== location.hash.slice(1)) return;
  for (const turn of turns.values()) turn.element.remove();
  turns.clear();
  thread = found;
  pinned = true;
  composer.turnTo(openId());
  draw();
  await list();
}

async function refresh() {
  if (!thread) return list();
  const id = openId();
  const found = await load(id);
  if (openId() !== id) return;
  if (found) thread = found;
  else {
    note("This conversation was deleted in another tab.");
    return begin();
  }
  draw();
  await list();
}

async function open(id) {
  sidebar();
  if (location.hash.slice(1) === id) return show();
  location.hash = id;
}

async function begin() {
  sidebar();
  if (location.hash) history.pushState(null, "", location.pathname + location.search);
  await show();
  $("text").focus();
}

const unkept = new Set(); // conversations that the browser had no room for: they live in this page alone
let full = false;
function trouble(error) {
  if (full) return;
  full = true;
  note(error?.name === "QuotaExceededError"
    ? "This browser has no room left: delete some conversations to keep new ones."
    : "This browser could not keep the conversation: it ends with this page.", null, 20);
}

async function keep(message, rows = []) {
  if (unkept.has(message.conversation)) return;
  try {
    if (!(await store.write(message.conversation, [message], rows))) stop(message.conversation);
  } catch (error) {
    trouble(error);
  }
}

// The page may have been drawn anew from what was kept, or another conversation opened, while something was written.
function hold(message) {
  if (openId() === message.conversation) thread.messages.set(message.id, message);
}

async function pick(message) {
  const parent = message.parent ?? ROOT;
  if (openId() === message.conversation) {
    thread.conversation.picked[parent] = message.id;
    thread.conversation.updated = Date.now();
  }
  if (unkept.has(message.conversation)) return;
  try {
    await store.change(message.conversation, (row) => { row.picked[parent] = message.id; row.updated = Date.now(); });
  } catch (error) {
    trouble(error);
  }
}

// --- asking -----------------------------------------------------------------------------------------------------

async function send({ text, pictures: held, editing }) {
  if (!thread) {
    const now = Date.now();
    const conversation = { id: fresh(), title: titled(text, held), named: false, created: now, updated: now,
      picked: {} };
    thread = new Thread(conversation, []);
    composer.becomes(conversation.id);
    history.pushState(null, "", `#${conversation.id}`);
    await store.create(structuredClone(conversation)).catch((error) => {
      unkept.add(conversation.id);
      trouble(error);
    });
  }
  const own = thread;
  const id = own.conversation.id;
  const rows = held.map(({ blob, name, width, height, told, ...rest }) => (
    { id: rest.id ?? fresh(), conversation: id, blob, name, width, height, told }));
  rows.forEach((row, at) => keepOpen({ ...row, url: held[at].url }));
  const parent = editing ? editing.parent : own.path().at(-1)?.id ?? null;
  const message = { id: fresh(), conversation: id, parent, role: "user", at: Date.now(), text,
    pictures: rows.map((row) => row.id) };
  own.messages.set(message.id, message);
  await keep(message, rows);
  await pick(message);
  hold(message);
  await answerTo(own, message);
}

async function answerTo(own, asked, temperature = null, again = null) {
  const message = {
    id: again?.id ?? fresh(), conversation: asked.conversation, parent: asked.id, role: "assistant",
    at: again?.at ?? Date.now(), text: "", pictures: [], state: "making", beat: Date.now(), tab, told: [], stats: null,
    fault: null, finish: null, asked: null, model: model?.id ?? "",
  };
  own.messages.set(message.id, message);
  hold(message);
  pinned = true;
  const turnsSoFar = own.upTo(asked);
  const isOpen = () => openId() === message.conversation;
  const body = async () => ({
    model: model?.id ?? "default",
    messages: await written(turnsSoFar, config.settings.system, uri, model?.vision !== false),
    stream: true, stream_options: { include_usage: true },
    ...config.sampling(model?.max_tokens), ...(temperature === null ? {} : { temperature }),
  });
  const done = ask(message, body, { changed: () => { if (isOpen()) redraw(); }, keep, isOpen });
  await pick(message);
  await keep(message);
  await list();
  await done;
  hold(message);
  if (message.fault?.kind === "away") meet();
  await list();
  if (isOpen()) draw();
}

async function again(message, temperature = null) {
  if (!busy()) await answerTo(thread, thread.messages.get(message.parent), temperature);
}

// A failure without a word is asked again in its place; where something had come, a new version stands beside it.
const retry = (message) =>
  (message.text ? again(message) : busy() ? null
    : answerTo(thread, thread.messages.get(message.parent), message.asked?.temperature ?? null, message));

async function edit(message) {
  if (message === null) { composer.leave(); return draw(); }
  const found = (await Promise.all(message.pictures.map(picture))).filter(Boolean);
  composer.load(message, found);
  draw();
}

const seen = new Map(); // message id -> what the server told of its inside
async function insideOf(message) {
  if (!seen.has(message.id)) {
    const request = await written(thread.upTo(thread.messages.get(message.parent)),
      message.asked?.system ?? config.settings.system, uri, model?.vision !== false); // as it was answered
    seen.set(message.id, await look({ model: message.model || model?.id, messages: request, answer: message.text }));
  }
  return seen.get(message.id);
}

const hooks = {
  again, retry, picture, enlarge, edit,
  unpin: () => { pinned = false; },
  look: async (message) => {
    const shown = await Promise.all(picturesUpTo(thread.messages.get(message.parent)).map(picture));
    return looking(await insideOf(message), shown);
  },
  // The picture that was shown last is the one that is talked of.
  boxes: async (message) => boxed(boxesIn(message.text),
    await picture(picturesUpTo(thread.messages.get(message.parent)).at(-1))),
  chances: async (message) => chances(message.told.length ? message.told : toldOf(await insideOf(message))),
  hurry: (message) => running.get(message.id)?.hurry?.(),
  useToken: async (text, message) => { setToken(text); await meet(); await retry(message); },
  pick: async (message, step) => {
    const versions = thread.versions(message);
    const other = versions[versions.findIndex((one) => one.id === message.id) + step];
    if (!other) return;
    await pick(other);
    draw();
    const turn = turns.get(other.id);
    (step < 0 ? [turn.back, turn.next] : [turn.next, turn.back]).find((button) => !button.disabled)?.focus();
    say(`Version ${versions.indexOf(other) + 1} of ${versions.length}.`);
  },
};

// --- the server -------------------------------------------------------------------------------------------------

function meetOne(id) {
  const one = offered.find((other) => other.id === id) ?? offered[0];
  model = one ? { vision: true, max_images: Infinity, max_tokens: null, ...one.leveret, id: one.id, name: one.id }
    : null;
  drawModel();
}

function banner(...parts) {
  $("banner").hidden = !parts.length;
  $("banner").replaceChildren(...parts);
}

let meeting = 0;
async function meet(delay = 2) {
  clearTimeout(meeting);
  try {
    offered = await models();
    banner();
    meetOne(model?.id);
  } catch (fault) {
    if (fault.kind === "token") {
      banner(icon("key"), make("div", {}, make("strong", {}, "The server asks for a token."),
        " It is kept in this tab alone.",
        tokenForm((text) => { setToken(text); meet(); })));
      say("The server asks for a token.", true);
      return;
    }
    banner(icon("warning"), make("div", {}, make("strong", {}, "The server does not answer."),
      ` Trying again every ${delay} s. `,
      make("button", { type: "button", class: "link", onclick: () => meet() }, "Try now")));
    meeting = setTimeout(() => meet(Math.min(delay * 2, 30)), delay * 1000);
  }
}

// --- the page around it -----------------------------------------------------------------------------------------

const composer = new Composer({
  send, busy, edit,
  stop: () => stop(openId()),
  editing: edit,
  last: () => (thread?.path() ?? []).filter((message) => message.role === "user").at(-1),
  model: () => model,
  before: (editing) => picturesUpTo(editing ? thread.messages.get(editing.parent) : thread?.path().at(-1)).length,
});

function bind() {
  $("menu-place").append(menu);
  $("bar-tools").append(tool("save", "Save this conversation as JSON",
    () => save(thread, uri).catch((error) => note(error.message)), { id: "export" }), theme);
  for (const [id, name] of [["attach", "picture"], ["open-settings", "sliders"],
    ["close-settings", "close"]]) $(id).append(icon(name));
  $("new").prepend(icon("plus"));
  $("newest").prepend(icon("down"));
  $("new").addEventListener("click", begin);
  $("find").addEventListener("input", list);
  $("veil").addEventListener("click", () => sidebar(false));
  $("skip").addEventListener("click", (event) => { event.preventDefault(); $("text").focus(); });
  $("newest").addEventListener("click", () => { pinned = true; follow(); $("text").focus(); });
  $("big").addEventListener("click", (event) => { if (event.target === $("big")) $("big").close(); });
  $("delete-all").addEventListener("click", async () => {
    const gone = [];
    for (const one of all) { stop(one.id); gone.push(await store.remove(one.id)); }
    $("settings").close();
    await begin();
    note(`${plural(gone.length, "conversation")} deleted.`, gone.length ? { words: "Undo", do: async () => {
      for (const one of gone) await store.restore(one);
      await list();
    } } : null, 15);
  });
  const box = $("scroll");
  box.addEventListener("scroll", () => {
    pinned = box.scrollHeight - box.scrollTop - box.clientHeight < 60;
    $("newest").hidden = pinned;
  }, { passive: true });
  new ResizeObserver(follow).observe($("turns"));
  addEventListener("resize", () => composer.grow());
  addEventListener("hashchange", show);
  addEventListener("online", () => { if (!model) meet(); });
  addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !event.defaultPrevented && !event.isComposing
      && !document.querySelector("dialog[open]")) {
      if (closeAside()) return;
      if (busy()) stop(openId());
      else if (composer.editing) edit(null);
    }
    const typing = /^(INPUT|TEXTAREA|SELECT)$/.test(document.activeElement?.tagName ?? "");
    if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey && !event.altKey) {
      event.preventDefault();
      $("text").focus();
    }
  });
  config.bind(drawTheme, () => meet());
  sidebar();
}

bind();
drawModel();
kept = await store.open();
if (!kept) $("kept").prepend("This browser keeps nothing: conversations end with this page. ");
let heard = 0;
store.watch((id) => {
  if (id === openId()) return refresh();
  clearTimeout(heard);
  heard = setTimeout(list, 100);
});
await show();
if (!matchMedia("(pointer: coarse)").matches) $("text").focus();
document.documentElement.dataset.ready = "yes";
await meet();

// The turns of a conversation as they stand on the page. A turn's elements are made once and then brought up to date,
// so that focus, selection and what is folded open stay while an answer grows.

import { boxesIn } from "./boxes.js";
import { copy, icon, make, plural, tool } from "./dom.js";
import * as words from "./words.js";

const SECONDS = { minimumFractionDigits: 2, maximumFractionDigits: 2 };

function figures(stats) {
  if (!stats) return "";
  const parts = [`${stats.first.toLocaleString("en", SECONDS)} s to the first token`];
  if (stats.rate) parts.push(`${stats.rate >= 10 ? Math.round(stats.rate) : stats.rate.toFixed(1)} tokens/s`);
  parts.push(plural(stats.tokens, "token"));
  if (stats.read) parts.push(`${stats.read.toLocaleString("en")} read${stats.reused ? ` (${stats.reused.toLocaleString("en")} reused)` : ""}`);
  return parts.join(" \u00b7 ");
}

// What went wrong, in a sentence, and what helps.
const FAULTS = {
  away: ["The server does not answer.", "Is it still running? Try again when it is."],
  lost: ["The connection was lost in the middle of the answer.", "What had come is kept."],
  closing: ["The server is shutting down.", "The answer ends here; try again when it is back."],
  busy: ["The server has no room.", "Others are being answered. Try again in a moment."],
  token: ["The server asks for a token.", "Whoever started it knows it."],
  page: ["Something went wrong in this page.", ""],
};

export class Turn {
  // hooks: again, edit, retry, hurry, pick, look, boxes, chances, picture(id) -> {url, ...}, enlarge, useToken
  constructor(message, hooks) {
    this.hooks = hooks;
    this.message = message;
    this.seen = {};
    const mine = message.role === "user";
    this.name = make("h2", { class: "unseen" }, mine ? "You" : "Answer");
    this.pictures = make("ul", { class: "pictures" });
    this.body = make("div", { class: mine ? "said" : "words" });
    this.state = make("p", { class: "state", hidden: true });
    this.fault = make("div", { class: "fault", hidden: true });
    this.inside = make("div", { class: "insides" });
    this.stats = make("span", { class: "stats" });
    this.versions = make("span", { class: "versions", role: "group", "aria-label": "Versions", hidden: true });
    this.back = tool("left", "The version before", () => hooks.pick(this.message, -1));
    this.next = tool("right", "The next version", () => hooks.pick(this.message, 1));
    this.count = make("span");
    this.versions.append(this.back, this.count, this.next);
    this.copy = tool("copy", "Copy", () => copy(this.message.text, this.copy));
    this.tools = mine
      ? [this.copy, (this.edit = tool("pencil", "Edit and ask again", () => hooks.edit(this.message)))]
      : [this.copy,
        (this.again = tool("again", "Answer again", () => hooks.again(this.message))),
        (this.look = tool("eye", "Where it looked", () => this.fold("look"), { "aria-expanded": "false" })),
        (this.boxes = tool("box", "Show the box on the picture", () => this.fold("boxes"), { "aria-expanded": "false" })),
        (this.chances = tool("chances", "How sure it was", () => this.fold("chances"), { "aria-expanded": "false" }))];
    this.foot = make("div", { class: "foot" }, this.versions, this.tools, mine ? null : this.stats);
    this.element = make("li", { class: `turn ${mine ? "mine" : "theirs"}`, data: { id: message.id } },
      make("article", {}, this.name, this.pictures, this.body, this.state, this.fault, this.foot, this.inside));
  }

  // at: which of how many versions this is. context: {busy, model, looks, same}
  update(message, at, count, context) {
    this.message = message;
    const mine = message.role === "user";
    const making = message.state === "making";
    if (this.seen.text !== message.text) {
      // What was told about the inside belonged to other words.
      if (this.inside.firstChild) this.unfold();
      this.seen.text = message.text;
      if (mine) this.body.textContent = message.text;
      else words.show(this.body, message.text);
    }
    if (mine) this.drawPictures(message.pictures);
    this.body.hidden = !message.text;
    this.element.classList.toggle("making", making && !message.waiting);
    this.element.setAttribute("aria-busy", String(making));
    this.versions.hidden = count < 2;
    this.count.textContent = `${at + 1}/${count}`;
    this.count.setAttribute("aria-label", `version ${at + 1} of ${count}`);
    this.back.disabled = at === 0 || context.busy;
    this.next.disabled = at === count - 1 || context.busy;
    this.copy.hidden = !message.text;
    this.foot.classList.toggle("empty", making);
    if (mine) {
      this.edit.disabled = context.busy;
      return;
    }
    this.again.disabled = context.busy;
    this.look.hidden = making || !message.text || !context.looks;
    this.chances.hidden = making || !message.text;
    this.boxes.hidden = making || !context.sight || !boxesIn(message.text).length;
    this.stats.textContent = making ? "" : figures(message.stats);
    this.drawState(message, context);
    this.drawFault(message, context);
  }

  drawPictures(ids) {
    const key = ids.join(" ");
    if (this.seen.pictures === key) return;
    this.seen.pictures = key;
    this.pictures.replaceChildren(...ids.map((id) => {
      const image = make("img", { alt: "", loading: "lazy" });
      const button = make("button", { type: "button", "aria-label": "Show the picture large" }, image);
      this.hooks.picture(id).then((found) => {
        if (!found) {
          button.replaceChildren(make("span", { class: "soft" }, "This picture is no longer kept."));
          button.disabled = true;
          return;
        }
        image.src = found.url;
        image.alt = found.name;
        image.classList.toggle("pixel", Math.max(found.width, found.height) <= 128);
        image.width = found.width;
        image.height = found.height;
        button.setAttribute("aria-label", `${found.name}: show it large`);
        button.addEventListener("click", () => this.hooks.enlarge(found));
      });
      return make("li", {}, button);
    }));
  }

  drawState(message, context) {
    let told = "";
    let act = null;
    if (message.waiting) {
      const seconds = Math.max(0, Math.ceil((message.waiting.until - Date.now()) / 1000));
      told = `${message.waiting.why} Trying again in ${seconds} s.`;
      act = ["Try now", () => this.hooks.hurry(message)];
    } else if (message.state === "making" && !message.text) {
      told = context.sight ? "Looking and thinking" : "Thinking";
    } else if (message.state === "stopped") told = message.text ? "Stopped." : "Stopped before the first word.";
    else if (message.state === "cut") told = "This page was closed before the answer was complete.";
    else if (message.finish === "length") told = `Cut at ${plural(message.stats?.tokens ?? 0, "token")}: the settings allow no more.`;
    else if (message.state === "done" && !message.text) told = "The model said nothing.";
    else if (context.same) {
      told = "The same answer, as it has to be at temperature 0.";
      act = ["Try at 0.7", () => this.hooks.again(message, 0.7)];
    }
    this.state.hidden = !told;
    this.state.classList.toggle("thinking", message.state === "making" && !message.waiting);
    if (this.seen.told === told) return;
    this.seen.told = told;
    const held = this.state.contains(document.activeElement);
    this.state.replaceChildren(told, ...(act ? [" ", make("button", { type: "button", class: "link", onclick: act[1] }, act[0])] : []));
    if (held) this.state.querySelector("button")?.focus();
  }

  drawFault(message, context) {
    const fault = message.state === "failed" ? message.fault : null;
    this.fault.hidden = !fault;
    const key = fault ? `${fault.kind} ${fault.words} ${context.busy}` : "";
    if (this.seen.fault === key) return;
    this.seen.fault = key;
    if (!fault) return this.fault.replaceChildren();
    const [title, help] = FAULTS[fault.kind] ?? ["The server could not answer.", ""];
    // The server's own words stand where they say more than ours.
    const more = fault.kind === "away" || fault.kind === "lost" ? help : `${fault.words} ${fault.kind === "busy" ? "" : help}`;
    this.fault.replaceChildren(icon(fault.kind === "token" ? "key" : "warning"),
      make("div", {}, make("strong", {}, title), " ", more,
        fault.kind === "token" ? tokenForm((text) => this.hooks.useToken(text, message))
          : make("p", {}, make("button", { type: "button", disabled: context.busy, onclick: () => this.hooks.retry(message) }, "Try again"))));
  }

  // Opens or closes what is told about the inside of the answer.
  async fold(which) {
    const button = this[which];
    const open = button.getAttribute("aria-expanded") === "true";
    this.unfold();
    if (open) return;
    button.setAttribute("aria-expanded", "true");
    const box = make("div", {}, make("p", { class: "state thinking" }, "Looking inside"));
    this.inside.replaceChildren(box);
    let made;
    try {
      made = await this.hooks[which](this.message);
    } catch (error) {
      made = make("div", { class: "inside" }, make("p", { class: "bad" }, error.message));
    }
    if (box.isConnected) box.replaceWith(made);
  }

  unfold() {
    this.inside.replaceChildren();
    for (const button of [this.look, this.boxes, this.chances]) button?.setAttribute("aria-expanded", "false");
  }
}

export function tokenForm(use) {
  const box = make("input", { type: "password", autocomplete: "off", "aria-label": "Token of the server", placeholder: "Token" });
  return make("form", { class: "token", onsubmit: (event) => { event.preventDefault(); if (box.value.trim()) use(box.value.trim()); } },
    box, make("button", { type: "submit" }, "Use it"));
}

// Where a message is written: text, pictures by drop, paste or picker, and the same again for an earlier message.

import { $, make, note, plural, say, tool } from "./dom.js";
import { filesOf, prepared } from "./pictures.js";

const DRAFT = "leveret.draft";

export class Composer {
  // hooks: send({text, pictures, editing}), stop(), busy(), last(), editing(message or null)
  //        model() -> {vision, max_images, name}, before(editing) -> pictures that are in the conversation already
  constructor(hooks) {
    this.hooks = hooks;
    this.held = [];
    this.editing = null;
    this.loading = 0;
    this.text = $("text");
    this.key = "";
    this.drafts = new Map();
    $("ask").addEventListener("submit", (event) => { event.preventDefault(); this.submit(); });
    $("attach").addEventListener("click", () => $("file").click());
    $("file").addEventListener("change", () => { this.hold([...$("file").files]); $("file").value = ""; });
    this.text.addEventListener("input", () => { this.grow(); this.remember(); });
    this.text.addEventListener("keydown", (event) => this.typed(event));
    addEventListener("paste", (event) => this.pasted(event));
    this.dropping();
    this.draw();
  }

  typed(event) {
    if (event.isComposing) return;
    if (event.key === "Enter" && !event.shiftKey && !event.altKey) {
      event.preventDefault();
      if (this.hooks.busy()) say("The answer is still being made. Esc stops it.");
      else this.submit();
    } else if (event.key === "ArrowUp" && !this.text.value && !this.held.length && !this.editing) {
      const last = this.hooks.last();
      if (!last || this.hooks.busy()) return;
      event.preventDefault();
      this.hooks.editing(last);
    }
  }

  pasted(event) {
    if (document.querySelector("dialog[open]")) return;
    const elsewhere = event.target !== this.text && /^(INPUT|TEXTAREA)$/.test(event.target.tagName ?? "");
    const files = filesOf(event.clipboardData).filter((file) => file.type.startsWith("image/"));
    // Office programs give a picture of the text beside the text: the text is meant.
    if (elsewhere || !files.length || event.clipboardData.getData("text/plain")) return;
    event.preventDefault();
    this.hold(files);
    this.text.focus();
  }

  dropping() {
    let depth = 0;
    const isOurs = (event) => [...(event.dataTransfer?.types ?? [])].some((type) => type === "Files" || type === "text/uri-list");
    const show = (there) => { $("drop").hidden = !there; };
    addEventListener("dragenter", (event) => { if (isOurs(event)) { depth += 1; show(true); event.preventDefault(); } });
    addEventListener("dragleave", (event) => { if (isOurs(event)) { depth = Math.max(0, depth - 1); if (!depth) show(false); } });
    addEventListener("dragover", (event) => { if (isOurs(event)) { event.preventDefault(); event.dataTransfer.dropEffect = "copy"; } });
    addEventListener("drop", (event) => {
      depth = 0;
      show(false);
      if (!isOurs(event)) return;
      event.preventDefault();
      const files = filesOf(event.dataTransfer);
      if (files.length) this.hold(files);
      else note("Only its address came, and this page loads nothing from elsewhere. Copy the picture and paste it, or drop its file.");
      this.text.focus();
    });
  }

  async hold(files) {
    const model = this.hooks.model();
    if (model && !model.vision) return note(`${model.name} reads text only: pictures are not sent.`);
    this.loading += 1;
    this.draw();
    const key = this.key;
    for (const file of files) {
      const room = (model?.max_images ?? Infinity) - this.hooks.before(this.editing) - this.held.length;
      if (room <= 0) {
        note(`${model.name} takes at most ${plural(model.max_images, "picture")} in a conversation: ${file.name || "the next one"} is left out.`);
        break;
      }
      try {
        const picture = await prepared(file);
        if (key !== this.key) break;
        this.held.push({ ...picture, url: URL.createObjectURL(picture.blob) });
        say(`${picture.name} is added${picture.told ? `, ${picture.told}` : ""}.`);
      } catch (error) {
        note(error.message);
        say(error.message, true);
      }
      this.draw();
    }
    this.loading -= 1;
    this.draw();
  }

  submit() {
    if (this.hooks.busy()) return this.hooks.stop();
    const text = this.text.value.trim();
    if (this.loading || (!text && !this.held.length)) return;
    const sent = { text: text || "What is in the image?", pictures: this.held, editing: this.editing };
    this.clear();
    this.hooks.send(sent);
  }

  // Loads an earlier message, to be asked again in other words.
  load(message, pictures) {
    if (!this.editing) this.drafts.set("before editing", { text: this.text.value, held: this.held });
    this.editing = message;
    this.held = pictures;
    this.text.value = message.text;
    this.draw();
    this.grow();
    this.text.focus();
    this.text.setSelectionRange(message.text.length, message.text.length);
    say("Editing an earlier message. Esc keeps it as it was.");
  }

  leave() {
    if (!this.editing) return false;
    this.editing = null;
    const before = this.drafts.get("before editing") ?? { text: "", held: [] };
    [this.text.value, this.held] = [before.text, before.held];
    this.drafts.delete("before editing");
    this.draw();
    this.grow();
    return true;
  }

  clear() {
    const before = this.editing ? this.drafts.get("before editing") : null;
    this.drafts.delete("before editing");
    this.editing = null;
    this.text.value = before?.text ?? "";
    this.held = before?.held ?? [];
    this.draw();
    this.grow();
    this.remember();
  }

  // Another conversation is opened: its own draft stands in the box.
  turnTo(key) {
    if (key === this.key) return;
    this.leave();
    this.drafts.set(this.key, { text: this.text.value, held: this.held });
    this.key = key;
    const draft = this.drafts.get(key) ?? { text: this.remembered(key), held: [] };
    [this.text.value, this.held] = [draft.text, draft.held];
    this.draw();
    this.grow();
  }

  // The first words of a new conversation gave it a name: what is in the box belongs to it from now on.
  becomes(key) { this.key = key; this.remember(); }

  remember() {
    try { sessionStorage.setItem(DRAFT, JSON.stringify({ key: this.key, text: this.editing ? "" : this.text.value })); } catch { /* lost on reload */ }
  }

  remembered(key) {
    try {
      const kept = JSON.parse(sessionStorage.getItem(DRAFT) ?? "null");
      return kept?.key === key ? String(kept.text) : "";
    } catch {
      return "";
    }
  }

  grow() {
    this.text.style.height = "auto";
    this.text.style.height = `${Math.min(this.text.scrollHeight, Math.max(120, innerHeight * 0.35))}px`;
    this.drawSend();
  }

  drawSend() {
    const busy = this.hooks.busy();
    const send = $("send");
    const words = busy ? "Stop" : this.editing ? "Ask again" : "Send";
    if (send.dataset.shows !== words) {
      send.dataset.shows = words;
      send.replaceChildren(tool(busy ? "stop" : "send", words, null).firstChild);
      send.setAttribute("aria-label", words);
      send.title = words;
    }
    send.classList.toggle("stops", busy);
    send.disabled = !busy && (this.loading > 0 || (!this.text.value.trim() && !this.held.length));
  }

  draw() {
    $("held").replaceChildren(...this.held.map((picture) => make("li", {},
      make("img", { src: picture.url, alt: "" }),
      make("div", {}, make("span", { class: "name", title: picture.name }, picture.name),
        make("span", { class: "soft" }, picture.told || `${picture.width} \u00d7 ${picture.height}`)),
      tool("close", `Remove ${picture.name}`, () => {
        const at = this.held.indexOf(picture);
        this.held = this.held.filter((one) => one !== picture);
        this.draw();
        say(`${picture.name} is removed.`);
        ($("held").querySelectorAll("button")[Math.min(at, this.held.length - 1)] ?? this.text).focus();
      }))), ...(this.loading ? [make("li", { class: "loading" }, make("span", { class: "soft" }, "Reading\u2026"))] : []));
    const editing = $("editing");
    editing.hidden = !this.editing;
    if (this.editing) {
      editing.replaceChildren(make("span", {}, "Editing an earlier message: what followed stays as another version."),
        make("button", { type: "button", class: "link", onclick: () => { this.hooks.editing(null); this.text.focus(); } }, "Keep it as it was"));
    }
    this.drawSend();
  }
}

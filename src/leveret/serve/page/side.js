// The list of conversations at the side: by day, found by words, renamed and deleted where they stand.

import { $, make, note, tool } from "./dom.js";
import * as store from "./store.js";

const DAY = 86_400_000;

function age(time) {
  const midnight = new Date().setHours(0, 0, 0, 0);
  return time >= midnight ? "Today" : time >= midnight - DAY ? "Yesterday" : time >= midnight - 6 * DAY ? "This week" : "Earlier";
}

let renaming = null; // id of the conversation whose title is being typed

// all: conversations, newest first. open: the id on the page. hooks: open(id), gone(id), redraw().
export function drawList(all, open, busy, hooks) {
  const box = $("list");
  if (renaming && document.activeElement?.matches("#list input")) return;
  const focused = document.activeElement?.closest?.("#list li")?.dataset.id;
  const wanted = $("find").value.trim().toLowerCase();
  const shown = all.filter((one) => one.title.toLowerCase().includes(wanted));
  $("find").hidden = all.length < 6 && !wanted;
  box.replaceChildren();
  let group = null;
  let list = null;
  for (const one of shown) {
    if (age(one.updated) !== group) {
      group = age(one.updated);
      list = make("ul");
      box.append(make("h2", {}, group), list);
    }
    list.append(entry(one, open, busy, hooks));
  }
  if (!shown.length) box.append(make("p", { class: "soft" }, wanted ? "None has these words." : "None yet."));
  if (focused) box.querySelector(`[data-id="${CSS.escape(focused)}"] .open`)?.focus();
}

function entry(one, open, busy, hooks) {
  if (renaming === one.id) {
    const box = make("input", { value: one.title, maxLength: 200, "aria-label": "Title" });
    const finish = async (kept) => {
      if (renaming !== one.id) return;
      renaming = null;
      const title = box.value.trim();
      if (kept && title && title !== one.title) await store.change(one.id, (row) => { row.title = title; row.named = true; });
      await hooks.redraw();
      $("list").querySelector(`[data-id="${CSS.escape(one.id)}"] .open`)?.focus();
    };
    box.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.isComposing) finish(true);
      if (event.key === "Escape") { event.stopPropagation(); finish(false); }
    });
    box.addEventListener("blur", () => finish(true));
    queueMicrotask(() => { box.focus(); box.select(); });
    return make("li", { data: { id: one.id } }, box);
  }
  return make("li", { data: { id: one.id }, class: one.id === open ? "now" : null },
    make("button", { type: "button", class: "open", "aria-current": one.id === open ? "true" : null, title: one.title,
      onclick: () => hooks.open(one.id) },
      make("span", {}, one.title), busy(one.id) && make("span", { class: "busy", role: "img", "aria-label": "is being answered" })),
    tool("pencil", `Rename \u201c${one.title}\u201d`, () => { renaming = one.id; hooks.redraw(); }),
    tool("bin", `Delete \u201c${one.title}\u201d`, async () => {
      const gone = await store.remove(one.id);
      await hooks.gone(one.id);
      note(`\u201c${one.title}\u201d is deleted.`, {
        words: "Undo", do: async () => { await store.restore(gone); await hooks.open(one.id); },
      });
    }));
}

// Elements without markup: everything on the page is built here, node by node, so that no text can become HTML.

export const $ = (id) => document.getElementById(id);

const ATTRIBUTES = new Set(["role", "for", "list", "colspan", "class", "inputmode", "enterkeyhint", "scope", "popover"]);

// make("button", {class: "quiet", onclick: f, "aria-label": "Copy"}, "text", node, null): null parts are left out.
export function make(tag, parts = {}, ...inside) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(parts)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name === "data") Object.assign(made.dataset, value);
    else if (ATTRIBUTES.has(name) || name.includes("-")) made.setAttribute(name, value === true ? "" : value);
    else made[name] = value;
  }
  made.append(...inside.flat().filter((part) => part !== null && part !== undefined && part !== false));
  return made;
}

// Strokes on a 24 x 24 ground.
const ICONS = {
  plus: "M12 5v14M5 12h14",
  menu: "M4 7h16M4 12h16M4 17h10",
  close: "M6 6l12 12M18 6L6 18",
  send: "M12 19V5M6 11l6-6 6 6",
  picture: "M5 4h14a1 1 0 0 1 1 1v14a1 1 0 0 1-1 1H5a1 1 0 0 1-1-1V5a1 1 0 0 1 1-1zM4 16l4.5-4.5 4 4 2.5-2.5 5 5M15.5 9.5v.01",
  pencil: "M4 20l1-4L16.5 4.5l3 3L8 19zM14 7l3 3",
  bin: "M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13M10.5 11v5M13.5 11v5",
  copy: "M9 9h10v11H9zM15 9V4H5v11h4",
  tick: "M5 12.5l4.5 4.5L19 7",
  again: "M19 12a7 7 0 1 1-2.2-5.1M19 4v4.5h-4.5",
  save: "M12 4v11M7.5 11l4.5 4.5L16.5 11M5 20h14",
  eye: "M3 12c2.5-4.5 5.5-6.5 9-6.5s6.5 2 9 6.5c-2.5 4.5-5.5 6.5-9 6.5S5.5 16.5 3 12zM12 9.5a2.5 2.5 0 1 0 0 5 2.5 2.5 0 0 0 0-5z",
  chances: "M5 20v-6M10 20V9M15 20v-9M20 20V5",
  box: "M4 8V4h4M16 4h4v4M20 16v4h-4M8 20H4v-4M8.5 8.5h7v7h-7z",
  left: "M14.5 6L8.5 12l6 6",
  right: "M9.5 6l6 6-6 6",
  down: "M12 5v14M6 13l6 6 6-6",
  sun: "M12 8a4 4 0 1 0 0 8 4 4 0 0 0 0-8zM12 2.5v2M12 19.5v2M2.5 12h2M19.5 12h2M5.3 5.3l1.4 1.4M17.3 17.3l1.4 1.4M18.7 5.3l-1.4 1.4M6.7 17.3l-1.4 1.4",
  moon: "M19.5 14.5A8 8 0 0 1 9.5 4.5a8 8 0 1 0 10 10z",
  sliders: "M4 7h9M17 7h3M4 17h3M11 17h9M15 5v4M9 15v4",
  warning: "M12 4L2.5 20h19zM12 10v4.5M12 17.2v.01",
  key: "M8 11a4 4 0 1 0 0 8 4 4 0 0 0 0-8zM11 12L20 4M16 7.5l3 3",
};

export function icon(name) {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  const path = document.createElementNS(space, "path");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  if (name === "stop") path.setAttribute("class", "solid");
  path.setAttribute("d", name === "stop" ? "M8 6.5h8A1.5 1.5 0 0 1 17.5 8v8a1.5 1.5 0 0 1-1.5 1.5H8A1.5 1.5 0 0 1 6.5 16V8A1.5 1.5 0 0 1 8 6.5z" : ICONS[name]);
  svg.append(path);
  return svg;
}

// A button that is a picture only: its words are its name and its tip.
export const tool = (name, words, onclick, parts = {}) =>
  make("button", { type: "button", class: "tool", "aria-label": words, title: words, onclick, ...parts }, icon(name));

// Spoken to who listens to the page instead of seeing it. Two regions in turn, so that equal words are spoken again.
let turn = 0;
export function say(words, at_once = false) {
  const region = $(at_once ? "alarm" : `spoken-${(turn = 1 - turn)}`);
  if (at_once) region.textContent = "";
  region.append(make("p", {}, words));
  while (region.childElementCount > 12) region.firstElementChild.remove();
}

// A line at the foot of the page that goes by itself, with one thing to do about it.
export function note(words, act = null, seconds = 8) {
  const close = () => { clearTimeout(timer); line.remove(); };
  const line = make("div", { class: "note" }, make("span", {}, words),
    act && make("button", { type: "button", class: "link", onclick: () => { close(); act.do(); } }, act.words),
    tool("close", "Close", close));
  $("notes").append(line);
  const timer = setTimeout(close, seconds * 1000);
  return close;
}

export async function copy(text, button) {
  let done = true;
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Without https the clipboard is closed to pages, but not to what is selected in them.
    const box = make("textarea", { value: text, class: "unseen", readOnly: true });
    document.body.append(box);
    box.select();
    done = document.execCommand("copy");
    box.remove();
    button?.focus();
  }
  say(done ? "Copied." : "The browser did not let the page copy.", !done);
  if (!done || !button) return;
  const before = [...button.childNodes];
  button.replaceChildren(icon("tick"));
  button.classList.add("done");
  setTimeout(() => { button.replaceChildren(...before); button.classList.remove("done"); }, 1200);
}

export const fresh = () =>
  [...crypto.getRandomValues(new Uint8Array(12))].map((byte) => byte.toString(16).padStart(2, "0")).join("");

export function download(name, blob) {
  const address = URL.createObjectURL(blob);
  const anchor = make("a", { href: address, download: name });
  document.body.append(anchor);
  anchor.click();
  anchor.remove();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}

export const plural = (count, one, many = `${one}s`) => `${count.toLocaleString("en")} ${count === 1 ? one : many}`;

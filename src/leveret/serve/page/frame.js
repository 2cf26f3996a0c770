// What stands around a conversation: the list's place at the side or over the page, and the switch to light or dark.

import { $, icon, tool } from "./dom.js";
import { isDark, set } from "./settings.js";

const narrow = matchMedia("(max-width: 54rem)");
let sideOpen = true;

export const menu = tool("menu", "Conversations", () => {
  sidebar(!sideOpen);
  if (sideOpen && narrow.matches) $("new").focus();
}, { "aria-controls": "side" });

// Beside the page where there is room; over it, with the page out of reach, where there is not.
export function sidebar(there = !narrow.matches) {
  const held = $("side").contains(document.activeElement);
  sideOpen = there;
  document.body.classList.toggle("aside", there);
  $("side").inert = !there;
  $("room").inert = there && narrow.matches;
  $("veil").hidden = !(there && narrow.matches);
  menu.setAttribute("aria-expanded", String(there));
  if (held && !there) menu.focus(); // what had the focus is out of reach now
}

narrow.addEventListener("change", () => sidebar());

// Puts the list away where it lies over the page; whether it did.
export function closeAside() {
  if (!narrow.matches || !sideOpen) return false;
  sidebar(false);
  return true;
}

export const theme = tool("moon", "Dark colours", () => set({ theme: isDark() ? "light" : "dark" }), { id: "theme" });

export function drawTheme() {
  const words = isDark() ? "Light colours" : "Dark colours";
  theme.replaceChildren(icon(isDark() ? "sun" : "moon"));
  theme.setAttribute("aria-label", words);
  theme.title = words;
}

// What the reader set: how answers are sampled, what stands before each conversation, light or dark. Kept in this
// browser and heard of by its other tabs; the server's token is kept in this tab alone.

import { $ } from "./dom.js";
import { setToken, token } from "./talk.js";

const KEY = "leveret.settings";
const DEFAULTS = { temperature: 0, top_p: 1, max_tokens: 512, seed: "", system: "", chances: true, theme: "system" };

function clean(given) {
  const number = (name, low, high) => {
    const value = Number(given[name]);
    return given[name] === "" || !Number.isFinite(value) ? DEFAULTS[name] : Math.min(Math.max(value, low), high);
  };
  const seed = String(given.seed ?? "").trim();
  return {
    temperature: number("temperature", 0, 2),
    top_p: number("top_p", 0.01, 1),
    max_tokens: Math.round(number("max_tokens", 1, 1_000_000)),
    seed: /^\d{1,15}$/.test(seed) ? seed : "",
    system: String(given.system ?? ""),
    chances: Boolean(given.chances ?? DEFAULTS.chances),
    theme: ["light", "dark"].includes(given.theme) ? given.theme : "system",
  };
}

function read() {
  try {
    return clean({ ...DEFAULTS, ...JSON.parse(localStorage.getItem(KEY) ?? "{}") });
  } catch {
    return clean(DEFAULTS);
  }
}

export let settings = read();

export function set(parts) {
  settings = clean({ ...settings, ...parts });
  try { localStorage.setItem(KEY, JSON.stringify(settings)); } catch { /* kept while the page is open */ }
  paint();
}

// What goes into a request; at most `limit` tokens where the server told one.
export function sampling(limit) {
  const { temperature, top_p, max_tokens, seed, chances } = settings;
  return {
    temperature, top_p, max_tokens: limit ? Math.min(max_tokens, limit) : max_tokens,
    ...(seed ? { seed: Number(seed) } : {}),
    ...(chances ? { logprobs: true, top_logprobs: 5 } : {}),
  };
}

export const isDark = () =>
  settings.theme === "dark" || (settings.theme === "system" && matchMedia("(prefers-color-scheme: dark)").matches);

const painted = [];
export function paint() {
  const root = document.documentElement;
  if (settings.theme === "system") delete root.dataset.theme;
  else root.dataset.theme = settings.theme;
  for (const heard of painted) heard();
}

function fill() {
  for (const name of ["temperature", "top_p", "max_tokens", "seed", "system"]) $(`set-${name}`).value = settings[name];
  $("set-chances").checked = settings.chances;
  $("set-token").value = token();
  for (const radio of document.getElementsByName("theme")) radio.checked = radio.value === settings.theme;
  tell();
}

function tell() {
  const warm = Number($("set-temperature").value);
  $("told-temperature").textContent = warm === 0 ? "0: always the likeliest word" : warm.toFixed(2);
  const share = Number($("set-top_p").value);
  $("told-top_p").textContent = share === 1 ? "1: all words" : share.toFixed(2);
}

// Binds the dialog. `heard` is called after a change, `newToken` after the token was changed.
export function bind(heard, newToken) {
  painted.push(heard);
  const dialog = $("settings");
  $("server").addEventListener("submit", (event) => { event.preventDefault(); $("set-token").blur(); });
  dialog.addEventListener("input", tell);
  dialog.addEventListener("change", (event) => {
    if (event.target.id === "set-token") {
      setToken(event.target.value.trim());
      newToken();
      return;
    }
    set({
      ...Object.fromEntries(["temperature", "top_p", "max_tokens", "seed", "system"].map((name) => [name, $(`set-${name}`).value])),
      chances: $("set-chances").checked,
      theme: [...document.getElementsByName("theme")].find((radio) => radio.checked)?.value,
    });
    fill();
  });
  $("set-back").addEventListener("click", () => { set({ ...DEFAULTS, theme: settings.theme }); fill(); });
  $("open-settings").addEventListener("click", () => { fill(); dialog.showModal(); });
  $("close-settings").addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  addEventListener("storage", (event) => {
    if (event.key !== KEY) return;
    settings = read();
    paint();
    if (dialog.open) fill();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
  paint();
}

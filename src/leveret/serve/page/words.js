// What a model wrote, as elements: paragraphs, headings, lists, code, tables, quotes; bold, slanted, struck, links.
//
// Text becomes text nodes and nothing else; no HTML is read, no picture is loaded, and a link goes to http, https or
// mail alone. Every scan is linear in the text (a hostile answer may be a hundred thousand stars). While an answer
// grows, only the blocks that changed are built anew, so that what a reader has selected stays selected.

import { copy, icon, make } from "./dom.js";

const DEEPEST = 6;

// --- blocks -----------------------------------------------------------------------------------------------------

const fence = (line) => /^ {0,3}(`{3,}|~{3,})\s*([^`\s]*)/.exec(line);
const heading = (line) => /^(#{1,6})\s+(\S.*)$/.exec(line);
const item = (line) => /^( *)([-*+]|\d{1,9}[.)])(?: +(.*))?$/.exec(line);
const rule = (line) => line.length < 200 && /^ {0,3}([-*_])(?: *\1){2,} *$/.test(line);
const quote = (line) => /^ {0,3}> ?(.*)$/.exec(line);
const blank = (line) => line.trim() === "";
const indent = (line) => line.length - line.trimStart().length;

function cells(line) {
  const inner = line.trim().replace(/^\|/, "");
  const found = [""];
  for (let at = 0; at < inner.length; at += 1) {
    if (inner[at] === "\\" && inner[at + 1] === "|") { found[found.length - 1] += "|"; at += 1; }
    else if (inner[at] === "|") found.push("");
    else found[found.length - 1] += inner[at];
  }
  if (found.length > 1 && blank(found.at(-1))) found.pop();
  return found.map((cell) => cell.trim());
}

const isDivider = (line) =>
  line !== undefined && line.includes("-") && line.includes("|") && cells(line).every((cell) => /^:?-+:?$/.test(cell));
const isTable = (lines, at) => lines[at].includes("|") && isDivider(lines[at + 1]);

const starts = (lines, at) =>
  fence(lines[at]) || heading(lines[at]) || rule(lines[at]) || quote(lines[at]) || item(lines[at]) || isTable(lines, at);

// Text -> [{kind, lines}]: which lines belong together, in order; joined again they are the text.
export function blocks(text) {
  const lines = text.replace(/\r\n?/g, "\n").replace(/\t/g, "    ").split("\n");
  const found = [];
  let at = 0;
  const take = (kind, to) => { found.push({ kind, lines: lines.slice(at, to) }); at = to; };
  while (at < lines.length) {
    let to = at + 1;
    const opened = fence(lines[at]);
    if (blank(lines[at])) { at += 1; continue; }
    if (opened) {
      const closes = (line) => line.trimStart().startsWith(opened[1]) && blank(line.trimStart().slice(opened[1].length));
      while (to < lines.length && !closes(lines[to])) to += 1;
      take("code", Math.min(to + 1, lines.length));
    } else if (heading(lines[at])) take("heading", to);
    else if (rule(lines[at])) take("rule", to);
    else if (quote(lines[at])) {
      while (to < lines.length && quote(lines[to])) to += 1;
      take("quote", to);
    } else if (isTable(lines, at)) {
      to = at + 2;
      while (to < lines.length && lines[to].includes("|") && !blank(lines[to])) to += 1;
      take("table", to);
    } else if (item(lines[at])) {
      const first = item(lines[at]);
      const kind = /\d/.test(first[2]) ? "numbers" : "points";
      for (; to < lines.length; to += 1) {
        const line = lines[to];
        if (blank(line)) {
          const next = lines[to + 1];
          if (next === undefined || blank(next) || !(item(next) || indent(next) > first[1].length)) break;
        } else if (indent(line) <= first[1].length) {
          const other = item(line);
          if (other ? /\d/.test(other[2]) !== (kind === "numbers") || rule(line) : starts(lines, to) || blank(lines[to - 1])) break;
        }
      }
      take(kind, to);
    } else {
      while (to < lines.length && !blank(lines[to]) && !starts(lines, to)) to += 1;
      take("words", to);
    }
  }
  return found;
}

function items(lines) {
  const margin = item(lines[0])[1].length;
  const found = [];
  for (const line of lines) {
    const opened = item(line);
    if (opened && opened[1].length <= margin) {
      found.push({ mark: opened[2], inset: opened[1].length + opened[2].length + 1, lines: [opened[3] ?? ""] });
    } else {
      const last = found.at(-1);
      last.lines.push(line.slice(Math.min(indent(line), last.inset)));
    }
  }
  return found;
}

function built(block, depth) {
  const { kind, lines } = block;
  if (kind === "code") return code(lines);
  if (kind === "rule") return make("hr");
  if (kind === "heading") {
    const [, marks, words] = heading(lines[0]);
    // The page's own headings are above those of an answer.
    return make(`h${Math.min(marks.length + 3, 6)}`, {}, inline(words.replace(/\s#+\s*$/, "")));
  }
  if (kind === "quote") return make("blockquote", {}, nested(lines.map((line) => quote(line)[1]).join("\n"), depth));
  if (kind === "table") return table(lines);
  if (kind === "words") return make("p", {}, inline(lines.map((line) => line.trim()).join("\n")));
  const list = make(kind === "numbers" ? "ol" : "ul");
  const all = items(lines);
  if (kind === "numbers") list.start = parseInt(all[0].mark, 10);
  const loose = lines.some(blank);
  for (const one of all) {
    const text = one.lines.join("\n");
    const inside = nested(text, depth);
    // A point of one paragraph stands close to the next one.
    const tight = inside.length && inside[0].tagName === "P" && !loose;
    list.append(make("li", {}, tight ? [...inside[0].childNodes, ...inside.slice(1)] : inside));
  }
  return list;
}

const nested = (text, depth) =>
  depth >= DEEPEST ? [make("p", {}, inline(text))] : blocks(text).map((block) => built(block, depth + 1));

function code(lines) {
  const [, marks, name] = fence(lines[0]);
  const closed = lines.length > 1 && lines.at(-1).trimStart().startsWith(marks);
  const text = lines.slice(1, closed ? -1 : undefined).join("\n");
  const button = make("button", { type: "button", class: "tool", "aria-label": "Copy the code", title: "Copy the code",
    onclick: () => copy(text, button) }, icon("copy"));
  return make("figure", { class: "code" }, make("figcaption", {}, make("span", {}, name || "code"), button),
    make("pre", { tabIndex: 0 }, make("code", {}, text)));
}

function table(lines) {
  const sides = cells(lines[1]).map((cell) => (cell.endsWith(":") ? (cell.startsWith(":") ? "middle" : "right") : null));
  const row = (line, tag) => {
    const found = cells(line).slice(0, sides.length);
    while (found.length < sides.length) found.push("");
    return make("tr", {}, found.map((cell, at) =>
      make(tag, { class: sides[at], scope: tag === "th" ? "col" : null }, inline(cell))));
  };
  return make("div", { class: "scroll", role: "region", tabIndex: 0, "aria-label": "Table" },
    make("table", {}, make("thead", {}, row(lines[0], "th")), make("tbody", {}, lines.slice(2).map((line) => row(line, "td")))));
}

// --- inside a line ----------------------------------------------------------------------------------------------

const PAIRS = [["**", "strong"], ["__", "strong"], ["~~", "del"], ["*", "em"], ["_", "em"]];
const isWord = (letter) => letter !== undefined && /[\p{L}\p{N}]/u.test(letter);
const LINK = /^(?:https?:\/\/|mailto:)[^\s<>"'\u0000-\u001f]{1,2000}$/i;

// A link that shows where it goes; null where it may not go there.
function link(words, to) {
  if (!LINK.test(to)) return null;
  return make("a", { href: to, target: "_blank", rel: "noopener noreferrer nofollow", title: to }, words());
}

// Text -> nodes. `missing` holds the marks that close nowhere further on, so that nobody looks for them again.
export function inline(text, depth = 0) {
  const nodes = [];
  const missing = new Set();
  let plain = "";
  const flush = () => {
    plain.split("\n").forEach((line, at) => {
      if (at) nodes.push(make("br"));
      if (line) nodes.push(document.createTextNode(line));
    });
    plain = "";
  };
  const push = (node) => { flush(); nodes.push(node); };
  const find = (mark, from) => {
    if (missing.has(mark)) return -1;
    const to = text.indexOf(mark, from);
    if (to < 0) missing.add(mark);
    return to;
  };
  let at = 0;
  while (at < text.length) {
    const here = text[at];
    if (here === "\\" && /[\\`*_{}[\]()#+\-.!~|>]/.test(text[at + 1] ?? "")) {
      plain += text[at + 1];
      at += 2;
      continue;
    }
    if (here === "`") {
      const ticks = /^`+/.exec(text.slice(at, at + 16))[0];
      const to = find(ticks, at + ticks.length);
      if (to > 0) {
        push(make("code", {}, text.slice(at + ticks.length, to).trim()));
        at = to + ticks.length;
      } else {
        plain += ticks;
        at += ticks.length;
      }
      continue;
    }
    if (here === "[" && depth < DEEPEST) {
      // Looked for in a window: many a "[" opens nothing.
      const middle = text.slice(at, at + 1000).indexOf("](");
      const target = middle > 0 ? text.slice(at + middle + 2, at + middle + 2002).split(")", 1)[0] : "";
      if (middle > 0 && text[at + middle + 2 + target.length] === ")") {
        const made = link(() => inline(text.slice(at + 1, at + middle), DEEPEST), target.trim().split(/\s/)[0]);
        if (made) {
          push(made);
          at += middle + 3 + target.length;
          continue;
        }
      }
    }
    if (here === "h" && !isWord(text[at - 1]) && depth < DEEPEST) {
      const found = /^https?:\/\/[^\s<>"'`]{1,2000}/.exec(text.slice(at, at + 2010));
      const to = found && found[0].replace(/[.,;:!?)\]}*_]+$/, "");
      const made = to && link(() => [to], to);
      if (made) {
        push(made);
        at += to.length;
        continue;
      }
    }
    const pair = depth < DEEPEST && "*_~".includes(here) && PAIRS.find(([mark]) => text.startsWith(mark, at));
    if (pair) {
      const [mark, tag] = pair;
      const from = at + mark.length;
      // Opens before a letter, closes after one; inside a word a mark is itself (snake_case, 2*3*4); of three the last closes.
      const single = mark.length === 1;
      const opens = text[from] !== undefined && !/\s/.test(text[from]) && !((single || here === "_") && isWord(text[at - 1]));
      let to = opens ? find(mark, from + 1) : -1;
      if (to > 0 && single && text[to + 1] === mark) to = -1;
      if (to > 0 && !single && text[to + 2] === here) to += 1;
      if (to > 0 && (/\s/.test(text[to - 1]) || ((single || here === "_") && isWord(text[to + mark.length])))) to = -1;
      if (to > 0) {
        push(make(tag, {}, inline(text.slice(from, to), depth + 1)));
        at = to + mark.length;
      } else {
        plain += mark;
        at = from;
      }
      continue;
    }
    plain += here;
    at += 1;
  }
  flush();
  return nodes;
}

// --- the whole --------------------------------------------------------------------------------------------------

const drawn = new WeakMap();

// Shows `text` in `box`; what stands there from an earlier part of the same text is left standing.
export function show(box, text) {
  const before = drawn.get(box) ?? [];
  const now = blocks(text).map((block) => ({ ...block, key: `${block.kind}\n${block.lines.join("\n")}` }));
  let same = 0;
  while (same < before.length && same < now.length && before[same] === now[same].key) same += 1;
  while (box.childElementCount > same) box.lastElementChild.remove();
  for (const block of now.slice(same)) box.append(built(block, 0));
  drawn.set(box, now.map((block) => block.key));
}

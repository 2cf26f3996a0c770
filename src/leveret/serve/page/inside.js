// Inside an answer: how sure the model was of each token and what else it might have said; where on the pictures it
// looked for each word.

import { make } from "./dom.js";

// Words as buttons in one line of text. One of them takes part in the order of focus, arrows move along; `shown` hears
// which one is meant: the one under the pointer, else the one that was chosen.
function strip(words, label, shown) {
  let chosen = -1;
  const buttons = words.map(({ text, name, tint }, at) => make("button", {
    type: "button", class: `word ${tint ?? ""}`, tabIndex: at ? -1 : 0, "aria-label": name, "aria-pressed": "false",
    onclick: () => choose(at), onfocus: () => shown(at), onpointerenter: () => shown(at),
  }, text.replace(/\n/g, "\u21b5") || "\u2205"));
  const choose = (at) => {
    chosen = at;
    buttons.forEach((button, one) => {
      button.setAttribute("aria-pressed", String(one === at));
      button.tabIndex = one === at ? 0 : -1;
    });
    shown(at);
  };
  const box = make("div", { class: "strip", role: "group", "aria-label": label });
  words.forEach(({ text, gap }, at) => box.append(buttons[at],
    ...(text.includes("\n") ? [make("br")] : gap ? [" "] : [])));
  box.addEventListener("keydown", (event) => {
    const at = buttons.indexOf(document.activeElement);
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: buttons.length - 1 }[event.key];
    if (at < 0 || to === undefined || !buttons[to]) return;
    event.preventDefault();
    buttons.forEach((button, one) => { button.tabIndex = one === to ? 0 : -1; });
    buttons[to].focus();
  });
  box.addEventListener("pointerleave", () => { if (chosen >= 0) shown(chosen); });
  return { box, choose };
}

const percent = (logprob) => {
  const share = 100 * Math.exp(logprob);
  return share > 99.95 ? "100 %" : share < 0.1 ? "< 0.1 %" : `${share < 10 ? share.toFixed(1) : Math.round(share)} %`;
};

const visible = (text) => text.replace(/ /g, "\u00b7").replace(/\n/g, "\u21b5").replace(/\t/g, "\u21e5") || "(end)";

// told: [[token, log probability, [[token, log probability], ...]], ...]
export function chances(told) {
  if (!told.length) return make("div", { class: "inside" },
    make("p", {}, "The server told no probabilities of this answer."));
  const rows = make("table", { class: "chances" });
  const left = make("p", { class: "soft" });
  const tints = ["t0", "t1", "t2", "t3", "t4"];
  const words = told.map(([text, logprob, others]) => ({
    text,
    tint: tints[[0.97, 0.85, 0.6, 0.35].findIndex((bound) => Math.exp(logprob) >= bound)] ?? "t4",
    name: `${text.trim() || "space"}, ${percent(logprob)}; ` +
      others.filter(([other]) => other !== text).map(([other, chance]) =>
        `${other.trim() || "space"} ${percent(chance)}`).join(", "),
  }));
  const line = strip(words, "Tokens of the answer, with how likely they were", (at) => {
    const [text, logprob, others] = told[at];
    const all = others.some(([other]) => other === text) ? others : [[text, logprob], ...others];
    rows.replaceChildren(make("caption", { class: "unseen" }, "What the model might have said here"), make("tbody", {},
      all.map(([other, chance]) => {
        const bar = make("span", { class: "bar" });
        bar.style.width = `${100 * Math.exp(chance)}%`;
        return make("tr", { class: other === text ? "said" : null },
          make("th", { scope: "row" }, make("code", {}, visible(other))), make("td", { class: "track" }, bar),
          make("td", { class: "number" }, percent(chance)));
      })));
    const rest = 1 - all.reduce((sum, [, chance]) => sum + Math.exp(chance), 0);
    left.textContent = rest > 0.0005 ? `All other tokens together: ${percent(Math.log(rest))}`
      : "All other tokens together: almost nothing";
  });
  const unsure = told.map(([, logprob], at) => [logprob, at]).sort((a, b) => a[0] - b[0])[0][1];
  line.choose(unsure);
  return make("div", { class: "inside" },
    make("h3", {}, "How sure it was"),
    make("p", { class: "soft" },
      "Pale: sure. Dark: it might have said something else. Shown first: the least sure token."),
    line.box, rows, left);
}

// --- where it looked --------------------------------------------------------------------------------------------

const WHERE = [["upper left", "top", "upper right"], ["left", "middle", "right"],
  ["lower left", "bottom", "lower right"]];

// A grid of shares, drawn where on the picture it lies: dark where the model did not look, glowing where it did.
function paint(canvas, picture, seen, values, most) {
  const [height, width] = seen.grid;
  const small = make("canvas", { width, height });
  const pen = small.getContext("2d");
  const pixels = pen.createImageData(width, height);
  // From the least to the most of them: attention is spread thin, and what stands out is what tells something.
  const least = values.reduce((a, b) => Math.min(a, b), most);
  for (let at = 0; at < height * width; at += 1) {
    const heat = most > least ? ((values[at] - least) / (most - least)) ** 0.8 : 0;
    const [veil, glow] = [0.68 * (1 - heat), 0.3 * heat * heat];
    const part = glow / (veil + glow);
    pixels.data.set([255 * part, 165 * part, 30 * part, 255 * (veil + glow)], 4 * at);
  }
  pen.putImageData(pixels, 0, 0);
  const scale = Math.min(1, 900 / Math.max(picture.width, picture.height));
  canvas.width = Math.max(1, Math.round(picture.width * scale));
  canvas.height = Math.max(1, Math.round(picture.height * scale));
  const brush = canvas.getContext("2d");
  brush.fillStyle = "rgba(0, 0, 0, .68)";
  // Told in shares of the picture; what lies beyond 0 and 1 is padding, and not on the canvas.
  const [x, y] = [canvas.width, canvas.height];
  const [l, t, r, b] = [seen.shown[0] * x, seen.shown[1] * y, seen.shown[2] * x, seen.shown[3] * y];
  brush.fillRect(0, 0, canvas.width, canvas.height);
  brush.clearRect(l, t, r - l, b - t);
  brush.imageSmoothingQuality = "high";
  brush.drawImage(small, l, t, r - l, b - t);
}

// The middle of a cell, in shares of the picture.
function middle(seen, at) {
  const [[height, width], [l, t, r, b]] = [seen.grid, seen.shown];
  return [l + (r - l) * ((at % width) + 0.5) / width, t + (b - t) * (Math.floor(at / width) + 0.5) / height];
}
const beside = ([x, y]) => x < 0 || x > 1 || y < 0 || y > 1;

const PARTS = { whole: "the whole picture", tiles: "its parts, larger" };
const SHARES = { image: "pictures", first: "first position (where heads rest)", text: "question",
  answer: "answer so far", nowhere: "nowhere" };
const share = (value) => `${(100 * value).toFixed(value < 0.0995 ? 1 : 0)} %`;

function viewOf(seen, at, found, pictures) {
  const picture = pictures[Math.min(seen.image ?? at, pictures.length - 1)];
  const canvas = make("canvas", { "aria-hidden": "true" });
  const small = Math.max(picture.width, picture.height) <= 128;
  // Where nobody knows how the model's grid lies on the picture, the grid is drawn without it.
  const placed = seen.placed !== false;
  const words = !placed ? "where its grid lies on the picture is not known" : PARTS[seen.part] ?? null;
  const frame = make("div", { class: "looked" },
    make("img", {
      src: picture.url, alt: picture.name, width: picture.width, height: picture.height, class: small ? "pixel" : null,
    }), canvas);
  // As high as there is room for, and the shape of the picture.
  const high = found.images.length > 1 ? 13 : 20;
  const figure = make("figure", {}, frame, words && make("figcaption", { class: "soft" }, words));
  figure.style.width = `min(100%, ${Math.max(6, high * picture.width / picture.height)}rem)`;
  frame.classList.toggle("nowhere", !placed);
  return { seen: placed ? seen : { ...seen, shown: [0, 0, 1, 1] }, picture, canvas, figure,
    number: (seen.image ?? at) + 1 };
}

// found: what the server told; pictures: [{url, name, width, height}] in the order they were sent.
export function looking(found, pictures) {
  if (!found.words.length || !found.images.length) {
    return make("div", { class: "inside" }, make("p", {},
      "There is nothing to show: no word, or no picture that the model has a grid of."));
  }
  const views = found.images.map((seen, at) => viewOf(seen, at, found, pictures));
  const several = new Set(views.map((view) => view.number)).size > 1;
  // The words of the answer and, where the server tells them, of the question: these look at what they name.
  const said = { words: found.words, weights: found.weights, shares: found.shares?.values };
  const asked = found.asked?.words?.length ? found.asked : null;
  let of = said;
  let word = -1;
  let layer = 0; // 0: the mean over layers
  const told = make("p", { "aria-live": "polite" });
  const rest = make("p", { class: "soft" });
  const over = (layers) =>
    (layer ? layers[layer - 1] : layers[0].map((_, at) =>
      layers.reduce((sum, one) => sum + one[at], 0) / layers.length));
  const draw = () => {
    const all = views.map((_, image) => over(of.weights[image][word]));
    const most = all.reduce((high, values) => values.reduce((a, b) => Math.max(a, b), high), 0);
    views.forEach((view, at) => paint(view.canvas, view.picture, view.seen, all[at], most));
    const image = Math.max(0, all.findIndex((values) => values.includes(most)));
    const strongest = middle(views[image].seen, all[image].indexOf(most));
    const third = (place) => Math.min(2, Math.max(0, Math.floor(3 * place)));
    const name = WHERE[third(strongest[1])][third(strongest[0])];
    const place = beside(strongest) ? "in the padding around it" : name === "middle" ? "in the middle" : `at the ${name}`;
    const padding = all.reduce((sum, values, one) => sum + values.reduce((part, value, cell) =>
      part + (beside(middle(views[one].seen, cell)) ? value : 0), 0), 0);
    const names = found.shares?.names ?? ["image"];
    const shares = of.shares
      ? over(of.shares[word])
      : [all.flat().reduce((sum, value) => sum + value, 0)];
    const around = padding >= 0.0005 ? ` and ${share(padding)} on the padding around ${several ? "them" : "it"}` : "";
    const named = of.words[word].text.trim();
    told.textContent = `For \u201c${named}\u201d ${share(Math.max(0, shares[0] - padding))} of its attention lay on ` +
      `${several ? "the pictures" : "the picture"}${around}` + (most > 0 ? `, strongest ${place}` +
      `${several ? ` of picture ${views[image].number}` : ""}.` : ".");
    rest.textContent = names.slice(1).map((name, one) => [SHARES[name] ?? name, shares[one + 1]])
      .filter(([, value]) => value >= 0.0005)
      .map(([name, value]) => `${name} ${share(value)}`).join(" \u00b7 ");
  };
  const lineOf = (source, label) => strip(
    source.words.map(({ text }) => ({ text: text.trim(), name: text.trim() || "space", gap: true })), label,
    (at) => { if (at !== word || of !== source) { [of, word] = [source, at]; draw(); } });
  const questions = asked && lineOf(asked, "Words of the question");
  const line = lineOf(said, "Words of the answer");
  const number = make("output", {}, "mean of all");
  const slider = make("input", { type: "range", min: 0, max: found.layers, step: 1, value: 0, "aria-label": "Layer",
    "aria-valuetext": "mean of all",
    oninput: () => {
      layer = Number(slider.value);
      number.textContent = layer ? `${layer} of ${found.layers}` : "mean of all";
      slider.setAttribute("aria-valuetext", number.textContent);
      draw();
    } });
  line.choose(Math.max(0, found.words.findIndex(({ text }) => text.trim().length > 2)));
  const notes = [...(found.notes ?? [])];
  if (found.unread) notes.push(`The last ${found.unread} tokens of the answer were not read.`);
  return make("div", { class: "inside" },
    make("h3", {}, "Where it looked"),
    make("p", { class: "soft" },
      "Point at a word: bright is where the model's attention went when it chose that word" +
      (asked ? ", or read it in the question. A question's words often look at what they name, an answer's less." : ".")),
    ...(questions ? [make("p", { class: "soft" }, "Question"), questions.box,
      make("p", { class: "soft" }, "Answer")] : []),
    line.box, make("div", { class: "views" }, views.map((view) => view.figure)), told, rest,
    make("label", { class: "layer" }, make("span", {}, "Layer "), slider, number),
    notes.map((text) => make("p", { class: "soft" }, text)));
}

// The server's look also tells what else each token might have been: for answers that came without probabilities.
export const toldOf = (found) => (found.alternatives ?? []).map(({ token, probability, top }) =>
  [token, Math.log(Math.max(probability, 1e-9)), top.map(([text, other]) => [text, Math.log(Math.max(other, 1e-9))])]);

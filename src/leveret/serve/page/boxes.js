// Boxes that a model names, [left, top, right, bottom] as shares of the picture, drawn on the picture.

import { make } from "./dom.js";

const NUMBER = "\\s*([01]|[01]?\\.\\d{1,6})\\s*";
const BOX = new RegExp(`\\[${[NUMBER, NUMBER, NUMBER, NUMBER].join(",")}\\]`, "g");

export const boxesIn = (text) =>
  [...text.slice(0, 20_000).matchAll(BOX)].map((found) => found.slice(1).map(Number))
    .filter(([left, top, right, bottom]) => left < right && top < bottom && right <= 1 && bottom <= 1).slice(0, 50);

function drawing(tag, parts, ...inside) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(parts)) made.setAttribute(name, value);
  made.append(...inside);
  return made;
}

export function boxed(boxes, picture) {
  const small = Math.max(picture.width, picture.height) <= 128;
  const shapes = boxes.flatMap(([left, top, right, bottom]) => ["halo", "edge"].map((part) =>
    drawing("rect", { class: part, x: left, y: top, width: right - left, height: bottom - top })));
  const figure = make("figure", {}, make("div", { class: "looked" },
    make("img", { src: picture.url, alt: picture.name, class: small ? "pixel" : null }),
    drawing("svg", { class: "boxes", viewBox: "0 0 1 1", preserveAspectRatio: "none", "aria-hidden": "true" }, ...shapes)));
  figure.style.width = `min(100%, ${Math.max(6, 20 * picture.width / picture.height)}rem)`;
  return make("div", { class: "inside" },
    make("h3", {}, boxes.length > 1 ? `The ${boxes.length} boxes it named` : "The box it named"),
    make("p", { class: "soft" }, "Taken as shares of the picture's width and height. A model that was taught on padded pictures means the square around it."),
    make("div", { class: "views" }, figure));
}

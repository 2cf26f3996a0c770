// The API as the server describes it (/openapi.json), for reading: paths, fields with their limits, a line to try each.

import { $, copy, icon, make } from "./dom.js";
import * as words from "./words.js";

const VERBS = ["get", "post", "put", "patch", "delete"];
const DEEPEST = 8;
let whole = {};

function resolved(schema) {
  for (let steps = 0; schema?.$ref && steps < 20; steps += 1) {
    schema = schema.$ref.replace(/^#\//, "").split("/").reduce((at, key) => at?.[key.replace(/~1/g, "/").replace(/~0/g, "~")], whole);
  }
  return schema ?? {};
}

const named = (schema) => schema?.$ref?.split("/").at(-1) ?? schema?.title ?? null;
const choices = (schema) => schema.anyOf ?? schema.oneOf ?? null;

// A schema's kind in words: "array of Message", "string or null", "one of \"a\", \"b\"".
function kind(schema, depth = 0) {
  const one = resolved(schema);
  if (one.const !== undefined) return JSON.stringify(one.const);
  if (one.enum) return `one of ${one.enum.map((value) => JSON.stringify(value)).join(", ")}`;
  if (depth > 3) return named(schema) ?? "value";
  if (choices(one)) return [...new Set(choices(one).map((part) => kind(part, depth + 1)))].join(" or ");
  if (one.allOf) return one.allOf.map((part) => kind(part, depth + 1)).join(" and ");
  const type = Array.isArray(one.type) ? one.type.join(" or ") : one.type;
  if (type === "array") return `array of ${kind(one.items ?? {}, depth + 1)}`;
  if (type === "object" || one.properties) return named(schema) ?? "object";
  return type ?? "anything";
}

function limits(schema) {
  const one = resolved(schema);
  const told = [];
  const add = (key, say) => { if (one[key] !== undefined) told.push(say(one[key])); };
  add("minimum", (value) => `at least ${value}`);
  add("exclusiveMinimum", (value) => `above ${value}`);
  add("maximum", (value) => `at most ${value}`);
  add("exclusiveMaximum", (value) => `below ${value}`);
  add("minLength", (value) => `at least ${value} characters`);
  add("maxLength", (value) => `at most ${value} characters`);
  add("minItems", (value) => `at least ${value}`);
  add("maxItems", (value) => `at most ${value}`);
  add("pattern", (value) => `like ${value}`);
  add("default", (value) => `default ${JSON.stringify(value)}`);
  for (const part of choices(one) ?? []) if (!part.$ref) told.push(...limits(part));
  return [...new Set(told)];
}

function described(text) {
  const box = make("div", { class: "words" });
  words.show(box, text);
  return box;
}

// Schemas of objects inside one: itself, what it is an array of, what it may be.
function objects(schema, depth = 0) {
  const one = resolved(schema);
  if (depth > 4) return [];
  if (one.properties) return [schema];
  return [...(one.items ? [one.items] : []), ...(choices(one) ?? []), ...(one.allOf ?? [])].flatMap((part) => objects(part, depth + 1));
}

// An object's fields; what stands in them folds open, made when it is (a schema may hold itself).
function fields(schema, depth = 0) {
  const one = resolved(schema);
  const must = new Set(one.required ?? []);
  return make("dl", { class: "fields" }, Object.entries(one.properties ?? {}).map(([name, inner]) => {
    const below = depth < DEEPEST ? objects(inner) : [];
    const told = resolved(inner).description ?? inner.description;
    return make("div", {},
      make("dt", {}, make("code", {}, name), make("span", { class: "kind" }, [kind(inner), ...limits(inner)].join(", ")),
        must.has(name) && make("span", { class: "must" }, "required")),
      make("dd", {}, told && described(told), below.map((part) => folded(part, depth))));
  }));
}

function folded(schema, depth) {
  const box = make("details", {}, make("summary", {}, `Fields of ${named(schema) ?? "each"}`));
  box.addEventListener("toggle", () => { if (box.childElementCount === 1) box.append(fields(schema, depth + 1)); });
  return box;
}

function example(schema, depth = 0) {
  const one = resolved(schema);
  if (one.example !== undefined) return one.example;
  if (Array.isArray(one.examples) && one.examples.length) return one.examples[0];
  if (one.default !== undefined && one.default !== null) return one.default;
  if (one.const !== undefined) return one.const;
  if (one.enum) return one.enum[one.enum.length > 1 && one.enum[0] === "system" ? 1 : 0];
  if (depth > 5) return null;
  if (choices(one)) return example(choices(one)[0], depth + 1);
  if (one.properties) {
    return Object.fromEntries((one.required ?? []).map((name) => [name, example(one.properties[name] ?? {}, depth + 1)]));
  }
  const type = Array.isArray(one.type) ? one.type[0] : one.type;
  if (type === "array") return [example(one.items ?? {}, depth + 1)];
  return { string: "Hello", integer: one.minimum ?? 1, number: one.minimum ?? 1, boolean: false, object: {} }[type] ?? null;
}

function command(verb, path, schema) {
  const parts = [`curl ${new URL(path.replace(/^\//, ""), document.baseURI)}`];
  if (verb !== "get") parts[0] += ` -X ${verb.toUpperCase()}`;
  if (schema) {
    // A quote inside single quotes ends them: it is written apart.
    const body = JSON.stringify(example(schema)).replaceAll("'", "'\\''");
    parts.push("-H 'Content-Type: application/json'", `-d '${body}'`);
  }
  const text = parts.join(" \\\n  ");
  const button = make("button", { type: "button", class: "tool", "aria-label": "Copy the command", title: "Copy the command",
    onclick: () => copy(text, button) }, icon("copy"));
  return make("figure", { class: "code" }, make("figcaption", {}, make("span", {}, "shell"), button),
    make("pre", { tabIndex: 0 }, make("code", {}, text)));
}

function operation(verb, path, about, id) {
  const parameters = (about.parameters ?? []).map(resolved);
  const content = resolved(about.requestBody).content ?? {};
  const schema = (content["application/json"] ?? Object.values(content)[0])?.schema;
  const answers = Object.entries(about.responses ?? {}).map(([status, answer]) => {
    const one = resolved(answer);
    const inner = Object.values(one.content ?? {})[0]?.schema;
    return make("div", {}, make("dt", {}, make("span", { class: "status" }, status), make("span", { class: "kind" }, one.description ?? "")),
      make("dd", {}, inner ? objects(inner).map((part) => folded(part, 0)) : []));
  });
  return make("section", { id },
    make("h2", {}, make("span", { class: "verb" }, verb.toUpperCase()), make("span", { class: "path" }, path)),
    make("p", {}, about.summary ?? ""),
    about.description && about.description !== about.summary && described(about.description),
    parameters.length > 0 && [make("h3", {}, "Parameters"), make("dl", { class: "fields" }, parameters.map((one) =>
      make("div", {}, make("dt", {}, make("code", {}, one.name), make("span", { class: "kind" },
        [`in the ${one.in}`, kind(one.schema ?? {}), ...limits(one.schema ?? {})].join(", ")), one.required && make("span", { class: "must" }, "required")),
      make("dd", {}, one.description && described(one.description)))))],
    schema && [make("h3", {}, "What is sent"), resolved(schema).properties ? fields(schema) : make("p", { class: "kind" }, kind(schema))],
    answers.length > 0 && [make("h3", {}, "What comes back"), make("dl", { class: "fields" }, answers)],
    make("h3", {}, "Try it"), command(verb, path, schema));
}

async function draw() {
  const response = await fetch(new URL("openapi.json", document.baseURI), { cache: "no-store" });
  if (!response.ok) throw new Error(`The server answered ${response.status}.`);
  whole = await response.json();
  const all = Object.entries(whole.paths ?? {}).flatMap(([path, verbs]) =>
    VERBS.filter((verb) => verbs[verb]).map((verb) => ({ verb, path, about: verbs[verb] })));
  all.forEach((one) => { one.id = `${one.verb}${one.path.replace(/[^A-Za-z0-9]+/g, "-")}`.replace(/-$/, ""); });
  $("api").replaceChildren(
    make("h1", {}, "The API", make("small", {}, `${whole.info?.title ?? ""} ${whole.info?.version ?? ""}`)),
    ...(whole.info?.description ? [described(whole.info.description)] : []),
    make("nav", { "aria-label": "Contents" }, make("ul", { class: "contents" }, all.map(({ verb, path, about, id }) =>
      make("li", {}, make("a", { href: `#${id}` }, make("span", { class: "verb" }, verb.toUpperCase()),
        make("span", { class: "path" }, path), make("span", { class: "soft" }, about.summary ?? "")))))),
    ...all.map(({ verb, path, about, id }) => operation(verb, path, about, id)));
  if (location.hash) document.getElementById(location.hash.slice(1))?.scrollIntoView();
}

try {
  await draw();
} catch (error) {
  $("api").replaceChildren(make("h1", {}, "The API"), make("p", { class: "bad" }, `The description could not be read. ${error.message}`));
}
document.documentElement.dataset.ready = "yes";

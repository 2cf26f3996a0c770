// Filters, search and paging over the cards that stand in the page. Without it all cards are simply there.
(() => {
  "use strict";
  const PAGE = 24;
  for (const box of document.querySelectorAll(".browse")) {
    const cards = [...box.querySelectorAll("li")];
    const words = cards.map((card) => card.textContent.toLowerCase());
    const make = (tag, parts, ...inside) => {
      const made = Object.assign(document.createElement(tag), parts);
      made.append(...inside);
      return made;
    };
    const choose = (name, options) =>
      make("select", { name }, ...options.map(([value, text]) => make("option", { value }, text)));
    const labelled = (text, control) => make("label", {}, make("span", {}, text), control);
    const tasks = [...new Set(cards.map((card) => card.dataset.task))];
    const kinds = JSON.parse(box.dataset.kinds);
    const task = choose("task", [["", "all tasks"], ...tasks.map((name) => [name, name])]);
    const show = choose("show", [["", "all answers"], ...Object.entries(kinds)]);
    const find = make("input", { name: "find", type: "search", placeholder: "words in question or answer" });
    const back = make("button", { type: "button", name: "back" }, "Back");
    const next = make("button", { type: "button", name: "next" }, "Next");
    const told = make("span", { className: "told" });
    told.setAttribute("role", "status");
    const bar = make("div", { className: "controls" });
    bar.setAttribute("role", "search");
    bar.append(labelled("Task", task), labelled("Answers", show), labelled("Search", find),
      make("div", { className: "pager" }, back, told, next));
    box.prepend(bar);
    let page = 0;

    const draw = () => {
      const wanted = find.value.toLowerCase().split(/\s+/).filter(Boolean);
      const left = cards.filter((card, at) =>
        (!task.value || card.dataset.task === task.value) &&
        (!show.value || card.dataset.kinds.split(" ").includes(show.value)) &&
        wanted.every((word) => words[at].includes(word)));
      const pages = Math.max(1, Math.ceil(left.length / PAGE));
      page = Math.min(Math.max(page, 0), pages - 1);
      const seen = new Set(left.slice(page * PAGE, (page + 1) * PAGE));
      for (const card of cards) card.hidden = !seen.has(card);
      const first = page * PAGE + 1;
      told.textContent = left.length
        ? `${first} to ${first + seen.size - 1} of ${left.length}` : "no answer fits";
      back.disabled = page === 0;
      next.disabled = page === pages - 1;
    };
    const remember = () => {
      const state = new URLSearchParams();
      for (const control of [task, show, find]) if (control.value) state.set(control.name, control.value);
      if (page) state.set("page", page + 1);
      const hash = `#${box.id}?${state}`;
      try { history.replaceState(null, "", hash); } catch { /* a viewer without history keeps no state */ }
    };
    const recall = () => {
      const [name, query] = location.hash.slice(1).split("?");
      if (name !== box.id || query === undefined) return;
      const state = new URLSearchParams(query);
      for (const control of [task, show, find]) control.value = state.get(control.name) ?? "";
      page = (Number(state.get("page")) || 1) - 1;
    };
    const turn = (by) => { page += by; draw(); remember(); };
    for (const control of [task, show, find]) {
      control.addEventListener("input", () => { page = 0; draw(); remember(); });
    }
    back.addEventListener("click", () => turn(-1));
    next.addEventListener("click", () => turn(1));
    addEventListener("hashchange", () => { recall(); draw(); });
    recall();
    draw();
  }
})();

// Draws a chosen word's attention over the picture. Without it the words, bars and tables are there, the heat is not.
(() => {
  "use strict";
  const RAMP = [[20, 11, 53], [99, 21, 110], [181, 47, 90], [236, 105, 37], [251, 180, 26], [252, 255, 164]];
  const LONG = 560;
  const make = (tag, parts, ...inside) => {
    const made = Object.assign(document.createElement(tag), parts);
    made.append(...inside);
    return made;
  };
  const percent = (value) => `${(100 * value).toFixed(value < 0.0995 ? 2 : 1)} %`;
  const unpack = (text) => {
    const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    const view = new DataView(bytes.buffer);
    return Float64Array.from({ length: bytes.length / 2 }, (_, at) => view.getUint16(2 * at, true) / 65535);
  };
  const colour = (share) => {
    const at = Math.min(0.9999, Math.max(0, share)) * (RAMP.length - 1);
    const low = Math.floor(at);
    return RAMP[low].map((from, part) => Math.round(from + (RAMP[low + 1][part] - from) * (at - low)));
  };

  for (const box of document.querySelectorAll(".look")) {
    const facts = JSON.parse(box.dataset.look);
    const told = box.querySelector(".told");
    const buttons = [...box.querySelectorAll("button.word")];
    if (!buttons.length) continue;
    const state = { kind: "said", word: 0, layer: 0, alone: true, canvas: 0, cell: null };

    const stages = [...box.querySelectorAll(".stage")].map((figure) => {
      const canvas = facts.canvases[Number(figure.dataset.canvas)];
      const image = figure.querySelector("img");
      const [left, top, right, bottom] = canvas.shown;
      const frame = [Math.min(0, left), Math.min(0, top), Math.max(1, right), Math.max(1, bottom)];
      const wide = (frame[2] - frame[0]) * image.width;
      const high = (frame[3] - frame[1]) * image.height;
      const scale = LONG / Math.max(wide, high);
      const size = { width: Math.max(1, Math.round(wide * scale)), height: Math.max(1, Math.round(high * scale)) };
      const plain = make("canvas", { ...size });
      const heat = make("canvas", { ...size, tabIndex: 0 });
      plain.setAttribute("aria-hidden", "true");
      heat.setAttribute("role", "img");
      image.loading = "eager";
      image.hidden = true;
      figure.prepend(make("div", { className: "panels" }, plain, heat));
      return {
        canvas, image, frame, plain, heat, number: Number(figure.dataset.canvas),
        said: unpack(canvas.said), asked: unpack(canvas.asked), cells: canvas.grid[0] * canvas.grid[1],
      };
    });

    /** The weights of the chosen word and layer on one canvas; layer 0 is the mean of all. */
    const values = (stage) => {
      const found = new Float64Array(stage.cells);
      const layers = state.layer ? [state.layer - 1] : [...Array(facts.layers).keys()];
      for (const layer of layers) {
        const from = (state.word * facts.layers + layer) * stage.cells;
        for (let cell = 0; cell < stage.cells; cell += 1) {
          found[cell] += stage[state.kind][from + cell] * stage.canvas.top / layers.length;
        }
      }
      return found;
    };
    const fallen = () => {
      const each = facts.image[state.kind][state.word] ?? [];
      return state.layer ? each[state.layer - 1] : each.reduce((sum, one) => sum + one, 0) / (each.length || 1);
    };
    /** Where a cell lies on a stage's canvas, in its pixels. */
    const place = (stage, cell) => {
      const [rows, columns] = stage.canvas.grid;
      const [left, top, right, bottom] = stage.canvas.shown;
      const [x0, y0, x1, y1] = stage.frame;
      const across = stage.heat.width / (x1 - x0), down = stage.heat.height / (y1 - y0);
      const wide = (right - left) / columns, high = (bottom - top) / rows;
      const column = cell % columns, row = Math.floor(cell / columns);
      return [(left + column * wide - x0) * across, (top + row * high - y0) * down, wide * across, high * down];
    };
    const picture = (stage, element, filter) => {
      const pen = element.getContext("2d");
      const [x0, y0, x1, y1] = stage.frame;
      pen.clearRect(0, 0, element.width, element.height);
      if (filter !== "none") { // heat is seen through: on nothing it would glow more than on the picture
        pen.fillStyle = "#1c1c1c";
        pen.fillRect(0, 0, element.width, element.height);
      }
      pen.imageSmoothingEnabled = Math.max(stage.image.width, stage.image.height) > 128;
      pen.filter = filter;
      const across = element.width / (x1 - x0), down = element.height / (y1 - y0);
      pen.drawImage(stage.image, -x0 * across, -y0 * down, across, down);
      pen.filter = "none";
      return pen;
    };
    const outline = (stage, element) => {
      if (state.cell === null || stage !== stages[state.canvas]) return;
      const pen = element.getContext("2d");
      const [x, y, wide, high] = place(stage, state.cell);
      for (const [ink, width] of [["#000", 4], ["#fff", 2]]) {
        Object.assign(pen, { strokeStyle: ink, lineWidth: width });
        pen.strokeRect(x, y, wide, high);
      }
    };

    const draw = () => {
      const laid = stages.map(values);
      const own = Math.max(1e-12, ...laid.map((found) => found.reduce((most, one) => Math.max(most, one), 0)));
      const most = state.alone ? own : Math.max(1e-12, ...stages.map((stage) => stage.canvas.top));
      stages.forEach((stage, number) => {
        picture(stage, stage.plain, "none");
        const pen = picture(stage, stage.heat, "grayscale(1) brightness(0.6)");
        laid[number].forEach((value, cell) => {
          const share = value / most;
          pen.fillStyle = `rgba(${colour(share).join(",")},${0.4 + 0.45 * share})`;
          pen.fillRect(...place(stage, cell));
        });
        outline(stage, stage.plain);
        outline(stage, stage.heat);
        const word = facts.words[state.kind][state.word];
        stage.heat.setAttribute("aria-label", `Attention of “${word}” on the picture; arrow keys choose a cell`);
      });
      for (const button of buttons) {
        const chosen = button.dataset.kind === state.kind && Number(button.dataset.word) === state.word;
        button.setAttribute("aria-pressed", String(chosen));
        button.tabIndex = chosen ? 0 : -1;
      }
      say(laid);
    };
    const say = (laid) => {
      const word = facts.words[state.kind][state.word], all = fallen();
      const padded = stages.some(({ canvas: { shown: [l, t, r, b] } }) => l < -1e-6 || t < -1e-6 || r > 1 + 1e-6 || b > 1 + 1e-6);
      const on = !stages.length ? "pictures" : padded ? "the picture and the padding around it" : "the picture";
      const parts = [`“${word}”, ${layerName()}: ${percent(all)} of its attention fell on ${on}.`];
      if (state.cell !== null && stages.length) {
        const stage = stages[state.canvas], value = laid[state.canvas][state.cell];
        const [row, column] = [Math.floor(state.cell / stage.canvas.grid[1]), state.cell % stage.canvas.grid[1]];
        parts.push(`Row ${row + 1}, column ${column + 1}: ${percent(value)} of all, ${percent(all ? value / all : 0)} of that.`);
        const near = stage.canvas.near[state.cell];
        if (near) parts.push(`Nearest words: ${near.map(([text, cosine, usual]) => `${text} ${cosine.toFixed(2)} (usually ${usual.toFixed(2)})`).join(", ")}.`);
      }
      told.textContent = parts.join(" ");
    };
    const layerName = () => (state.layer ? `layer ${state.layer} of ${facts.layers}` : "mean of all layers");

    // --- controls
    const slider = make("input", { type: "range", name: "layer", min: 0, max: facts.layers, value: 0 });
    const shown = make("output", {}, layerName());
    const alone = make("input", { type: "checkbox", name: "alone", checked: true });
    box.querySelector(".controls").append(
      make("label", {}, make("span", {}, "Layer: ", shown), slider),
      make("label", { className: "tick" }, alone, make("span", {}, "Only what fell on the picture: the word's brightest cell is brightest")));
    slider.addEventListener("input", () => {
      state.layer = Number(slider.value);
      shown.textContent = layerName();
      slider.setAttribute("aria-valuetext", layerName());
      draw();
    });
    alone.addEventListener("input", () => { state.alone = alone.checked; draw(); });

    const choose = (button) => {
      Object.assign(state, { kind: button.dataset.kind, word: Number(button.dataset.word) });
      draw();
    };
    buttons.forEach((button, at) => {
      button.addEventListener("click", () => choose(button));
      button.addEventListener("keydown", (event) => {
        const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
        const next = buttons[at + by];
        if (!next) return;
        event.preventDefault();
        next.focus();
        choose(next);
      });
    });
    stages.forEach((stage, number) => {
      const [rows, columns] = stage.canvas.grid;
      const pick = (cell) => { Object.assign(state, { canvas: number, cell }); draw(); };
      const point = (event) => {
        const area = event.target.getBoundingClientRect();
        const [x0, y0, x1, y1] = stage.frame, [left, top, right, bottom] = stage.canvas.shown;
        const x = x0 + (x1 - x0) * (event.clientX - area.left) / area.width;
        const y = y0 + (y1 - y0) * (event.clientY - area.top) / area.height;
        const column = Math.floor((x - left) / (right - left) * columns);
        const row = Math.floor((y - top) / (bottom - top) * rows);
        if (column < 0 || row < 0 || column >= columns || row >= rows) return;
        if (state.canvas !== number || state.cell !== row * columns + column) pick(row * columns + column);
      };
      for (const element of [stage.plain, stage.heat]) {
        element.addEventListener("pointermove", point);
        element.addEventListener("pointerdown", point);
      }
      stage.heat.addEventListener("keydown", (event) => {
        const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
        if (!step) return;
        event.preventDefault();
        const cell = state.canvas === number && state.cell !== null ? state.cell : 0;
        const row = Math.min(rows - 1, Math.max(0, Math.floor(cell / columns) + (state.cell === null ? 0 : step[0])));
        const column = Math.min(columns - 1, Math.max(0, cell % columns + (state.cell === null ? 0 : step[1])));
        pick(row * columns + column);
      });
    });

    if (!facts.words.said.length) state.kind = "asked";
    Promise.allSettled(stages.map((stage) => stage.image.decode())).then(draw);
  }
})();

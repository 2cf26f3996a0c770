// Light or dark before the first paint: what the reader chose earlier, else what the system says.
(() => {
  "use strict";
  try {
    const chosen = JSON.parse(localStorage.getItem("leveret.settings") ?? "{}").theme;
    if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
  } catch { /* no storage here: the system decides */ }
})();

// A conversation as a file: the branch that is shown, in the form the API reads, pictures included.

import { download } from "./dom.js";
import { settings } from "./settings.js";
import { written } from "./thread.js";

export async function save(thread, uri) {
  const path = thread.path();
  const messages = [];
  for (const turn of path) {
    const [made] = await written([turn], "", uri, true);
    if (made) messages.push({ ...made, at: new Date(turn.at).toISOString(), ...(turn.stats ? { stats: turn.stats } : {}) });
  }
  const { title, created } = thread.conversation;
  const { system, temperature, top_p, max_tokens, seed } = settings;
  const whole = {
    format: "leveret conversation", version: 1, title, created: new Date(created).toISOString(), model: path.at(-1)?.model ?? "",
    settings: { system, temperature, top_p, max_tokens, seed }, messages,
  };
  const name = title.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-+|-+$/g, "").slice(0, 60) || "conversation";
  download(`${name}.json`, new Blob([JSON.stringify(whole, null, 2)], { type: "application/json" }));
}

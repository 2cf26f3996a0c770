// A conversation as a tree of messages: which branch is shown, what stands beside a message, what the server is sent.

export const ROOT = "root";

export class Thread {
  // conversation: {id, title, picked: {parent id: child id}, ...}; messages: its rows in any order
  constructor(conversation, messages) {
    this.conversation = conversation;
    this.messages = new Map(messages.map((row) => [row.id, row]));
  }

  children(parent) {
    const found = [...this.messages.values()].filter((row) => (row.parent ?? ROOT) === parent);
    return found.sort((a, b) => a.at - b.at || (a.id < b.id ? -1 : 1));
  }

  // Messages with the same parent, oldest first: the versions of one turn.
  versions(message) {
    return this.children(message.parent ?? ROOT);
  }

  // The branch that is shown: at every fork what was picked, else the newest.
  path() {
    const path = [];
    for (let parent = ROOT; path.length <= this.messages.size;) {
      const below = this.children(parent);
      if (!below.length) break;
      const next = below.find((row) => row.id === this.conversation.picked[parent]) ?? below.at(-1);
      path.push(next);
      parent = next.id;
    }
    return path;
  }

  // The turns up to and with a message, first to last.
  upTo(message) {
    const path = [];
    for (let row = message; row && path.length <= this.messages.size; row = this.messages.get(row.parent)) path.unshift(row);
    return path;
  }
}

// Turns in the form the server reads. `uri` gives a picture's data URI; answers that never came are left out, and what
// was said before and after them becomes one turn, since roles have to alternate.
export async function written(turns, system, uri, vision) {
  const messages = system.trim() ? [{ role: "system", content: system.trim() }] : [];
  for (const turn of turns) {
    if (turn.role === "assistant") {
      if (turn.text) messages.push({ role: "assistant", content: turn.text });
      continue;
    }
    const parts = [];
    for (const id of vision ? turn.pictures : []) parts.push({ type: "image_url", image_url: { url: await uri(id) } });
    parts.push({ type: "text", text: turn.text });
    const last = messages.at(-1);
    if (last?.role === "user") last.content.push(...parts);
    else messages.push({ role: "user", content: parts });
  }
  for (const message of messages) {
    if (message.role !== "user" || message.content.some((part) => part.type !== "text")) continue;
    message.content = message.content.map((part) => part.text).join("\n\n");
  }
  return messages;
}

export function titled(text, pictures) {
  const line = text.trim().split("\n")[0];
  if (!line) return pictures.length ? pictures[0].name || "A picture" : "New conversation";
  return line.length > 60 ? `${line.slice(0, 59).trimEnd()}\u2026` : line;
}

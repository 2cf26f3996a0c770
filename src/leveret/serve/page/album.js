// The pictures of conversations that were opened: read once from what is kept, shown, sent, and shown large.

import { $, make, tool } from "./dom.js";
import { dataUri } from "./pictures.js";
import * as store from "./store.js";

const open = new Map(); // picture id -> promise of {id, url, blob, name, width, height}, or of null where it is gone

export function picture(id) {
  if (!open.has(id)) {
    open.set(id, store.picture(id).then((row) => {
      if (!row) open.delete(id);
      return row ? { ...row, url: URL.createObjectURL(row.blob) } : null;
    }));
  }
  return open.get(id);
}

// A picture that was just added need not be read again.
export const keepOpen = (found) => open.set(found.id, Promise.resolve(found));

export async function uri(id) {
  const found = await picture(id);
  if (!found) throw new Error("A picture of this conversation is no longer kept in this browser. Edit the message and add it again.");
  return dataUri(found.blob);
}

export function enlarge(found) {
  const dialog = $("big");
  const small = Math.max(found.width, found.height) <= 128;
  dialog.replaceChildren(make("img", { src: found.url, alt: found.name, class: small ? "pixel" : null }),
    make("p", {}, make("span", {}, `${found.name} \u00b7 ${found.width} \u00d7 ${found.height}`), tool("close", "Close", () => dialog.close())));
  dialog.showModal();
}

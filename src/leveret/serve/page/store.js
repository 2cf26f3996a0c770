// What is kept, and where: conversations, messages and pictures in this browser's IndexedDB, nowhere else.
//
// A message is a row of its own and names its parent, so that a conversation is a tree: asking again or editing adds a
// branch and takes nothing away, and two tabs that write to one conversation never overwrite each other. Other tabs
// hear of every change by a channel. Where the browser keeps nothing (some private windows) all lies in memory.

const STORES = ["conversations", "messages", "pictures"];
const channel = "BroadcastChannel" in self ? new BroadcastChannel("leveret") : null;
let base = null;
const memory = Object.fromEntries(STORES.map((name) => [name, new Map()]));

const wait = (request) => new Promise((yes, no) => {
  request.onsuccess = () => yes(request.result);
  request.onerror = () => no(request.error);
});

// Opens what is kept. False: nothing outlives this page.
export async function open() {
  try {
    const request = indexedDB.open("leveret", 1);
    request.onupgradeneeded = () => {
      for (const name of STORES) {
        const made = request.result.createObjectStore(name, { keyPath: "id" });
        if (name !== "conversations") made.createIndex("conversation", "conversation");
      }
    };
    base = await wait(request);
    base.onversionchange = () => base.close();
  } catch {
    base = null;
  }
  return base !== null;
}

// Runs `work` over stores that look alike, in the database or in memory; all of it is written or nothing is.
async function within(mode, work) {
  if (base === null) {
    return work(Object.fromEntries(STORES.map((name) => [name, {
      get: async (id) => memory[name].get(id),
      put: async (row) => void memory[name].set(row.id, row),
      delete: async (id) => void memory[name].delete(id),
      all: async () => [...memory[name].values()],
      of: async (conversation) => [...memory[name].values()].filter((row) => row.conversation === conversation),
    }])));
  }
  const transaction = base.transaction(STORES, mode);
  const finished = new Promise((yes, no) => {
    transaction.oncomplete = yes;
    transaction.onerror = transaction.onabort = () => no(transaction.error);
  });
  finished.catch(() => {});
  const result = await work(Object.fromEntries(STORES.map((name) => {
    const store = transaction.objectStore(name);
    return [name, {
      get: (id) => wait(store.get(id)),
      put: (row) => wait(store.put(row)),
      delete: (id) => wait(store.delete(id)),
      all: () => wait(store.getAll()),
      of: (conversation) => wait(store.index("conversation").getAll(conversation)),
    }];
  })));
  await finished;
  return result;
}

const tell = (conversation) => channel?.postMessage({ conversation });
// Calls back with the id of a conversation that another tab changed.
export const watch = (changed) => channel?.addEventListener("message", (event) => changed(event.data.conversation));

export async function conversations() {
  const all = await within("readonly", (on) => on.conversations.all());
  return all.sort((a, b) => b.updated - a.updated);
}

export const conversation = (id) => within("readonly", (on) => on.conversations.get(id));
export const messages = (id) => within("readonly", (on) => on.messages.of(id));
export const picture = (id) => within("readonly", (on) => on.pictures.get(id));

export async function create(row) {
  await within("readwrite", (on) => on.conversations.put(row));
  tell(row.id);
}

// Reads, changes and writes one conversation in one go; what another tab deleted stays deleted. Gives what is kept now.
export async function change(id, edit) {
  const changed = await within("readwrite", async (on) => {
    const row = await on.conversations.get(id);
    if (!row) return null;
    edit(row);
    await on.conversations.put(row);
    return row;
  });
  tell(id);
  return changed;
}

// Writes messages (and their pictures) of one conversation. False: it was deleted meanwhile, and nothing was written.
export async function write(id, rows, pictures = []) {
  const there = await within("readwrite", async (on) => {
    if (!(await on.conversations.get(id))) return false;
    for (const row of pictures) await on.pictures.put(row);
    for (const row of rows) await on.messages.put(row);
    return true;
  });
  tell(id);
  return there;
}

// Deletes a conversation with all that belongs to it. Gives it back, for `restore`.
export async function remove(id) {
  const gone = await within("readwrite", async (on) => {
    const bundle = {
      conversation: await on.conversations.get(id), messages: await on.messages.of(id), pictures: await on.pictures.of(id),
    };
    await on.conversations.delete(id);
    for (const row of bundle.messages) await on.messages.delete(row.id);
    for (const row of bundle.pictures) await on.pictures.delete(row.id);
    return bundle;
  });
  tell(id);
  return gone;
}

export async function restore(bundle) {
  if (!bundle.conversation) return;
  await within("readwrite", async (on) => {
    await on.conversations.put(bundle.conversation);
    for (const row of bundle.messages) await on.messages.put(row);
    for (const row of bundle.pictures) await on.pictures.put(row);
  });
  tell(bundle.conversation.id);
}

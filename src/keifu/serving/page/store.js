// The chats, kept in this browser. A chat is a tree: an edited or repeated message is a branch beside the earlier one.
// A node is { role, content, tokens, reason, children, chosen }; the root has no role.

const PLACE = "keifu.chats";

export const node = (role, content) => ({ role, content, children: [], chosen: 0 });

function read() {
  try {
    const found = JSON.parse(localStorage.getItem(PLACE) ?? "[]");
    return Array.isArray(found) ? found.filter((chat) => chat?.root?.children) : [];
  } catch {
    return [];
  }
}

export const chats = read();

export function newChat() {
  const chat = { id: crypto.randomUUID?.() ?? String(Math.random()), root: node(null, "") };
  chats.unshift(chat);
  return chat;
}

// Whether there was room to keep all chats.
export function save() {
  try {
    localStorage.setItem(PLACE, JSON.stringify(chats.filter((chat) => chat.root.children.length)));
    return true;
  } catch {
    return false;
  }
}

// The nodes that are shown, from the first message on.
export function path(chat) {
  const found = [];
  for (let at = chat.root; at.children.length; at = at.children[at.chosen]) found.push(at.children[at.chosen]);
  return found;
}

export function parentOf(chat, wanted) {
  const nodes = [chat.root, ...path(chat)];
  return nodes.find((each) => each.children.includes(wanted));
}

export function addBranch(parent, child) {
  parent.children.push(child);
  parent.chosen = parent.children.length - 1;
  return child;
}

export const titleOf = (chat) => path(chat)[0]?.content.trim().slice(0, 60);

export function asMarkdown(chat, names) {
  return path(chat).map((each) => `**${names[each.role]}**\n\n${each.content}\n`).join("\n---\n\n");
}

export function asMessages(nodes, system) {
  const parts = (content, picture) => [{ type: "text", text: content }, { type: "image_url", image_url: { url: picture } }];
  const said = nodes.map(({ role, content, thoughts, picture }) => ({ role, content: picture ? parts(content, picture) : content, ...(thoughts ? { reasoning_content: thoughts } : {}) }));
  return system ? [{ role: "system", content: system }, ...said] : said;
}

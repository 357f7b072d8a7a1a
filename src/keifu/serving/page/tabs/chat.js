// The chat: what is shown, what is asked, and what the buttons do.

import { events, models } from "../api.js";
import { element, formatted, tokenised } from "../render.js";
import { addBranch, asMarkdown, asMessages, chats, newChat, node, parentOf, path, save, titleOf } from "../store.js";
import { say, showWords, switchLanguage } from "../words/words.js";

const at = (id) => document.getElementById(id);
const NUMBERS = [...document.querySelectorAll("[data-setting]")].map((each) => each.dataset.setting); // the server lists them
const KEPT = [...NUMBERS, "system", "theme", "model"];

let chat = chats[0] ?? newChat();
let served = [];
let running = null; // the AbortController of the answer that is being written

function tell(text, isError = false) {
  at("status").textContent = text;
  at("status").classList.toggle("error", isError);
}

function keep() {
  if (!save()) tell(say("full"), true);
}

// Settings

function readSettings() {
  const kept = JSON.parse(localStorage.getItem("keifu.settings") ?? "{}");
  for (const name of KEPT) if (kept[name] !== undefined) at(name).value = kept[name];
  at("probabilities").checked = kept.probabilities ?? true;
  at("key").value = sessionStorage.getItem("keifu.key") ?? "";
}

function keepSettings() {
  const values = Object.fromEntries(KEPT.map((name) => [name, at(name).value]));
  localStorage.setItem("keifu.settings", JSON.stringify({ ...values, probabilities: at("probabilities").checked }));
  sessionStorage.setItem("keifu.key", at("key").value);
  document.documentElement.dataset.theme = at("theme").value;
}

function sampling() {
  const given = NUMBERS.filter((name) => at(name).value !== "");
  return Object.fromEntries(given.map((name) => [name, Number(at(name).value)]));
}

// Asking

const isChat = (name) => served.find((model) => model.id === name)?.uses.includes("chat");

// The pieces of an answer to these messages: { text, tokens, reason, seed, usage }.
async function* answer(nodes, signal) {
  const model = at("model").value;
  const common = { model, ...sampling(), stream_options: { include_usage: true } };
  const asked = isChat(model)
    ? ["/v1/chat/completions", { ...common, messages: asMessages(nodes, at("system").value), ...probabilities() }]
    : ["/v1/completions", { max_tokens: 256, ...common, prompt: nodes.map((each) => each.content).join(""), ...(shown() ? { logprobs: 5 } : {}) }];
  for await (const { seed, usage, choices: [choice] } of events(...asked, signal)) {
    const text = choice?.delta?.content ?? choice?.text ?? "";
    const tokens = choice?.logprobs?.content ?? continued(choice?.logprobs, text);
    yield { text, thought: choice?.delta?.reasoning_content ?? "", tokens, reason: choice?.finish_reason, seed, usage };
  }
}

const shown = () => at("probabilities").checked;
const probabilities = () => (shown() ? { logprobs: true, top_logprobs: 5 } : {});

// The tokens of a continued text in the form of those of a chat; one that ends the text is no part of it.
function continued(logprobs, text) {
  const bytes = (token) => (/^(<[^<>]+>|\[\w+\])$/.test(token) && !text.includes(token) ? [] : [...new TextEncoder().encode(token)]);
  return (logprobs?.tokens ?? []).map((token, n) => ({
    token, bytes: bytes(token), logprob: logprobs.token_logprobs[n],
    top_logprobs: Object.entries(logprobs.top_logprobs[n]).map(([other, logprob]) => ({ token: other, logprob }))
      .sort((a, b) => b.logprob - a.logprob),
  }));
}

async function ask(parent) {
  running?.abort();
  const control = running = new AbortController();
  const loaded = served.find((model) => model.id === at("model").value)?.loaded;
  tell(say(loaded ? "writing" : "loading"));
  const asked = chat;
  const nodes = path(chat);
  let said = null;
  let began = 0;
  let last = {};
  showButtons();
  try {
    for await (const piece of answer(nodes.slice(0, nodes.indexOf(parent) + 1), control.signal)) {
      if (!said) {
        began = performance.now();
        said = addBranch(parent, { ...node("assistant", ""), tokens: [] });
        showLog();
        tell(say("writing"));
      }
      last = piece;
      said.content += piece.text;
      said.thoughts = (said.thoughts ?? "") + piece.thought;
      said.tokens.push(...piece.tokens);
      said.reason = piece.reason ?? said.reason;
      if (asked === chat) showGrowing(said);
    }
    const seconds = (performance.now() - began) / 1000;
    const count = last.usage?.completion_tokens ?? 0;
    const figures = say("speed", { n: count, s: (count / seconds).toFixed(1), seed: last.seed });
    tell(said?.reason === "length" ? `${say("cut")} ${figures}` : figures);
    served.forEach((model) => { if (model.id === at("model").value) model.loaded = true; });
  } catch (error) {
    if (error.name === "AbortError") tell(say("stopped"));
    else tell(error instanceof TypeError ? say("lost") : error.message, true);
  }
  if (running === control) running = null;
  keep();
  showAll();
}

const sees = () => Boolean(served.find((model) => model.id === at("model").value)?.sees);

// The chosen picture as a data URL, for a model that sees; undefined without one.
function takePicture() {
  const [file] = sees() ? at("picture").files : [];
  at("picture").value = "";
  const reader = new FileReader();
  return file && new Promise((done) => { reader.onload = () => done(reader.result); reader.readAsDataURL(file); });
}

async function send(text) {
  if (!text.trim() || !at("model").value) return;
  const picture = await takePicture();
  const nodes = path(chat);
  const question = addBranch(nodes.at(-1) ?? chat.root, { ...node("user", text), ...(picture && { picture }) });
  keep();
  showAll();
  ask(question);
}

// Showing

function showButtons() {
  at("send").hidden = running !== null;
  at("stop").hidden = running === null;
  at("add-picture").hidden = !sees();
}

// What the model thought before its answer, folded up once the answer has begun.
function thoughts(each) {
  if (!each.thoughts) return [];
  return [element("details", { class: "thoughts", open: !each.content && "open" }, element("summary", {}, say("thoughts")), element("div", {}, each.thoughts))];
}

function content(each) {
  if (each.tokens?.length && !each.thoughts && each !== growing()) return tokenised(each.tokens);
  return element("div", { class: "text" }, ...formatted(each.content));
}

const growing = () => (running ? path(chat).at(-1) : null);

function button(word, act) {
  return element("button", { class: "plain", type: "button", onclick: act }, say(word));
}

function versions(each) {
  const parent = parentOf(chat, each);
  const count = parent.children.length;
  if (count < 2) return [];
  const go = (step) => () => {
    parent.chosen = (parent.chosen + step + count) % count;
    keep();
    showLog();
  };
  const arrow = (word, sign, step) => element("button", { class: "plain", type: "button", "aria-label": say(word), onclick: go(step) }, sign);
  return [arrow("previous", "‹", -1), `${parent.chosen + 1}/${count}`, arrow("next", "›", 1)];
}

function edit(each, box) {
  const field = element("textarea", { rows: Math.min(12, each.content.split("\n").length + 1), "aria-label": say("message") });
  field.value = each.content;
  const resend = () => {
    if (!field.value.trim()) return;
    const changed = addBranch(parentOf(chat, each), { ...node("user", field.value), ...(each.picture && { picture: each.picture }) });
    keep();
    showAll();
    ask(changed);
  };
  box.replaceChildren(element("div", { class: "edit" }, field, button("resend", resend), button("cancel", showLog)));
  field.focus();
}

function article(each) {
  const box = element("article", { class: each.role });
  const copy = async () => {
    await navigator.clipboard.writeText(each.content);
    tell(say("copied"));
  };
  const change = each.role === "user"
    ? button("edit", () => edit(each, box))
    : button("regenerate", () => ask(parentOf(chat, each)));
  const tools = element("div", { class: "tools" }, ...versions(each), button("copy", copy), change);
  const seen = each.picture ? [element("img", { class: "shown", src: each.picture, alt: say("picture") })] : [];
  box.append(element("h3", {}, say(each.role)), ...seen, ...thoughts(each), content(each), tools);
  return box;
}

// What an empty chat says: examples to try, and the meaning of the lines under the tokens of an answer.
function invitation() {
  const chats = isChat(at("model").value);
  const example = (text) => element("button", { class: "example", type: "button", onclick: () => send(text) }, text);
  const line = (kind) => element("li", {}, element("span", { class: `token ${kind}` }, say(kind)));
  const legend = [element("p", {}, say("lines")), element("ul", { class: "lines" }, ...["likely", "fair", "unlikely"].map(line)), element("p", {}, say("others"))];
  const more = element("a", { "data-landmark": "gpt2", href: "/lineage" }, say("lineage"));
  const box = element("div", { class: "empty" },
    element("h2", {}, say(chats ? "emptyChat" : "emptyBase")),
    element("div", { class: "row" }, ...say(chats ? "chatExamples" : "baseExamples").map(example)),
    element("p", {}, say("chatSee"), " ", more), ...(shown() ? legend : []));
  return served.length ? [box] : [];
}

function showLog() {
  const nodes = path(chat);
  at("log").replaceChildren(...(nodes.length ? nodes.map(article) : invitation()));
  at("log").scrollTop = at("log").scrollHeight;
}

function showGrowing(each) {
  const box = at("log").lastElementChild?.querySelector(".text");
  if (!box) return;
  const log = at("log");
  const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
  log.lastElementChild.querySelector(".thoughts")?.remove();
  box.before(...thoughts(each));
  box.replaceChildren(...formatted(each.content));
  if (atEnd) log.scrollTop = log.scrollHeight;
}

function showChats() {
  at("chat-list").replaceChildren(...chats.map((each) => element("li", {}, element("button", {
    class: "plain", type: "button", "aria-current": each === chat && "true", onclick: () => open(each),
  }, titleOf(each) || say("untitled")))));
}

function showAll() {
  showButtons();
  showChats();
  showLog();
  showDefaults();
  showWords();
  at("language").textContent = say("other");
}

// The model's own settings, in grey where a field is empty.
function showDefaults() {
  const own = served.find((model) => model.id === at("model").value)?.defaults ?? {};
  for (const name of NUMBERS) at(name).placeholder = name === "seed" ? say("random") : String(own[name] ?? "");
}

function open(each) {
  running?.abort();
  chat = each;
  tell("");
  toggleChats(false);
  showAll();
}

function toggleChats(isOpen) {
  at("chats").classList.toggle("open", isOpen);
  at("show-chats").setAttribute("aria-expanded", String(isOpen));
}

function download(name, text, type) {
  const link = element("a", { href: URL.createObjectURL(new Blob([text], { type })), download: name });
  link.click();
  URL.revokeObjectURL(link.href);
}

async function listModels() {
  try {
    const all = await models();
    document.dispatchEvent(new CustomEvent("models", { detail: all }));
    served = all.filter((model) => model.uses.includes("completion"));
    const kept = JSON.parse(localStorage.getItem("keifu.settings") ?? "{}").model;
    at("model").replaceChildren(...served.map((model) => element("option", { value: model.id }, model.id)));
    if (served.some((model) => model.id === kept)) at("model").value = kept;
    at("key-form").hidden = true;
    tell(served.length ? "" : say("noModel"), !served.length);
    showAll();
  } catch (error) {
    at("key-form").hidden = !error.needsKey;
    if (error.needsKey) tell("");
    else tell(error instanceof TypeError ? say("lost") : error.message, true);
  }
}

// Buttons and keys

at("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send(at("message").value);
  at("message").value = "";
});
at("message").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!running) at("composer").requestSubmit();
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape") running?.abort(); });
at("stop").addEventListener("click", () => running?.abort());
at("new-chat").addEventListener("click", () => {
  open(chats.find((each) => !each.root.children.length) ?? newChat());
  at("message").focus();
});
at("delete-chat").addEventListener("click", () => {
  chats.splice(chats.indexOf(chat), 1);
  keep();
  open(chats[0] ?? newChat());
});
at("export-json").addEventListener("click", () => {
  const record = { model: at("model").value, sampling: sampling(), messages: asMessages(path(chat), at("system").value) };
  download("chat.json", JSON.stringify(record, null, 2), "application/json");
});
at("export-markdown").addEventListener("click", () => {
  download("chat.md", asMarkdown(chat, { user: say("user"), assistant: say("assistant") }), "text/markdown");
});
at("show-chats").addEventListener("click", () => toggleChats(!at("chats").classList.contains("open")));
at("show-settings").addEventListener("click", () => at("settings").showModal());
at("settings").addEventListener("close", () => {
  keepSettings();
  listModels();
});
at("model").addEventListener("change", () => {
  keepSettings();
  showAll();
});
at("probabilities").addEventListener("change", showLog);
at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  at("key").value = at("asked-key").value;
  keepSettings();
  listModels();
});
at("language").addEventListener("click", () => {
  switchLanguage();
  showAll();
  document.dispatchEvent(new Event("language"));
});

readSettings();
keepSettings();
showAll();
listModels();

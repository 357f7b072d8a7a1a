// What the page says, in English and Japanese.

const WORDS = {
  en: {
    skip: "To the message field", model: "Model", settings: "Settings", chats: "Chats", newChat: "New chat",
    deleteChat: "Delete", conversation: "Conversation", message: "Message", placeholder: "Write a message …",
    send: "Send", stop: "Stop", ownValues: "An empty field has the model's own value.", system: "System prompt",
    temperature: "Temperature", repetition: "Repetition penalty", maxTokens: "Most tokens", seed: "Seed",
    theme: "Colours", themeSystem: "as the system", themeLight: "light", themeDark: "dark",
    probabilities: "Show how likely each token was", key: "API key, if the server needs one", close: "Close",
    user: "You", assistant: "Model", edit: "Edit", copy: "Copy", copied: "Copied", regenerate: "Again",
    resend: "Send", cancel: "Cancel", previous: "Earlier version", next: "Later version", writing: "Writing …",
    loading: "The model is loading …", stopped: "Stopped.", cut: "The answer reached its limit of tokens.",
    noModel: "No model of this server writes text.", untitled: "New chat", full: "The browser's storage is full: delete a chat.",
    lost: "The connection to the server was lost.", speed: "{n} tokens, {s} tokens/s, seed {seed}",
    tokensHint: "Tokens: move with the arrow keys", other: "日本語",
  },
  ja: {
    skip: "入力欄へ", model: "モデル", settings: "設定", chats: "会話一覧", newChat: "新しい会話",
    deleteChat: "削除", conversation: "会話", message: "メッセージ", placeholder: "メッセージを書く…",
    send: "送信", stop: "停止", ownValues: "空欄ではモデル自身の値を使います。", system: "システムプロンプト",
    temperature: "温度", repetition: "繰り返しペナルティ", maxTokens: "最大トークン数", seed: "シード",
    theme: "配色", themeSystem: "システムに合わせる", themeLight: "ライト", themeDark: "ダーク",
    probabilities: "各トークンの確率を表示", key: "APIキー(サーバーが必要とする場合)", close: "閉じる",
    user: "あなた", assistant: "モデル", edit: "編集", copy: "コピー", copied: "コピーしました", regenerate: "再生成",
    resend: "送信", cancel: "取消", previous: "前の版", next: "次の版", writing: "生成中…",
    loading: "モデルを読み込み中…", stopped: "停止しました。", cut: "トークン数の上限に達しました。",
    noModel: "文章を書けるモデルがありません。", untitled: "新しい会話", full: "ブラウザの保存領域がいっぱいです。会話を削除してください。",
    lost: "サーバーとの接続が切れました。", speed: "{n}トークン、{s}トークン/秒、シード{seed}",
    tokensHint: "トークン: 矢印キーで移動", other: "English",
  },
};

let language = localStorage.getItem("keifu.language") ?? (navigator.language.startsWith("ja") ? "ja" : "en");

export function say(name, values = {}) {
  return WORDS[language][name].replace(/\{(\w+)\}/g, (_, key) => values[key]);
}

export function switchLanguage() {
  language = language === "ja" ? "en" : "ja";
  localStorage.setItem("keifu.language", language);
}

// Puts the words into every element that asks for some.
export function showWords() {
  document.documentElement.lang = language;
  for (const each of document.querySelectorAll("[data-text]")) each.textContent = say(each.dataset.text);
  for (const each of document.querySelectorAll("[data-label]")) each.setAttribute("aria-label", say(each.dataset.label));
  for (const each of document.querySelectorAll("[data-placeholder]")) each.placeholder = say(each.dataset.placeholder);
}

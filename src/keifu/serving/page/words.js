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
    tokensHint: "Tokens: move with the arrow keys", other: "日本語", tabs: "What to do", chat: "Chat", look: "Look inside",
    translate: "Translate", draw: "Draw", match: "Match", neuron: "Neuron", text: "Text", beam: "Beam",
    lookHint: "Tokens, where each head looks, what each layer would say; with [MASK] in a text for BERT, words for it.",
    layer: "Layer", head: "Head", mean: "mean of all heads", lens: "What each layer would say next after this token",
    maskWords: "Words for mask {n}", looked: "How much “{token}” looks at each token", working: "Working …",
    prompt: "Prompt", negative: "Negative prompt", label: "Class", none: "none", steps: "Steps", guidance: "Guidance",
    strength: "Strength", base: "Picture to begin with; or a PNG from here, drawn again", clearMask: "Clear mask",
    maskHint: "Paint what is to be drawn anew: pointer, or arrow keys and space. Without paint: the whole picture.",
    dropBase: "Remove picture", step: "State {n}", drawn: "Seed {seed}", save: "Save PNG",
    again: "The settings of this picture were taken: Draw makes it again.", pictures: "Pictures (choose or drop)",
    words: "Words, a line each", kind: "Kind", perceptron: "Perceptron", network: "Network", units: "Hidden units",
    rate: "Learning rate", class: "Class", train: "Train", pause: "Pause", line: "Two groups", clear: "Clear",
    neuronHint: "Set points by clicking, or with arrow keys and space; the shaded side is what the model says.",
    progress: "Step {n}: {wrong} of {all} points wrong", drop: "Choose or drop at least one picture.",
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
    tokensHint: "トークン: 矢印キーで移動", other: "English", tabs: "機能", chat: "会話", look: "内部を見る",
    translate: "翻訳", draw: "描画", match: "照合", neuron: "ニューロン", text: "文章", beam: "ビーム幅",
    lookHint: "トークン、各ヘッドの注目先、各層が次に言う語。BERTでは文中の[MASK]に入る語。",
    layer: "層", head: "ヘッド", mean: "全ヘッドの平均", lens: "このトークンの次に各層が言う語",
    maskWords: "マスク{n}に入る語", looked: "「{token}」が各トークンに向ける注目", working: "処理中…",
    prompt: "プロンプト", negative: "除外プロンプト", label: "クラス", none: "なし", steps: "ステップ数", guidance: "ガイダンス",
    strength: "強さ", base: "元にする画像。ここで描いたPNGなら再現", clearMask: "マスクを消す",
    maskHint: "描き直す部分を塗る: ポインター、または矢印キーとスペース。塗らなければ画像全体。",
    dropBase: "画像を外す", step: "{n}段階目", drawn: "シード{seed}", save: "PNGを保存",
    again: "この画像の設定を読み込みました。「描画」で同じ画像になります。", pictures: "画像(選択またはドロップ)",
    words: "言葉(1行に1つ)", kind: "種類", perceptron: "パーセプトロン", network: "ネットワーク", units: "隠れユニット",
    rate: "学習率", class: "クラス", train: "学習", pause: "一時停止", line: "2つの群", clear: "消去",
    neuronHint: "クリック、または矢印キーとスペースで点を置きます。色はモデルの判断です。",
    progress: "{n}ステップ: {all}点中{wrong}点が誤り", drop: "画像を1枚以上選ぶかドロップしてください。",
  },
};

let language = localStorage.getItem("keifu.language") ?? document.documentElement.dataset.language
  ?? (navigator.language.startsWith("ja") ? "ja" : "en");

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

// The sentences of the engine's errors in Japanese. It is loaded with the first error of a Japanese page.

const KINDS = { normalizer: "正規化", "pre-tokenizer": "前処理の分割", model: "モデル", "post-processor": "後処理" };
const SENTENCES = [
  [/^This model holds no conversations: its tokenizer has no (.+)\.$/, (token) => `このモデルは会話ができません。トークナイザに ${token} がありません。`],
  [/^The (?:text|sentence) has (\d+) tokens, and the model reads (\d+): (?:shorten|split) it\.$/, (has, reads) => `文が ${has} トークンあり、モデルが読めるのは ${reads} トークンまでです。短くしてください。`],
  [/^The question is too long: the model reads (\d+) tokens\.$/, (reads) => `質問が長すぎます。モデルが読めるのは ${reads} トークンまでです。`],
  [/^No word is hidden: .+$/, () => "隠れた語がありません。語を選ぶか、その場所に [MASK] と書いてください。"],
  [/^There is nothing to translate: .+$/, () => "翻訳する文がありません。何か書いてください。"],
  [/^The picture has (\d+) numbers, and the model reads (\d+)\.$/, (has, reads) => `絵の数値が ${has} 個で、モデルが読むのは ${reads} 個です。`],
  [/^The model knows (\d+) noise levels, so it takes 1 to \d+ steps, not (.+)\.$/, (levels, steps) => `このモデルのノイズは ${levels} 段階なので、ステップ数は 1 から ${levels} までです。${steps} は使えません。`],
  [/^The engine's (.+) has the activation (.+), and this model (.+)\.$/, (kind, known, other) => `このエンジンの ${kind} の活性化関数は ${known} で、このモデルの ${other} は計算できません。`],
  [/^The engine's U-Net draws squares.+$/, () => "このエンジンの U-Net が描くのは正方形だけで、このモデルの大きさは描けません。"],
  [/^The engine's LLaVA reads the last states.+$/, () => "このエンジンの LLaVA は全パッチの最後の状態を読みますが、このモデルはほかのものを読みます。"],
  [/^The engine's Transformer has one vocabulary.+$/, () => "このエンジンの Transformer は二つの言語に一つの語彙を使いますが、このモデルの語彙は二つです。"],
  [/^The engine does not sample models with thresholds.+$/, () => "しきい値や学習された分散を使うモデルは、このエンジンでは描けません。"],
  [/^The engine knows no (activation|noise schedule|prediction of|timestep spacing|action|rotary positions of the type) ?(.*)\.$/, (what, name) => `このエンジンは「${name}」を知りません（${what}）。`],
  [/^The engine does not know (models|pipelines) of the type (.+?)(?:; it knows (.+))?\.$/, (_, kind, known) => `このエンジンは ${kind} のモデルを知りません。${known ? `知っているのは ${known} です。` : ""}`],
  [/^The engine does not read tokenizers with the (.+?) (.+)\.$/, (what, type) => `このエンジンは、${KINDS[what] ?? what}が ${type} のトークナイザを読めません。`],
  [/^The engine reads (.+), and (.+) is (.+)\.$/, (known, name, dtype) => `このエンジンが読むのは ${known} で、${name} は ${dtype} です。`],
  [/^The model's folder lacks (.+)\.$/, (name) => `モデルのフォルダーに ${name} がありません。`],
  [/^(.+) is damaged: it is no JSON\. Load it again\.$/, (name) => `${name} が壊れています（JSON ではありません）。もう一度読み込んでください。`],
  [/^The weights file is damaged: (.+)\. Load it again\.$/, (why) => `重みのファイルが壊れています（${why}）。もう一度読み込んでください。`],
  [/^The weights file lacks (.+): it belongs to another model\.$/, (name) => `重みのファイルに ${name} がありません。別のモデルのファイルです。`],
  [/^Token (.+) is not in the vocabulary of (.+)\.$/, (id, count) => `トークン ${id} は、${count} 語の語彙にありません。`],
  [/^(.+) reads rows of (.+) numbers, and it was given (.+)\.$/, (name, inner, count) => `${name} が読むのは ${inner} 個ずつの数値で、渡されたのは ${count} 個です。`],
  [/^No model is loaded yet\.$/, () => "モデルがまだ読み込まれていません。"],
  [/^(.+) could not be loaded(.*): try again\.$/, (path, status) => `${path} を読み込めませんでした${status.trim() && `（${status.trim().slice(1, -1)}）`}。もう一度試してください。`],
  [/^The engine could not start: (.+)\.$/, (why) => `エンジンを始められませんでした（${why}）。`],
  [/^The engine failed: (.+)\.$/, (why) => `エンジンで問題が起きました（${why}）。`],
];

export function inJapanese(sentence) { // one that is not in the list stays as it is
  for (const [pattern, words] of SENTENCES) {
    const found = pattern.exec(sentence);
    if (found) return words(...found.slice(1));
  }
  return sentence;
}

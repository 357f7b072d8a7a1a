// Tokenizers, read from their tokenizer.json: byte-level BPE (GPT-2, LLaMA, CLIP) and WordPiece (BERT).
// Each has the steps of the file: a normalizer, a pre-tokenizer, the model, and what is put around a text.

import { ModelError } from "./tensors.js";

const SPACE = "\\p{White_Space}"; // what \s means in the files: JavaScript's \s is a little different
const pattern = (text, flags = "gu") => new RegExp(text.replaceAll("\\S", "\\P{White_Space}").replaceAll("\\s", SPACE), flags);
const WORDS = pattern("'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"); // of GPT-2
const CHINESE = /[\u4e00-\u9fff\u3400-\u4dbf\u{20000}-\u{2a6df}\u{2a700}-\u{2b73f}\u{2b740}-\u{2b81f}\u{2b920}-\u{2ceaf}\uf900-\ufaff\u{2f800}-\u{2fa1f}]/gu;
const lower = (text) => Array.from(text, (character) => character.toLowerCase()).join("");
const unread = (what, type) => new ModelError(`The engine does not read tokenizers with the ${what} ${type}.`);

const NORMALIZERS = {
  Sequence: ({ normalizers }) => {
    const steps = normalizers.map(normalizer);
    return (text) => steps.reduce((done, step) => step(done), text);
  },
  NFC: () => (text) => text.normalize("NFC"),
  NFD: () => (text) => text.normalize("NFD"),
  NFKC: () => (text) => text.normalize("NFKC"),
  NFKD: () => (text) => text.normalize("NFKD"),
  Lowercase: () => lower,
  Replace: ({ pattern: searched, content }) => {
    const expression = searched.Regex === undefined ? null : pattern(searched.Regex);
    return (text) => text.replaceAll(expression ?? searched.String, () => content);
  },
  BertNormalizer: (json) => (text) => {
    let plain = text;
    if (json.clean_text) plain = plain.replace(/[\0\ufffd]|(?![\t\n\r])\p{C}/gu, "").replace(/\p{White_Space}/gu, " ");
    if (json.handle_chinese_chars) plain = plain.replace(CHINESE, " $& ");
    if (json.strip_accents ?? json.lowercase) plain = plain.normalize("NFD").replace(/\p{Mn}/gu, "");
    return json.lowercase ? lower(plain) : plain;
  },
};

function normalizer(json) {
  if (json === null) return (text) => text;
  if (!(json.type in NORMALIZERS)) throw unread("normalizer", json.type);
  return NORMALIZERS[json.type](json);
}

const SIGNS = byteSigns();
const BYTES = new Map(SIGNS.map((sign, byte) => [sign, byte]));

function byteSigns() { // the printable characters that stand for the 256 bytes (GPT-2)
  let next = 256;
  const printable = (byte) => (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
  return Array.from({ length: 256 }, (_, byte) => String.fromCodePoint(printable(byte) ? byte : next++));
}

const toSigns = (word) => Array.from(new TextEncoder().encode(word), (byte) => SIGNS[byte]).join("");

const PRETOKENIZERS = { // each turns a piece of text into smaller ones
  Sequence: ({ pretokenizers }) => {
    const steps = pretokenizers.map(pretokenizer);
    return (text) => steps.reduce((pieces, step) => pieces.flatMap(step), [text]);
  },
  Digits: ({ individual_digits: single }) => (text) => text.match(single ? /\p{N}|\P{N}+/gu : /\p{N}+|\P{N}+/gu) ?? [],
  Split: ({ pattern: searched, behavior, invert }) => {
    if (searched.Regex === undefined || !(behavior === "Isolated" || (behavior === "Removed" && invert))) {
      throw unread("pre-tokenizer", `Split (${behavior})`);
    }
    const expression = pattern(searched.Regex);
    if (behavior === "Removed") return (text) => text.match(expression) ?? [];
    const parts = pattern(`(${searched.Regex.replaceAll(/\((?!\?)/g, "(?:")})`);
    return (text) => text.split(parts).filter(Boolean);
  },
  ByteLevel: ({ use_regex: words, add_prefix_space: prefix }) => {
    if (prefix) throw unread("pre-tokenizer", "ByteLevel (add_prefix_space)");
    return (text) => ((words ? text.match(WORDS) : [text]) ?? []).map(toSigns);
  },
  BertPreTokenizer: () => (text) => text.match(/[\p{P}$+<=>^`|~]|[^\p{White_Space}\p{P}$+<=>^`|~]+/gu) ?? [],
};

function pretokenizer(json) {
  if (!(json?.type in PRETOKENIZERS)) throw unread("pre-tokenizer", json?.type ?? "of no kind");
  return PRETOKENIZERS[json.type](json);
}

function bytePairs({ merges, vocab, unk_token: unknown, end_of_word_suffix: suffix, ...json }) {
  if (json.byte_fallback || json.continuing_subword_prefix || json.ignore_merges) throw unread("model", "BPE with these options");
  const ranks = new Map(merges.map((pair, rank) => [Array.isArray(pair) ? pair.join(" ") : pair, rank]));
  const known = new Map();
  return (word) => {
    if (known.has(word)) return known.get(word);
    let parts = Array.from(word);
    if (suffix) parts.push(parts.pop() + suffix);
    for (;;) {
      let [best, at] = [Infinity, -1];
      for (let i = 0; i + 1 < parts.length; i++) {
        const rank = ranks.get(`${parts[i]} ${parts[i + 1]}`);
        if (rank < best) [best, at] = [rank, i];
      }
      if (at < 0) break;
      parts.splice(at, 2, parts[at] + parts[at + 1]);
    }
    const ids = parts.map((part) => vocab[part] ?? vocab[unknown]).filter((id) => id !== undefined);
    if (known.size < 10000) known.set(word, ids);
    return ids;
  };
}

function wordPiece({ vocab, unk_token: unknown, continuing_subword_prefix: prefix, max_input_chars_per_word: longest }) {
  return (word) => {
    const [characters, ids] = [Array.from(word), []];
    if (characters.length > longest) return [vocab[unknown]];
    for (let start = 0; start < characters.length;) {
      let end = characters.length;
      const piece = () => (start ? prefix : "") + characters.slice(start, end).join("");
      while (end > start && vocab[piece()] === undefined) end--;
      if (end === start) return [vocab[unknown]];
      ids.push(vocab[piece()]);
      start = end;
    }
    return ids;
  };
}

const MODELS = { BPE: bytePairs, WordPiece: wordPiece };

// The names of what is put around a text, with null for the text.
function template(json) {
  if (json === null || json.type === "ByteLevel") return [null];
  if (json.type === "RobertaProcessing") return [json.cls[0], null, json.sep[0]];
  if (json.type === "TemplateProcessing") return json.single.map((part) => part.SpecialToken?.id ?? null);
  throw unread("post-processor", json.type);
}

export class Tokenizer {
  constructor(json) {
    if (!(json.model?.type in MODELS)) throw unread("model", json.model?.type ?? "of no kind");
    this.type = json.model.type;
    this.normalize = normalizer(json.normalizer);
    this.split = pretokenizer(json.pre_tokenizer);
    this.pieces = MODELS[this.type](json.model);
    this.template = template(json.post_processor);
    this.names = [];
    this.idsByName = new Map();
    const names = [...Object.entries(json.model.vocab), ...json.added_tokens.map(({ content, id }) => [content, id])];
    for (const [name, id] of names) {
      this.names[id] = name;
      this.idsByName.set(name, id);
    }
    this.special = new Set(json.added_tokens.filter((token) => token.special).map((token) => token.id));
    const spelled = json.added_tokens.map((token) => token.content).sort((a, b) => b.length - a.length);
    const escaped = spelled.map((name) => name.replace(/[\\^$.*+?()[\]{}|/-]/g, "\\$&"));
    this.added = escaped.length ? new RegExp(`(${escaped.join("|")})`) : null;
  }

  get vocabSize() { return this.names.length; }

  id(name) { return this.idsByName.get(name); }

  // special: also what the tokenizer puts around a text. allowSpecial: "<|im_end|>" in the text is that token.
  encode(text, { special = false, allowSpecial = false } = {}) {
    const plain = (part) => this.split(this.normalize(part)).flatMap(this.pieces);
    const parts = allowSpecial && this.added ? text.split(this.added) : [text];
    const ids = parts.flatMap((part, i) => (i % 2 ? [this.id(part)] : part ? plain(part) : []));
    return special ? this.template.flatMap((name) => (name === null ? ids : [this.id(name)])) : ids;
  }

  // The bytes of a token of a byte-level vocabulary, the text of any other.
  bytes(id) {
    const bytes = Array.from(this.names[id] ?? "", (sign) => BYTES.get(sign));
    return bytes.includes(undefined) ? new TextEncoder().encode(this.names[id]) : Uint8Array.from(bytes);
  }

  decode(ids) {
    const shown = ids.filter((id) => !this.special.has(id));
    if (this.type === "WordPiece") return shown.map((id) => this.names[id]).join(" ").replaceAll(" ##", "");
    return new TextDecoder().decode(Uint8Array.from(shown.flatMap((id) => [...this.bytes(id)])));
  }
}

// Heads of attention: their weights, the pattern that each has, and the one that shows most.

const SPECIAL = /^\s*(\[\w+\]|<[^<>]+>)\s*$/;
const isWord = (token) => /[\p{L}\p{N}]/u.test(token) && !SPECIAL.test(token);
const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
const entropy = (values) => -values.reduce((sum, value) => sum + (value ? value * Math.log(value) : 0), 0);

// The weights of each head of a layer, as functions of row and column, from 0 to 1.
export function headsOf({ bytes, heads }, rows, columns) {
  const all = Uint8Array.from(atob(bytes), (sign) => sign.charCodeAt(0));
  return Array.from({ length: heads }, (_, n) => (row, column) => all[(n * rows + row) * columns + column] / 255);
}

export const meanOf = (heads) => (row, column) => mean(heads.map((of) => of(row, column)));

// For each row the column after the latest earlier place of the same token; -1 where there is none.
function copies(tokens) {
  const name = (token) => token.trim().toLowerCase();
  return tokens.map((token, row) => {
    for (let at = row - 2; at >= 0; at--) if (isWord(token) && name(tokens[at]) === name(token)) return at + 1;
    return -1;
  });
}

// The pattern of a head over one text: { name, value }, the mean weight there; null if it has none of these.
export function pattern(of, tokens, causal) {
  const all = tokens.map((_, n) => n);
  const followed = copies(tokens);
  const along = (rows, column) => (rows.length ? mean(rows.map((row) => of(row, column(row)))) : 0);
  const found = [
    ["induction", causal ? 2 * along(all.filter((row) => followed[row] >= 0), (row) => followed[row]) : 0],
    ["before", along(all.slice(1), (row) => row - 1)],
    ["after", along(all.slice(0, -1), (row) => row + 1)],
    ["itself", along(all, (row) => row)],
    ["first", along(all.slice(2), () => 0)],
    ["last", causal ? 0 : along(all.slice(0, -2), () => all.length - 1)],
  ].sort((a, b) => b[1] - a[1]);
  const [name, value] = found[0];
  return value >= 0.5 ? { name, value: name === "induction" ? value / 2 : value } : null;
}

// How much a row of a head says about its column, in nats: the mutual information; little if all rows look alike.
function information(of, rows, columns) {
  const table = Array.from({ length: rows }, (_, row) => {
    const values = Array.from({ length: columns }, (_, column) => of(row, column));
    const sum = values.reduce((a, b) => a + b, 0) || 1;
    return values.map((value) => value / sum);
  });
  const average = table[0].map((_, column) => mean(table.map((row) => row[column])));
  return { nats: entropy(average) - mean(table.map(entropy)), last: average.at(-1) };
}

export const isCausal = (layers, length) => layers.every((heads) => heads.every((of) => (
  Array.from({ length }, (_, row) => row).every((row) => row + 1 >= length || of(row, row + 1) === 0)
)));

// The layer and head to begin with, and the row: an induction head if one copies, else the most informative head.
// For an alignment the later layers count more, since they know the token that is written, and rest on the end less.
export function choice(layers, rows, columns, same, causal) {
  const followed = copies(rows);
  const copying = rows.map((_, row) => row).filter((row) => causal && same && followed[row] >= 0);
  let best = { layer: 0, head: 0, value: -1, row: rows.length - 1 };
  const offer = (layer, head, value, row) => { if (value > best.value) best = { layer, head, value, row }; };
  layers.forEach((heads, layer) => heads.forEach((of, head) => {
    const copied = copying.length ? mean(copying.map((row) => of(row, followed[row]))) : 0;
    if (copied >= 0.2) offer(layer, head, 100 + copied, copying.reduce((a, b) => (of(b, followed[b]) >= of(a, followed[a]) ? b : a)));
    const { nats, last } = information(of, rows.length, columns.length);
    offer(layer, head, same ? nats : (nats * (1 - last) ** 2 * (layer + 1)) / layers.length, clearest(of, rows, columns, same));
  }));
  return best;
}

// The row of a word that looks most at a single word.
function clearest(of, rows, columns, same) {
  let best = [-1, rows.length - 1];
  rows.forEach((row, n) => columns.forEach((column, m) => {
    if (isWord(row) && isWord(column) && !(same && n === m) && of(n, m) > best[0]) best = [of(n, m), n];
  }));
  return best[1];
}

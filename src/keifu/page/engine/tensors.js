// The numbers of a model, read from a safetensors file, and products with its matrices.
// Axes: x [rows, dim] is a flat Float32Array; a matrix is [out, in], as PyTorch has it.

// An error that a reader can act on: one sentence.
export class ModelError extends Error {}

const SIZES = { F64: 8, F32: 4, F16: 2, BF16: 2, I8: 1 };
const STORED = { F64: "F32", F16: "F32", F32: "F32", BF16: "BF16", I8: "I8" }; // how the engine holds each
const PRODUCTS = { F32: "linear_f32", BF16: "linear_bf16", I8: "linear_int8" };
const PAGE = 65536;

// The header of a safetensors file, and where its numbers begin; each offset is checked against the file's length.
export function readHeader(buffer) {
  const damaged = (why) => new ModelError(`The weights file is damaged: ${why}. Load it again.`);
  if (buffer.byteLength < 8) throw damaged(`it has ${buffer.byteLength} bytes`);
  const size = new DataView(buffer).getBigUint64(0, true);
  if (size > BigInt(buffer.byteLength - 8)) throw damaged(`its header needs ${size} bytes, and it has ${buffer.byteLength}`);
  const start = 8 + Number(size);
  let header;
  try {
    header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, Number(size))));
  } catch {
    throw damaged("its header is no JSON");
  }
  delete header.__metadata__;
  for (const [name, { dtype, shape, data_offsets: offsets }] of Object.entries(header)) {
    if (!(dtype in SIZES)) throw new ModelError(`The engine reads ${Object.keys(SIZES).join(", ")}, and ${name} is ${dtype}.`);
    const bytes = shape.reduce((product, side) => product * side, SIZES[dtype]);
    if (offsets[0] < 0 || offsets[1] - offsets[0] !== bytes) throw damaged(`${name} has a wrong number of bytes`);
    if (start + offsets[1] > buffer.byteLength) throw damaged(`${name} ends at byte ${start + offsets[1]}, and the file at ${buffer.byteLength}`);
  }
  return { header, start };
}

function halfToFloat(bits) { // IEEE half precision
  const [sign, exponent, fraction] = [bits >> 15 ? -1 : 1, (bits >> 10) & 31, bits & 1023];
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -14 * (fraction / 1024));
}

// `from` holds `count` numbers of a dtype at any byte; return them in float32.
function toFloat32(buffer, from, count, dtype) {
  const bytes = buffer.slice(from, from + count * SIZES[dtype]);
  if (dtype === "F32") return new Float32Array(bytes);
  if (dtype === "F64") return Float32Array.from(new Float64Array(bytes));
  if (dtype === "I8") return Float32Array.from(new Int8Array(bytes));
  const halves = new Uint16Array(bytes);
  if (dtype === "F16") return Float32Array.from(halves, halfToFloat);
  return new Float32Array(Uint32Array.from(halves, (half) => half << 16).buffer);
}

export class Tensors {
  // files: a safetensors file, or a list of [file, prefix of its names]. kernel: the compiled kernel.c, or null.
  constructor(files, kernel = null) {
    this.entries = new Map();
    this.float32 = new Map();
    let end = 0;
    for (const [buffer, prefix] of Array.isArray(files) ? files : [[files, ""]]) {
      const { header, start } = readHeader(buffer);
      for (const [name, { dtype, shape, data_offsets: [from] }] of Object.entries(header)) {
        const count = shape.reduce((product, side) => product * side, 1);
        this.entries.set(prefix + name, { shape, count, dtype: STORED[dtype], at: end, source: { buffer, from: start + from, dtype } });
        end += Math.ceil((count * SIZES[STORED[dtype]]) / 16) * 16;
      }
    }
    if (kernel) this.moveToWasm(kernel, end);
  }

  // Copy all numbers into the memory of the kernel, behind its own stack and data.
  moveToWasm(kernel, bytes) {
    this.memory = new WebAssembly.Memory({ initial: 4 + Math.ceil(bytes / PAGE) });
    this.kernel = new WebAssembly.Instance(kernel, { env: { memory: this.memory } }).exports;
    const base = Math.ceil(this.kernel.__heap_base.value / 16) * 16;
    for (const entry of this.entries.values()) {
      const { source, count, dtype } = entry;
      entry.at += base;
      const same = source.dtype === dtype;
      const numbers = same ? new Uint8Array(source.buffer, source.from, count * SIZES[dtype]) : new Uint8Array(toFloat32(source.buffer, source.from, count, source.dtype).buffer);
      new Uint8Array(this.memory.buffer).set(numbers, entry.at);
      entry.source = null;
    }
    this.scratch = base + bytes;
  }

  has(name) { return this.entries.has(name); }

  entry(name) {
    const entry = this.entries.get(name);
    if (!entry) throw new ModelError(`The weights file lacks ${name}: it belongs to another model.`);
    return entry;
  }

  shape(name) { return this.entry(name).shape; }

  // The numbers of a tensor from `start` on, in float32 and without the scales of int8.
  read(name, start = 0, count = this.entry(name).count - start) {
    const { dtype, at, source } = this.entry(name);
    const [buffer, from, kind] = source ? [source.buffer, source.from, source.dtype] : [this.memory.buffer, at, dtype];
    return toFloat32(buffer, from + start * SIZES[kind], count, kind);
  }

  // The whole tensor in float32, kept for the next call.
  get(name) {
    if (!this.float32.has(name)) {
      const { shape } = this.entry(name);
      const numbers = this.read(name);
      if (this.has(`${name}_scale`)) {
        const scales = this.get(`${name}_scale`);
        const width = numbers.length / shape[0];
        for (let i = 0; i < numbers.length; i++) numbers[i] *= scales[Math.floor(i / width)];
      }
      this.float32.set(name, numbers);
    }
    return this.float32.get(name);
  }

  // Rows of a table, such as the embeddings of tokens: [ids, dim].
  rows(name, ids) {
    const { shape: [count, dim] } = this.entry(name);
    const scales = this.has(`${name}_scale`) ? this.get(`${name}_scale`) : null;
    const x = new Float32Array(ids.length * dim);
    ids.forEach((id, row) => {
      if (!(id >= 0 && id < count)) throw new ModelError(`Token ${id} is not in the vocabulary of ${count}.`);
      const numbers = this.read(name, id * dim, dim);
      x.set(scales ? numbers.map((number) => number * scales[id]) : numbers, row * dim);
    });
    return x;
  }

  // x · weightᵀ + bias. A kernel of a convolution counts as [out, in · height · width].
  linear(x, weight, bias = null) {
    const { shape: [out], count } = this.entry(weight);
    const inner = count / out;
    if (x.length % inner) throw new ModelError(`${weight} reads rows of ${inner} numbers, and it was given ${x.length}.`);
    const y = this.kernel ? this.wasmProduct(x, weight, inner, out) : plainProduct(x, this.get(weight), inner, out);
    if (this.kernel && this.has(`${weight}_scale`)) {
      const scales = this.get(`${weight}_scale`);
      for (let i = 0; i < y.length; i++) y[i] *= scales[i % out];
    }
    if (bias !== null) {
      const b = this.get(bias);
      for (let row = 0; row < y.length; row += out) for (let o = 0; o < out; o++) y[row + o] += b[o];
    }
    return y;
  }

  wasmProduct(x, weight, inner, out) {
    const { at, dtype } = this.entry(weight);
    const rows = x.length / inner;
    const to = this.scratch + Math.ceil((4 * x.length) / 16) * 16;
    const missing = to + 4 * rows * out - this.memory.buffer.byteLength;
    if (missing > 0) this.memory.grow(Math.ceil(missing / PAGE));
    new Float32Array(this.memory.buffer, this.scratch, x.length).set(x);
    this.kernel[PRODUCTS[dtype]](this.scratch, rows, at, inner, out, to);
    return new Float32Array(this.memory.buffer, to, rows * out).slice();
  }
}

function plainProduct(x, w, inner, out) {
  const rows = x.length / inner;
  const y = new Float32Array(rows * out);
  const whole = inner - (inner % 4);
  for (let o = 0; o < out; o++) {
    for (let row = 0; row < rows; row++) {
      let [a, b, c, d] = [0, 0, 0, 0];
      const [p, q] = [row * inner, o * inner];
      for (let i = 0; i < whole; i += 4) {
        a += x[p + i] * w[q + i];
        b += x[p + i + 1] * w[q + i + 1];
        c += x[p + i + 2] * w[q + i + 2];
        d += x[p + i + 3] * w[q + i + 3];
      }
      for (let i = whole; i < inner; i++) a += x[p + i] * w[q + i];
      y[row * out + o] = a + b + (c + d);
    }
  }
  return y;
}

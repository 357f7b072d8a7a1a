// The engine from a page: a worker that loads a model's files and answers one question after the other. A page that is
// one file (single_file.py) holds the worker and the files itself, in keifuFiles by their paths.

export class Client {
  // root: the address of the folder with models/, next to engine/
  constructor(root) {
    this.root = root;
    this.worker = new Worker(this.address("../engine/worker.js"), { type: globalThis.keifuFiles ? "classic" : "module" });
    this.waiting = new Map();
    this.number = 0;
    this.worker.onmessage = ({ data: { id, progress, result, error } }) => {
      const { resolve, reject, onProgress } = this.waiting.get(id);
      if (progress !== undefined) return onProgress?.(progress);
      this.waiting.delete(id);
      return error === undefined ? resolve(result) : reject(new Error(error));
    };
    this.worker.onerror = (event) => {
      const error = new Error(`The engine could not start: ${event.message ?? "this browser blocks workers here"}.`);
      for (const { reject } of this.waiting.values()) reject(error);
      this.waiting.clear();
    };
  }

  address(path) { return globalThis.keifuFiles?.[path] ?? new URL(path, this.root); }

  send(message, onProgress = null, transfer = []) {
    const id = ++this.number;
    const answer = new Promise((resolve, reject) => this.waiting.set(id, { resolve, reject, onProgress }));
    this.worker.postMessage({ id, ...message }, transfer);
    return answer;
  }

  // Load a model. onBytes(loaded) sees the bytes arrive. cache: "reload" asks the server anew, after a damaged file.
  async load(name, names, onBytes, cache = "default") {
    let total = 0;
    const read = async (path) => {
      const response = await fetch(this.address(path), { cache }).catch(() => null);
      if (!response?.ok) throw new Error(`${path} could not be loaded${response ? ` (${response.status})` : ""}: try again.`);
      const parts = [];
      for (let reader = response.body.getReader(), part; !(part = await reader.read()).done;) {
        parts.push(part.value);
        onBytes(total += part.value.length);
      }
      return new Blob(parts).arrayBuffer();
    };
    const kernel = await fetch(this.address("../engine/kernel.wasm")).then((response) => (response.ok ? response.arrayBuffer() : null), () => null);
    const files = {};
    for (const file of names) files[file] = await read(`models/${name}/${file}`);
    return this.send({ load: files, kernel }, null, Object.values(files));
  }

  ask(action, options, onProgress) {
    return this.send({ ask: action, options }, onProgress);
  }

  stop() { // what runs now
    for (const id of this.waiting.keys()) this.worker.postMessage({ stop: id });
  }

  end() { this.worker.terminate(); }
}

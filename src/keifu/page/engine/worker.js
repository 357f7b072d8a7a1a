// The engine in a worker: { id, load: files, kernel } reads a model, { id, ask: action, options } computes, { id, stop }
// ends what runs. Answers: { id, progress }, { id, result } or { id, error: a sentence }.

import { ACTIONS } from "./actions.js";
import { readModel } from "./models.js";
import { ModelError } from "./tensors.js";

let loaded = null;
const stopped = new Set();

function pause() { // let messages in, without the delay of timers
  return new Promise((resolve) => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => { port1.close(); resolve(); };
    port2.postMessage(null);
  });
}

async function answer({ id, load, kernel, ask, options }) {
  if (load) {
    loaded = await readModel(load, kernel ? await WebAssembly.compile(kernel).catch(() => null) : null);
    return { kind: loaded.kind, kernel: Boolean(loaded.tensors.kernel) };
  }
  if (!loaded) throw new ModelError("No model is loaded yet.");
  if (!Object.hasOwn(ACTIONS, ask)) throw new ModelError(`The engine knows no action ${ask}.`);
  let last = 0;
  return ACTIONS[ask](loaded, options, async (progress) => {
    if (performance.now() - last > 30) { // thirty pictures a second are enough
      last = performance.now();
      self.postMessage({ id, progress });
      await pause();
    }
    return !stopped.delete(id);
  });
}

self.onmessage = async ({ data }) => {
  if ("stop" in data) {
    stopped.add(data.stop);
    return;
  }
  try {
    self.postMessage({ id: data.id, result: await answer(data) });
  } catch (error) {
    const sentence = error instanceof ModelError ? error.message : `The engine failed: ${error.message}.`;
    self.postMessage({ id: data.id, error: sentence });
  }
};

// The page's requests to its own server.

import { translated } from "./words/words.js";

function headers(body) {
  const key = sessionStorage.getItem("keifu.key");
  const type = body instanceof FormData ? {} : { "Content-Type": "application/json" };
  return { ...type, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function checked(response) {
  if (response.ok) return response;
  let message = `${response.status} ${response.statusText}`;
  try {
    message = translated((await response.json()).error.message);
  } catch { /* what answered is not keifu */ }
  throw Object.assign(new Error(message), { needsKey: response.status === 401 });
}

export const read = async (path) => checked(await fetch(path, { headers: headers({}) }));

export const models = async () => (await (await read("/v1/models")).json()).data;

function post(path, body, signal) {
  const data = body instanceof FormData ? body : JSON.stringify(body);
  return fetch(path, { method: "POST", headers: headers(body), body: data, signal }).then(checked);
}

export const ask = async (path, body) => (await post(path, body)).json();

// The events of a stream, each a JSON object; an error of the server on the way is thrown.
export async function* events(path, body, signal) {
  if (body instanceof FormData) body.set("stream", "true");
  const response = await post(path, body instanceof FormData ? body : { ...body, stream: true }, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^(event: .*\n)?data: /, "");
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(translated(event.error.message));
      yield event;
    }
  }
}

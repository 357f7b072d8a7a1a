// Listen: what is said in a sound file or into the microphone, written down by a Whisper.

import { ask } from "../api.js";
import { onFiles, onSend, panel } from "../panel.js";
import { element } from "../render.js";
import { say } from "../words/words.js";

const RATE = 16000; // samples a second, which is what the model hears
const listen = panel("listen");
const player = listen.form.querySelector("audio");
const button = document.getElementById("record");
let sound = null; // the file that is sent
let recorder = null;
let show = () => {};

function take(file) {
  if (!file) return;
  sound = file;
  URL.revokeObjectURL(player.src);
  player.src = URL.createObjectURL(file);
  player.hidden = false;
  show = () => {};
  listen.found.replaceChildren();
}

// A WAV file of one channel: a server need not know every format that a browser records.
function wav(samples) {
  const view = new DataView(new ArrayBuffer(44 + 2 * samples.length));
  const text = (at, word) => [...word].forEach((letter, n) => view.setUint8(at + n, letter.charCodeAt(0)));
  text(0, "RIFF");
  view.setUint32(4, 36 + 2 * samples.length, true);
  text(8, "WAVEfmt ");
  view.setUint32(16, 16, true);
  view.setUint16(20, 1, true);
  view.setUint16(22, 1, true);
  view.setUint32(24, RATE, true);
  view.setUint32(28, 2 * RATE, true);
  view.setUint16(32, 2, true);
  view.setUint16(34, 16, true);
  text(36, "data");
  view.setUint32(40, 2 * samples.length, true);
  samples.forEach((value, n) => view.setInt16(44 + 2 * n, Math.max(-1, Math.min(1, value)) * 32767, true));
  return new File([view], "recording.wav", { type: "audio/wav" });
}

async function resampled(blob) {
  const decoded = await new OfflineAudioContext(1, 1, RATE).decodeAudioData(await blob.arrayBuffer());
  const whole = new OfflineAudioContext(1, Math.ceil(decoded.duration * RATE), RATE);
  const source = new AudioBufferSourceNode(whole, { buffer: decoded });
  source.connect(whole.destination);
  source.start();
  return wav((await whole.startRendering()).getChannelData(0));
}

function named() {
  button.textContent = say(recorder ? "stopRecording" : "record");
}

async function record() {
  if (recorder) return recorder.stop();
  try {
    const stream = await navigator.mediaDevices.getUserMedia({ audio: true });
    recorder = new MediaRecorder(stream);
  } catch {
    return listen.told(say("noMicrophone"), true);
  }
  const parts = [];
  recorder.addEventListener("dataavailable", ({ data }) => parts.push(data));
  recorder.addEventListener("stop", async () => {
    for (const track of recorder.stream.getTracks()) track.stop();
    recorder = null;
    named();
    listen.told("");
    take(await resampled(new Blob(parts)));
  });
  recorder.start();
  listen.told(say("recording"));
  return named();
}

button.addEventListener("click", record);
onFiles(listen.form.querySelector(".drop"), ([file]) => take(file));

const clock = (seconds) => `${Math.floor(seconds / 60)}:${(seconds % 60).toFixed(1).padStart(4, "0")}`;

// A segment; a click plays the sound from its beginning.
function line({ start, end, text }) {
  const play = () => {
    player.currentTime = start;
    player.play();
  };
  const time = element("button", { type: "button", class: "plain number", onclick: play }, `${clock(start)} – ${clock(end)}`);
  return element("p", { class: "spoken" }, time, element("span", {}, text.trim()));
}

onSend(listen, async (given) => {
  if (!sound) throw new Error(say("chooseSound"));
  const form = new FormData();
  form.set("file", sound);
  form.set("model", given.get("model"));
  form.set("response_format", "verbose_json");
  if (given.get("spoken").trim()) form.set("language", given.get("spoken").trim());
  const found = await ask(`/v1/audio/${given.get("task")}`, form);
  show = () => listen.found.replaceChildren(...(found.segments.length ? found.segments.map(line) : [say("nothingSaid")]));
  show();
});
document.addEventListener("language", () => {
  named();
  show();
});
named();

// What the tabs beside the chat share: a form whose answer is shown below it, or an error; files that are dropped.

import { say } from "./words/words.js";

export function panel(id) {
  const found = document.getElementById(id);
  const told = found.querySelector(".told");
  return {
    form: found.querySelector("form"),
    found: found.querySelector(".found"),
    told: (text, isError = false) => {
      told.textContent = text;
      told.classList.toggle("error", isError);
    },
  };
}

// Does the work when the form is sent, once at a time.
export function onSend({ form, told }, work) {
  const button = form.querySelector("button:not([type])");
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    button.disabled = true;
    told(say("working"));
    try {
      told((await work(new FormData(form))) ?? "");
    } catch (error) {
      if (error.name === "AbortError") told(say("stopped"));
      else told(error instanceof TypeError && error.message.includes("fetch") ? say("lost") : error.message, true);
    }
    button.disabled = false;
  });
}

// Hands on the files that are chosen or dropped at a label.
export function onFiles(label, take) {
  const field = label.querySelector("input");
  field.addEventListener("change", () => take([...field.files]));
  const over = (is) => (event) => {
    event.preventDefault();
    label.classList.toggle("over", is);
  };
  label.addEventListener("dragover", over(true));
  label.addEventListener("dragleave", over(false));
  label.addEventListener("drop", (event) => {
    over(false)(event);
    take([...event.dataTransfer.files]);
  });
}

// A place in a canvas that the pointer or the keyboard (arrow keys, then space) means; act(x, y, began) in its pixels.
export function onPlaces(canvas, act, moved = () => {}) {
  const at = { x: canvas.width / 2, y: canvas.height / 2 };
  let pressed = false;
  const point = (event) => {
    const box = canvas.getBoundingClientRect();
    at.x = ((event.clientX - box.left) * canvas.width) / box.width;
    at.y = ((event.clientY - box.top) * canvas.height) / box.height;
  };
  canvas.addEventListener("pointerdown", (event) => {
    pressed = true;
    canvas.setPointerCapture(event.pointerId);
    point(event);
    act(at.x, at.y, true);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!pressed) return;
    point(event);
    act(at.x, at.y, false);
  });
  canvas.addEventListener("pointerup", () => { pressed = false; });
  canvas.addEventListener("keydown", (event) => {
    const [x, y] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key] ?? [0, 0];
    if (event.key === " ") act(at.x, at.y, true);
    else if (!x && !y) return;
    event.preventDefault();
    at.x = Math.max(0, Math.min(canvas.width - 1, at.x + (x * canvas.width) / 32));
    at.y = Math.max(0, Math.min(canvas.height - 1, at.y + (y * canvas.height) / 32));
    moved(at.x, at.y);
  });
}

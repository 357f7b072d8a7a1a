// The tabs, of which those are shown that a model of this server can fill.

import "./chat.js";
import "./look.js";
import "./listen.js";
import "./draw.js";
import "./match.js";
import "./neuron.js";
import "./runs.js";

const tabs = [...document.querySelectorAll("[role=tab]")];
const NEEDED = { look: "inspection", translate: "translation", listen: "transcription", draw: "image", match: "match" };
const shown = () => tabs.filter((tab) => !tab.hidden);

function choose(tab, focused = false) {
  for (const each of tabs) {
    const chosen = each === tab;
    each.setAttribute("aria-selected", String(chosen));
    each.tabIndex = chosen ? 0 : -1;
    document.getElementById(each.getAttribute("aria-controls")).hidden = !chosen;
  }
  document.dispatchEvent(new CustomEvent("tab", { detail: tab.getAttribute("aria-controls") }));
  history.replaceState(null, "", `#${tab.getAttribute("aria-controls")}`);
  if (focused) tab.focus();
}

document.getElementById("tabs").addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!step) return;
  event.preventDefault();
  const all = shown();
  choose(all[(all.indexOf(event.target) + step + all.length) % all.length], true);
});
for (const tab of tabs) {
  tab.addEventListener("click", () => {
    wanted = "";
    choose(tab);
  });
}

let wanted = location.hash.slice(1); // before a choice puts another there
choose(tabs[0]);
document.addEventListener("models", ({ detail }) => {
  for (const tab of tabs) {
    const use = NEEDED[tab.getAttribute("aria-controls")];
    if (tab.id === "tab-runs") continue; // shown where there are runs
    tab.hidden = use !== undefined && !detail.some((model) => model.uses.includes(use));
  }
  for (const list of document.querySelectorAll("[data-use]")) {
    const able = detail.filter((model) => model.uses.includes(list.dataset.use));
    const kept = list.value;
    list.replaceChildren(...able.map((model) => new Option(model.id, model.id)));
    if (able.some((model) => model.id === kept)) list.value = kept;
    list.dispatchEvent(new Event("change"));
  }
  restore();
});
document.addEventListener("runs", restore);

// Goes to the tab that the address names, once it is there.
function restore() {
  const there = shown().find((tab) => tab.getAttribute("aria-controls") === wanted);
  if (!there || tabs[0].ariaSelected !== "true") return;
  wanted = "";
  choose(there);
}

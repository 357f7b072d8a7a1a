// The language of the page: the words of elements, and of messages.

import { EN } from "./en.js";
import { japanese, JA } from "./ja.js";

const WORDS = { en: EN, ja: JA };

let language = localStorage.getItem("keifu.language") ?? document.documentElement.dataset.language
  ?? (navigator.language.startsWith("ja") ? "ja" : "en");

export function say(name, values = {}) {
  const found = WORDS[language][name];
  return Array.isArray(found) ? found : found.replace(/\{(\w+)\}/g, (_, key) => values[key]);
}

// A message of the server in the language of the page.
export const translated = (message) => (language === "ja" ? japanese(message) : message);

export function switchLanguage() {
  language = language === "ja" ? "en" : "ja";
  localStorage.setItem("keifu.language", language);
}

// Puts the words into every element that asks for some, and the language into the links to the lineage.
export function showWords() {
  document.documentElement.lang = language;
  for (const each of document.querySelectorAll("[data-text]")) each.textContent = say(each.dataset.text);
  for (const each of document.querySelectorAll("[data-setting]")) {
    each.textContent = WORDS[language][each.dataset.setting] ?? each.dataset.setting.replaceAll("_", "-");
  }
  for (const each of document.querySelectorAll("[data-label]")) each.setAttribute("aria-label", say(each.dataset.label));
  for (const each of document.querySelectorAll("[data-placeholder]")) each.placeholder = say(each.dataset.placeholder);
  for (const each of document.querySelectorAll("[data-landmark]")) {
    each.href = `/lineage?language=${language}${each.dataset.landmark ? `#${each.dataset.landmark}` : ""}`;
  }
}

// The API's description (/openapi.json) as a page: each path with the fields of its body.

import { element } from "./render.js";

const known = await (await fetch("/openapi.json")).json();
const resolve = (schema) => (schema?.$ref ? known.components.schemas[schema.$ref.split("/").at(-1)] : schema);
const nameOf = (schema) => schema.$ref?.split("/").at(-1);

function kind(schema) {
  if (schema.$ref) return [element("a", { href: `#${nameOf(schema)}` }, nameOf(schema))];
  if (schema.enum) return [schema.enum.map((value) => JSON.stringify(value)).join(" | ")];
  if (schema.const !== undefined) return [JSON.stringify(schema.const)];
  const several = schema.anyOf ?? schema.oneOf;
  if (several) {
    return several.filter((each) => each.type !== "null").flatMap((each, place) => [...(place ? [" or "] : []), ...kind(each)]);
  }
  if (schema.type === "array") return ["list of ", ...kind(schema.items ?? {})];
  const ends = [schema.minimum ?? "", schema.maximum ?? ""];
  return [`${schema.format === "binary" ? "file" : schema.type ?? "any"}${ends.join("") === "" ? "" : ` ${ends.join(" … ")}`}`];
}

function fields(schema) {
  const needed = schema.required ?? [];
  const rows = Object.entries(schema.properties ?? {}).map(([name, each]) => element(
    "tr", {}, element("td", {}, element("code", {}, name), needed.includes(name) ? " (needed)" : ""),
    element("td", {}, ...kind(each)),
    element("td", {}, each.default === undefined || each.default === null ? "" : JSON.stringify(each.default)),
  ));
  const head = ["field", "kind", "unless given"].map((word) => element("th", { scope: "col" }, word));
  return element("div", { class: "wide" }, element("table", {}, element("tr", {}, ...head), ...rows));
}

function described(schema, title) {
  const about = element("p", {}, schema.description ?? "");
  return element("section", { id: title }, element("h3", {}, title), about, fields(schema));
}

for (const [path, methods] of Object.entries(known.paths)) {
  for (const [method, each] of Object.entries(methods)) {
    const found = element("section", {}, element("h2", {}, element("code", {}, `${method.toUpperCase()} ${path}`)));
    found.append(element("p", {}, each.summary ?? ""));
    for (const [type, { schema }] of Object.entries(each.requestBody?.content ?? {})) {
      found.append(element("p", {}, resolve(schema).description ?? "", ` (${type})`), fields(resolve(schema)));
    }
    document.getElementById("paths").append(found);
  }
}
const parts = Object.entries(known.components?.schemas ?? {}).filter(([name]) => !name.includes("ValidationError"));
document.getElementById("paths").append(...parts.map(([name, schema]) => described(schema, name)));

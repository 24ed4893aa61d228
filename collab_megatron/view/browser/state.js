// What is open, as the address after # : a link opens the same tree, reply and future again.
//
//     #t=0.0.12.3.table-17&r=2&f=1&v=lanes&text=friday&sort=spread

import { NO_FILTER, SORTS } from "./list.js";

export const VIEWS = ["tree", "lanes", "related"];
const ALL = "all"; // of a filter whose first value is another

/** What a file shows before anything was chosen. */
export function firstState(index) {
  const filter = { ...NO_FILTER, state: index.firstState };
  return { row: null, reply: 0, future: null, filter, sort: "step", descending: false, view: index.firstState ? "related" : "tree" };
}

export function readState(index, hash) {
  const given = new URLSearchParams(hash.replace(/^#/, ""));
  const key = given.get("t");
  let row = null;
  for (let each = 0; key !== null && row === null && each < index.count; each++) if (index.key(each) === key) row = each;
  const first = firstState(index);
  const filter = { ...first.filter };
  for (const name of Object.keys(filter)) if (given.has(name)) filter[name] = given.get(name) === ALL ? "" : given.get(name);
  const sort = given.get("sort") ?? "step";
  const known = SORTS.includes(sort) || index.metrics.includes(sort.replace(/^metric:/, ""));
  const view = VIEWS.includes(given.get("v")) ? given.get("v") : first.view;
  return { view, row, reply: natural(given.get("r")) ?? 0, future: natural(given.get("f")), filter, sort: known ? sort : "step", descending: given.get("desc") === "1" };
}

export function writtenState(index, state) {
  const kept = new URLSearchParams();
  if (state.row !== null) {
    kept.set("t", index.key(state.row));
    kept.set("r", state.reply);
    if (state.future !== null) kept.set("f", state.future);
  }
  const first = firstState(index);
  for (const [name, value] of Object.entries(state.filter)) if (value !== first.filter[name]) kept.set(name, value || ALL);
  if (state.view !== first.view) kept.set("v", state.view);
  if (state.sort !== "step") kept.set("sort", state.sort);
  if (state.descending) kept.set("desc", "1");
  return `#${kept}`;
}

function natural(text) {
  return text !== null && /^\d{1,6}$/.test(text) ? Number(text) : null;
}

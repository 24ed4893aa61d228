// What is open, as the address after # : a link opens the same tree, reply and future again.
//
//     #t=0.0.12.3.table-17&r=2&f=1&q=friday&sort=spread

import { NO_FILTER, SORTS } from "./list.js";

export function readState(index, hash) {
  const given = new URLSearchParams(hash.replace(/^#/, ""));
  const key = given.get("t");
  let row = null;
  for (let each = 0; key !== null && row === null && each < index.count; each++) if (index.key(each) === key) row = each;
  const filter = { ...NO_FILTER };
  for (const name of Object.keys(filter)) filter[name] = given.get(name) ?? "";
  const sort = given.get("sort") ?? "step";
  const known = SORTS.includes(sort) || index.metrics.includes(sort.replace(/^metric:/, ""));
  return { row, reply: natural(given.get("r")) ?? 0, future: natural(given.get("f")), filter, sort: known ? sort : "step", descending: given.get("desc") === "1" };
}

export function writtenState(index, state) {
  const kept = new URLSearchParams();
  if (state.row !== null) {
    kept.set("t", index.key(state.row));
    kept.set("r", state.reply);
    if (state.future !== null) kept.set("f", state.future);
  }
  for (const [name, value] of Object.entries(state.filter)) if (value) kept.set(name, value);
  if (state.sort !== "step") kept.set("sort", state.sort);
  if (state.descending) kept.set("desc", "1");
  return `#${kept}`;
}

function natural(text) {
  return text !== null && /^\d{1,6}$/.test(text) ? Number(text) : null;
}

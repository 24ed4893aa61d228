// The same prompt elsewhere: in the other run (view --compare) and at other steps (view --steps), next to each other.

import { h } from "preact";
import { useEffect, useState } from "preact/hooks";
import { readTree } from "./data.js";
import { Line, Text, figure, signed } from "./text.js";
import { tone } from "./tree.js";

const MOST = 12; // columns

/** Rows with the prompt of `row`, `row` included, by run and step. Pure. */
export function relatedRows(index, row) {
  const prompt = index.get("prompt", row);
  const rows = [];
  for (let each = 0; each < index.count; each++) if (index.get("prompt", each) === prompt) rows.push(each);
  return rows.sort((a, b) => index.get("step", a) - index.get("step", b) || index.get("run", a) - index.get("run", b) || a - b);
}

export function Related({ index, row, onSelect }) {
  const all = relatedRows(index, row);
  const near = Math.max(0, Math.min(all.indexOf(row) - MOST / 2, all.length - MOST));
  const rows = all.slice(near, near + MOST);
  if (rows.length < 2) return h("p", { class: "none" }, "no other tree has this prompt");
  return h("div", { class: "related" }, rows.map((each) => h(Column, { key: each, index, row: each, here: each === row, onSelect })));
}

function Column({ index, row, here, onSelect }) {
  const [shown, setShown] = useState(null);
  const [error, setError] = useState("");
  useEffect(() => {
    let open = true;
    readTree(index, row).then((tree) => open && setShown(tree), (problem) => open && setError(String(problem)));
    return () => {
      open = false;
    };
  }, [row]);
  const best = shown?.r.reduce((found, reply) => ((reply.mr ?? -Infinity) > (found?.mr ?? -Infinity) ? reply : found), shown.r[0]);
  const source = index.sources[index.get("source", row)];
  const run = index.runs.length > 1 ? (index.get("run", row) ? "B, " : "A, ") : "";
  return h(
    "article",
    { class: here ? "chosen" : "" },
    h("h3", null, h("button", { onClick: () => onSelect(row) }, `${run}step ${index.get("step", row) ?? "–"}`), ` MR ${figure(index.get("mr", row))}`),
    h("p", { class: "none" }, h(Line, { value: source.name }), source.held_out && ", held out"),
    error && h("p", { class: "bad" }, error),
    best && h("div", null, shown.r.length > 1 && h("p", { class: tone(best.a) }, `best of ${shown.r.length}: ${figure(best.mr)} (${signed(best.a)})`), h(Text, { value: best.x })),
    best?.f[0]?.m.map(([role, content]) => h("div", { class: `said ${role === "user" ? "user" : "assistant"}` }, h(Text, { value: content }))),
  );
}

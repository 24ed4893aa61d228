// MR by metric: for every reply one bar per metric, the mean raw score over its futures that have one.

import { h } from "preact";
import { Line, figure, signed } from "./text.js";
import { tone } from "./tree.js";

/** [{mr, advantage, means: Map of metric to mean}] of every reply. Pure; a missing score is left out, never a 0. */
export function meansByMetric(shown) {
  return shown.r.map((reply) => {
    const found = new Map(); // names are untrusted: an object would take __proto__ for its own
    for (const future of reply.f) {
      for (const [name, score] of Object.entries(future.s)) {
        if (score === null) continue;
        if (!found.has(name)) found.set(name, []);
        found.get(name).push(score);
      }
    }
    const means = new Map([...found].map(([name, values]) => [name, values.reduce((a, b) => a + b) / values.length]));
    return { mr: reply.mr, advantage: reply.a, means };
  });
}

export function Bars({ shown, reply, onOpen }) {
  const rows = meansByMetric(shown);
  const metrics = [...new Set(rows.flatMap((row) => [...row.means.keys()]))].sort();
  const most = new Map(metrics.map((name) => [name, Math.max(1e-9, ...rows.map((row) => Math.abs(row.means.get(name) ?? 0)))]));
  return h(
    "table",
    { class: "bars" },
    h("thead", null, h("tr", null, h("th", null, "reply"), h("th", null, "MR"), h("th", null, "advantage"), metrics.map((name) => h("th", null, h(Line, { value: name }))))),
    h(
      "tbody",
      null,
      rows.map((row, number) =>
        h(
          "tr",
          { class: number === reply ? "chosen" : "", onClick: () => onOpen(number, null) },
          h("th", null, number + 1),
          h("td", null, figure(row.mr, 3)),
          h("td", { class: tone(row.advantage) }, signed(row.advantage)),
          metrics.map((name) =>
            h(
              "td",
              null,
              row.means.has(name) && h("meter", { min: 0, max: most.get(name), value: Math.abs(row.means.get(name)), "aria-hidden": true }),
              ` ${figure(row.means.get(name), 3)}`,
            ),
          ),
        ),
      ),
    ),
  );
}

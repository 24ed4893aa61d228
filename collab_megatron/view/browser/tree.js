// The tree drawn: prompt, replies, futures, laid out by d3-hierarchy. A click or Enter opens the node's reply or future.

import { h } from "preact";
import { useMemo } from "preact/hooks";
import { hierarchy, tree } from "d3-hierarchy";
import { STATUS_SCORED } from "./data.js";
import { figure, label, signed } from "./text.js";

const NODE_HEIGHT = 19;
const DEPTHS = [0, 84, 400]; // x of prompt, replies, futures
const BOX = [70, 300, 300]; // widths of their labels

/** {reply, future} of every node, with coordinates. Pure. */
export function layout(shown) {
  const root = hierarchy({
    name: "prompt",
    children: shown.r.map((reply, number) => ({
      name: reply.x,
      reply: number,
      children: reply.f.map((future, other) => ({ name: future.st, said: future.m[0]?.[1] ?? "", reply: number, future: other })),
    })),
  });
  tree().nodeSize([NODE_HEIGHT, 1]).separation(() => 1)(root);
  const nodes = root.descendants();
  for (const node of nodes) node.y = DEPTHS[node.depth];
  const top = Math.min(...nodes.map((node) => node.x));
  const bottom = Math.max(...nodes.map((node) => node.x));
  return { nodes, links: root.links(), top, height: bottom - top + 2 * NODE_HEIGHT, width: DEPTHS[2] + BOX[2] + 12 };
}

/** The class that colours a value around 0: good, bad or neutral. */
export function tone(value) {
  return value === null || value === undefined ? "missing" : value > 0 ? "good" : value < 0 ? "bad" : "neutral";
}

export function Tree({ shown, reply, future, onOpen }) {
  const { nodes, links, top, height, width } = useMemo(() => layout(shown), [shown]);
  const y = (node) => node.x - top + NODE_HEIGHT;
  return h(
    "svg",
    { class: "tree", viewBox: `0 0 ${width} ${height}`, width, height, role: "tree", "aria-label": "prompt, replies and futures" },
    links.map(({ source, target }) =>
      h("path", {
        class: "link",
        d: `M${source.y + 8 + BOX[source.depth]},${y(source)}L${target.y + 2},${y(target)}`,
      }),
    ),
    nodes.map((node) => {
      const each = node.data;
      const isReply = node.depth === 1;
      const chosen = node.depth > 0 && each.reply === reply && (isReply || each.future === future);
      const data = isReply ? shown.r[each.reply] : node.depth ? shown.r[each.reply].f[each.future] : null;
      const value = isReply ? data.a : data?.rw;
      const words = isReply ? `${figure(data.mr)} (${signed(data.a)}) ${label(each.name)}` : node.depth ? `${figure(data.rw)} ${label(each.name)}${data.copy ? " (copy)" : ""}${each.said ? `: ${label(each.said)}` : ""}` : "prompt";
      const open = () => node.depth && onOpen(each.reply, isReply ? null : each.future);
      return h(
        "g",
        {
          class: `node ${tone(value)}${chosen ? " chosen" : ""}${node.depth === 2 && !STATUS_SCORED.has(each.name) ? " failed" : ""}`,
          transform: `translate(${node.y + 8},${y(node)})`,
          role: "treeitem",
          "aria-level": node.depth + 1,
          "aria-selected": chosen,
          tabIndex: node.depth ? 0 : -1,
          onClick: open,
          onKeyDown: (event) => event.key === "Enter" && open(),
        },
        h("rect", { x: -6, y: -8, width: BOX[node.depth], height: 16, rx: 4 }),
        h("circle", { r: 4 }),
        h("text", { x: 9, y: 4, direction: "ltr", "unicode-bidi": "isolate" }, words),
      );
    }),
  );
}

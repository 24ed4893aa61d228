// The list of trees: filter, sort, and the rows in view only (@tanstack/virtual-core).

import { h } from "preact";
import { useEffect, useLayoutEffect, useMemo, useReducer, useRef, useState } from "preact/hooks";
import { Virtualizer, elementScroll, observeElementOffset, observeElementRect } from "@tanstack/virtual-core";
import { Line, dollars, figure, label } from "./text.js";

const ROW_HEIGHT = 44; // pixels, as in viewer.css
export const SORTS = ["step", "mr", "best", "spread", "advantage", "asked", "tokens", "seconds", "usd"];
export const NO_FILTER = { text: "", source: "", step: "", asked: "", failure: "", state: "" };

/** The rows that a filter keeps, in order. Pure. */
export function chosenRows(index, filter, sort, descending) {
  const words = filter.text.toLowerCase().split(/\s+/).filter(Boolean);
  const [from, to] = stepRange(filter.step);
  const rows = [];
  for (let row = 0; row < index.count; row++) {
    const step = index.get("step", row);
    if (filter.source !== "" && index.get("source", row) !== Number(filter.source)) continue;
    if (step < from || step > to) continue;
    const asked = index.get("asked", row);
    if (filter.asked === "yes" && !(asked > 0)) continue;
    if (filter.asked === "no" && asked !== 0) continue;
    const failures = index.get("failures", row);
    if (filter.failure === "any" && !Object.keys(failures).length) continue;
    if (filter.failure === "none" && Object.keys(failures).length) continue;
    if (filter.failure && !["any", "none"].includes(filter.failure) && !Object.hasOwn(failures, filter.failure)) continue;
    if (filter.state === "dropped" && index.get("kept", row)) continue;
    if (filter.state === "replaced" && !index.get("replaced", row)) continue;
    if (filter.state === "trained" && index.get("trained", row) !== true) continue;
    if (filter.state === "ambiguous" && index.get("ambiguous", row) !== true) continue;
    if (filter.state === "complete" && index.get("ambiguous", row) !== false) continue;
    if (filter.state === "both" && !index.inBoth(index.get("prompt", row))) continue;
    if (filter.state === "again" && index.timesOf(index.get("prompt", row)) < 2) continue;
    if (words.length) {
      const text = `${index.get("title", row)} ${index.get("task", row)}`.toLowerCase();
      if (!words.every((word) => text.includes(word))) continue;
    }
    rows.push(row);
  }
  const value = sort.startsWith("metric:") ? (row) => index.score(sort.slice(7), row) : (row) => index.get(sort, row);
  const sign = descending ? -1 : 1;
  return rows.sort((a, b) => {
    const x = value(a) ?? null;
    const y = value(b) ?? null;
    if (x === null || y === null) return x === y ? a - b : x === null ? 1 : -1; // without a figure: at the end
    return x === y ? a - b : sign * (x < y ? -1 : 1);
  });
}

/** "12" or "0-40"; anything else keeps all. */
function stepRange(text) {
  const match = /^\s*(\d+)\s*(?:-\s*(\d+)?\s*)?$/.exec(text);
  if (!match) return [-Infinity, Infinity];
  const open = text.includes("-");
  return [Number(match[1]), match[2] ? Number(match[2]) : open ? Infinity : Number(match[1])];
}

export function Filters({ index, filter, sort, descending, onFilter, onSort }) {
  const failures = useMemo(() => [...new Set(index.columns.failures?.flatMap((each) => Object.keys(each)))].sort(), [index]);
  const choice = (key, name, options) =>
    h(
      "select",
      { "aria-label": name, value: filter[key], onChange: (event) => onFilter({ ...filter, [key]: event.currentTarget.value }) },
      h("option", { value: "" }, name),
      options.map(([value, what]) => h("option", { value }, label(what, 40))),
    );
  return h(
    "form",
    { class: "filters", role: "search", onSubmit: (event) => event.preventDefault() },
    h("input", {
      id: "search",
      type: "search",
      placeholder: "words of the prompt or task  ( / )",
      "aria-label": "words of the prompt or task",
      value: filter.text,
      onInput: (event) => onFilter({ ...filter, text: event.currentTarget.value }),
    }),
    h("input", {
      class: "steps",
      placeholder: "steps: 5-20",
      "aria-label": "steps",
      value: filter.step,
      onInput: (event) => onFilter({ ...filter, step: event.currentTarget.value }),
    }),
    index.sources.length > 1 && choice("source", "all records", index.sources.map((each, n) => [String(n), `${each.run ? "B: " : ""}${each.name}${each.held_out ? " (held out)" : ""}`])),
    choice("asked", "asked or not", [["yes", "a reply asks"], ["no", "no reply asks"]]),
    choice("failure", "failed or not", [["any", "any failure"], ["none", "no failure"], ...failures.map((name) => [name, name])]),
    choice("state", "all trees", [["trained", "trained"], ["dropped", "dropped"], ["replaced", "replaced"], ["ambiguous", "something missing"], ["complete", "nothing missing"], ["again", "same prompt elsewhere"], ...(index.runs.length > 1 ? [["both", "prompts of both runs"]] : [])]),
    h(
      "select",
      { "aria-label": "sort by", value: sort, onChange: (event) => onSort(event.currentTarget.value, descending) },
      SORTS.map((name) => h("option", { value: name }, `by ${LABELS[name] ?? name}`)),
      index.metrics.map((name) => h("option", { value: `metric:${name}` }, `by ${label(name, 40)}`)),
    ),
    h("button", { type: "button", title: "turn the order around", onClick: () => onSort(sort, !descending) }, descending ? "↓" : "↑"),
  );
}

const LABELS = { mr: "MR", best: "best MR", spread: "spread of MR", advantage: "largest advantage", asked: "share that asks", usd: "cost" };

function useVirtualRows(count, scroller) {
  const [, render] = useReducer((number) => number + 1, 0);
  const [virtualizer] = useState(
    () =>
      new Virtualizer({
        count,
        getScrollElement: () => scroller.current,
        estimateSize: () => ROW_HEIGHT,
        overscan: 12,
        scrollToFn: elementScroll,
        observeElementRect,
        observeElementOffset,
        onChange: render,
      }),
  );
  virtualizer.setOptions({ ...virtualizer.options, count, onChange: render });
  useEffect(() => virtualizer._didMount(), []);
  useLayoutEffect(() => virtualizer._willUpdate());
  return virtualizer;
}

export function List({ index, rows, selected, onSelect }) {
  const scroller = useRef(null);
  const virtualizer = useVirtualRows(rows.length, scroller);
  const place = rows.indexOf(selected);
  useEffect(() => {
    if (place >= 0) virtualizer.scrollToIndex(place, { align: "auto" });
  }, [place]);
  return h(
    "div",
    { class: "list", ref: scroller, role: "listbox", tabIndex: 0, "aria-label": "trees", "aria-activedescendant": place >= 0 ? `row-${selected}` : undefined },
    h(
      "div",
      { class: "rows", style: { height: `${virtualizer.getTotalSize()}px` } },
      virtualizer.getVirtualItems().map((item) => {
        const row = rows[item.index];
        return h(Row, { key: row, index, row, top: item.start, selected: row === selected, onSelect });
      }),
    ),
  );
}

function Row({ index, row, top, selected, onSelect }) {
  const failed = Object.keys(index.get("failures", row));
  return h(
    "div",
    {
      id: `row-${row}`,
      class: `row${selected ? " selected" : ""}${index.get("kept", row) ? "" : " dropped"}`,
      role: "option",
      "aria-selected": selected,
      style: { transform: `translateY(${top}px)` },
      onClick: () => onSelect(row),
    },
    h("span", { class: "step", title: "step" }, index.runs.length > 1 ? (index.get("run", row) ? "B " : "A ") : "", index.get("step", row) ?? "–"),
    h(Line, { value: index.get("title", row), class: "title" }),
    h(
      "span",
      { class: "figures" },
      h("b", { title: "mean multiturn-aware reward of the replies" }, `MR ${figure(index.get("mr", row))}`),
      index.get("replies", row) > 1 && h("span", { title: "highest minus lowest MR" }, `spread ${figure(index.get("spread", row))}`),
      index.get("asked", row) > 0 && h("span", { title: "share of replies that ask" }, index.get("replies", row) > 1 ? `${Math.round(100 * index.get("asked", row))}% ask` : "asks"),
      index.get("usd", row) > 0 && h("span", { title: "dollars of the calls" }, dollars(index.get("usd", row))),
      failed.length > 0 && h("strong", { class: "bad", title: failed.map((name) => label(name, 60)).join(", ") }, "failed"),
      index.sources[index.get("source", row)].held_out && h("i", { title: index.sources[index.get("source", row)].name }, "held out"),
    ),
  );
}

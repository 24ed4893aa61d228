// The conversation viewer: a list on the left, the open tree on the right. Data comes from the file itself (data.js).

import { h, render } from "preact";
import { useEffect, useLayoutEffect, useMemo, useRef, useState } from "preact/hooks";
import { Bars } from "./bars.js";
import { Conversation } from "./conversation.js";
import { readIndex, readTree } from "./data.js";
import { keyAction } from "./keys.js";
import { Lanes } from "./lanes.js";
import { Filters, List, chosenRows } from "./list.js";
import { Related, relatedRows } from "./related.js";
import { readState, writtenState } from "./state.js";
import { Line, Text, counted, dollars, figure, weights } from "./text.js";
import { Tree } from "./tree.js";

const ADDRESS_MS = 150; // until the address follows what is open
const HELP = [
  ["j k", "next, previous tree"],
  ["n p", "next, previous reply"],
  ["f b", "next, previous future"],
  ["t", "thoughts and reasons"],
  ["c", "the same prompt elsewhere"],
  ["l", "lanes of time"],
  ["/", "search"],
  ["d", "dark or light"],
  ["?", "this help"],
];

function App({ index }) {
  const [state, setState] = useState(() => readState(index, location.hash));
  const [secrets, setSecrets] = useState(false);
  const [help, setHelp] = useState(false);
  const [theme, setTheme] = useState("");
  const detail = useRef(null);
  const { view } = state;
  const setView = (name) => change({ view: name });
  const change = (part) => setState((old) => ({ ...old, ...part }));
  const rows = useMemo(() => chosenRows(index, state.filter, state.sort, state.descending), [state.filter, state.sort, state.descending]);
  const [tree, setTree] = useState({ row: null, shown: null, error: "" });

  useEffect(() => {
    // later, because browsers refuse hundreds of changes in a few seconds, which a held key makes
    const timer = setTimeout(() => {
      const written = writtenState(index, state);
      if (written !== location.hash) history.replaceState(null, "", written);
    }, ADDRESS_MS);
    return () => clearTimeout(timer);
  }, [state]);
  useEffect(() => {
    const listen = () => setState(readState(index, location.hash));
    addEventListener("hashchange", listen);
    return () => removeEventListener("hashchange", listen);
  }, []);
  useEffect(() => {
    document.documentElement.dataset.theme = theme;
  }, [theme]);
  useEffect(() => {
    let open = true;
    detail.current.scrollTop = 0;
    if (state.row === null) setTree({ row: null, shown: null, error: "" });
    else
      readTree(index, state.row).then(
        (shown) => open && setTree({ row: state.row, shown, error: "" }),
        (error) => open && setTree({ row: state.row, shown: null, error: String(error) }),
      );
    return () => {
      open = false;
    };
  }, [state.row]);

  const shown = tree.row === state.row ? tree.shown : null;
  const reply = Math.min(state.reply, (shown?.r.length ?? 1) - 1);
  const futures = shown?.r[reply]?.f.length ?? 0;
  const future = state.future !== null && state.future < futures ? state.future : futures ? 0 : null;
  const open = (r, f) => change({ reply: r, future: f });

  // a layout effect: with one after the next frame, a key pressed by then would act on the state before the last key
  useLayoutEffect(() => {
    const press = (event) => {
      const action = keyAction(event);
      if (!action) return;
      event.preventDefault();
      const place = rows.indexOf(state.row);
      if (action === "nextTree" || action === "previousTree") {
        const next = rows[Math.max(0, Math.min(rows.length - 1, place + (action === "nextTree" ? 1 : -1)))];
        if (next !== undefined) change({ row: next, reply: 0, future: null });
      } else if (action === "nextReply" || action === "previousReply") {
        const count = shown?.r.length ?? 0;
        if (count) change({ reply: (reply + (action === "nextReply" ? 1 : count - 1)) % count, future: null });
      } else if (action === "nextFuture" || action === "previousFuture") {
        if (futures) change({ future: ((future ?? 0) + (action === "nextFuture" ? 1 : futures - 1)) % futures });
      } else if (action === "secrets") setSecrets(!secrets);
      else if (action === "compare") setView(view === "related" ? "tree" : "related");
      else if (action === "lanes") setView(view === "lanes" ? "tree" : "lanes");
      else if (action === "search") document.getElementById("search").focus();
      else if (action === "theme") setTheme((theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark" ? "light" : "dark");
      else if (action === "help") setHelp(!help);
      else if (action === "close") {
        setHelp(false);
        document.activeElement?.blur();
      }
    };
    addEventListener("keydown", press);
    return () => removeEventListener("keydown", press);
  });

  const select = (row) => change({ row, reply: 0, future: null });
  return h(
    "main",
    null,
    h(
      "aside",
      null,
      h("h1", null, index.runs.map((run, number) => h("span", null, index.runs.length > 1 && `${"AB"[number]}: `, h(Line, { value: run })))),
      h(Filters, { index, filter: state.filter, sort: state.sort, descending: state.descending, onFilter: (filter) => change({ filter }), onSort: (sort, descending) => change({ sort, descending }) }),
      h("p", { class: "count", role: "status" }, `${rows.length.toLocaleString("en")} of ${counted(index.count, "tree")}`, index.left_out > 0 && `, ${index.left_out.toLocaleString("en")} are not in this file`),
      h(List, { index, rows, selected: state.row, onSelect: select }),
    ),
    h(
      "section",
      { class: "detail", ref: detail, "aria-label": "the open tree" },
      help && h("dialog", { open: true }, h("dl", null, HELP.map(([key, what]) => [h("dt", null, key), h("dd", null, what)]))),
      state.row === null && h("p", { class: "none" }, "Open a tree: click, or press j. ? lists the keys."),
      tree.error && h("p", { class: "bad" }, tree.error),
      shown && h(Detail, { index, row: state.row, shown, reply, future, secrets, view, onView: setView, onOpen: open, onSelect: select, onSecrets: () => setSecrets(!secrets) }),
    ),
  );
}

function Detail({ index, row, shown, reply, future, secrets, view, onView, onOpen, onSelect, onSecrets }) {
  const same = useMemo(() => relatedRows(index, row).length - 1, [row]);
  const tab = (name, label) => h("button", { class: view === name ? "chosen" : "", "aria-pressed": view === name, onClick: () => onView(name) }, label);
  const versions = index.get("versions", row);
  return h(
    "div",
    null,
    h(
      "header",
      { class: "head" },
      h("h2", null, `step ${index.get("step", row) ?? "–"}, `, h(Line, { value: shown.id })),
      h("p", null, `MR ${figure(index.get("mr", row), 3)}, `, shown.r.length > 1 && `spread ${figure(index.get("spread", row), 3)}, `, `${counted(index.get("tokens", row), "policy token")}, ${figure(index.get("seconds", row))} s, calls `, dollars(index.get("usd", row)), versions && `, weights ${weights(versions)}`, shown.begun !== null && shown.begun !== index.get("step", row) && `, begun for step ${shown.begun}`),
      shown.error && h(Text, { value: shown.error, class: "bad" }),
      h("details", null, h("summary", null, "the complete task, which only the user knows"), h(Text, { value: shown.task }), h("h4", null, "reference"), h(Text, { value: shown.truth })),
    ),
    h("nav", null, tab("tree", "tree"), tab("lanes", "time"), tab("related", `same prompt (${same})`), h("button", { "aria-pressed": secrets, class: secrets ? "chosen" : "", onClick: onSecrets }, "thoughts")),
    view === "related" && h(Related, { index, row, onSelect }),
    view === "lanes" && h(Lanes, { shown, reply, future, onOpen }),
    view === "tree" && shown.r.length > 0 && h("div", { class: "drawn" }, h("div", { class: "scrolled" }, h(Tree, { shown, reply, future, onOpen })), h(Bars, { shown, reply, onOpen })),
    view !== "related" && shown.r.length > 0 && h(Conversation, { key: `${row}.${reply}.${future}`, shown, reply, future, run: index.get("run", row), secrets }),
  );
}

const app = document.getElementById("app");
try {
  render(h(App, { index: readIndex() }), app);
} catch (error) {
  app.textContent = `This file cannot be shown: ${error}`;
  throw error;
}

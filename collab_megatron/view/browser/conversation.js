// A reply and one of its futures as a chat, with what is hidden from the policy on demand: the user's thoughts, the
// judges' reasons and marks, scores, details, cost.

import { h, Fragment } from "preact";
import { useMemo } from "preact/hooks";
import { STATUS_SCORED } from "./data.js";
import { Strip } from "./strip.js";
import { Line, Text, counted, dollars, figure, signed } from "./text.js";
import { tone } from "./tree.js";

export function Conversation({ shown, reply, future, run, secrets }) {
  const each = shown.r[reply];
  const play = future === null ? null : each.f[future];
  return h(
    "section",
    { class: "conversation", "aria-label": "conversation" },
    shown.p.map(([role, content]) => h(Message, { role, content })),
    h(Message, { role: "assistant", content: each.x, mark: `reply ${reply + 1}`, value: each.a, note: notes(each) }, h(Thought, { value: each.th, open: secrets, of: "policy" }), h(Strip, { turn: each, run })),
    play && h(Future, { play, run, secrets }),
  );
}

function notes(turn) {
  return [turn.cut && "cut", turn.re && "from the journal", !turn.cut && turn.fin !== "stop" && turn.fin].filter(Boolean).join(", ");
}

function Message({ role, content, mark = "", value, note = "", children }) {
  return h(
    "article",
    { class: `message ${["user", "assistant", "system"].includes(role) ? role : "other"}` },
    h("header", null, h(Line, { value: role }), mark && ` ${mark}`, value !== undefined && value !== null && h("span", { class: tone(value) }, ` advantage ${signed(value)}`), note && h("em", null, ` ${note}`)),
    h(Text, { value: content }),
    children,
  );
}

function Thought({ value, open, of }) {
  return value ? h("details", { class: "thought", open }, h("summary", null, `the ${of}'s thought`), h(Text, { value })) : null;
}

function Future({ play, run, secrets }) {
  const users = play.c.filter((call) => !call.me);
  const judges = play.c.filter((call) => call.me);
  let user = firstUserCall(play, users);
  let turn = 0;
  return h(
    Fragment,
    null,
    play.m.map(([role, content]) => {
      if (role === "user") {
        const call = users[user++];
        return h(Message, { role, content, mark: call && call.role !== role ? call.role : "" }, call && h(Thought, { value: call.th, open: secrets, of: "user" }));
      }
      const policy = play.tu[turn++];
      return h(Message, { role, content, value: policy?.a, note: policy ? notes(policy) : "" }, policy && h(Thought, { value: policy.th, open: secrets, of: "policy" }), policy && h(Strip, { turn: policy, run }));
    }),
    h(
      "section",
      { class: "verdict" },
      h("h3", null, "reward ", h("span", { class: tone(play.rw) }, figure(play.rw, 3)), " ", h("span", { class: STATUS_SCORED.has(play.st) ? "" : "bad" }, h(Line, { value: play.st })), play.copy && " (copied from an equal one)"),
      play.error && h(Text, { value: play.error, class: "bad" }),
      h(
        "table",
        null,
        h("tbody", null, Object.entries(play.s).map(([name, score]) => h("tr", null, h("th", null, h(Line, { value: name })), h("td", null, figure(score, 3)), h("td", null, Object.hasOwn(play.s2, name) && `second judge ${figure(play.s2[name], 3)}`), h("td", null, Object.hasOwn(play.d, name) && h(Details, { value: play.d[name], open: secrets }))))),
      ),
      judges.map((call) => h(Verdict, { call, open: secrets })),
      h("p", { class: "cost" }, `${counted(play.c.length, "call")}, `, dollars(play.c.reduce((sum, call) => sum + (call.usd ?? 0), 0)), `, ${play.tok === null ? "–" : counted(play.tok, "policy token")}`),
    ),
  );
}

/**
 * The index of the call that made the first user turn. Below 0: a request brought the first turns of several futures, and
 * another future has it. Above 0: the first call made the opening of an evaluation. Only a scored future shows which;
 * one that failed may end with a call that made no turn. Pure.
 */
export function firstUserCall(play, users) {
  const more = users.length - play.m.filter(([role]) => role === "user").length;
  return STATUS_SCORED.has(play.st) ? more : Math.min(0, more);
}

function Details({ value, open }) {
  const text = useMemo(() => JSON.stringify(value, null, 1), [value]);
  return h("details", { open }, h("summary", null, "details"), h(Text, { value: text }));
}

function Verdict({ call, open }) {
  const marks = Object.entries(call.mk);
  return h(
    "details",
    { class: "thought judge", open },
    h("summary", null, h(Line, { value: `${call.role}: ${call.me}` }), " ", h("small", null, h(Line, { value: call.mo }), call.sh && ", shared answer", call.re && ", from the journal")),
    call.error && h(Text, { value: call.error, class: "bad" }),
    call.th && h(Text, { value: call.th }),
    call.x && h(Text, { value: call.x }),
    marks.length > 0 && h("dl", null, marks.map(([name, value]) => h(Fragment, null, h("dt", null, h(Line, { value: name })), h("dd", null, h(Line, { value: typeof value === "string" ? value : JSON.stringify(value) }))))),
  );
}

// Lanes of time: what the engine, the users and the judges did, and what waited for what. A bar is a turn or a call; the
// thin line before it is the time since the answer that it needed: in a queue, behind a limit, or behind other work.

import { h } from "preact";
import { useMemo } from "preact/hooks";

const BAR = 9; // pixels of height
const GAP = 3;
const WIDTH = 900;
const LEFT = 76;

/** Every bar of a tree: {lane, begin, end, needed, reply, future, label}. Times in ms. Pure. */
export function bars(shown) {
  const found = [];
  shown.r.forEach((reply, r) => {
    if (reply.t) found.push({ lane: "engine", begin: reply.t[0], end: reply.t[1], needed: reply.t[0], reply: r, future: null, label: `reply ${r + 1}` });
    reply.f.forEach((future, f) => {
      // the turns of a conversation follow each other; its judges all need its last turn
      const talk = [
        ...future.tu.filter((turn) => turn.t).map((turn) => ({ lane: "engine", t: turn.t, label: "policy turn" })),
        ...future.c.filter((call) => call.t && !call.me).map((call) => ({ lane: "user", t: call.t, label: call.role })),
      ].sort((a, b) => a.t[0] - b.t[0]);
      let last = reply.t ? reply.t[1] : 0;
      for (const part of talk) {
        found.push({ lane: part.lane, begin: part.t[0], end: part.t[1], needed: Math.min(last, part.t[0]), reply: r, future: f, label: part.label });
        last = Math.max(last, part.t[1]);
      }
      for (const call of future.c) {
        if (call.t && call.me) found.push({ lane: "judge", begin: call.t[0], end: call.t[1], needed: Math.min(last, call.t[0]), reply: r, future: f, label: `${call.role}: ${call.me}` });
      }
    });
  });
  return found;
}

/** Gives every bar of a lane a line on which it overlaps no other. Pure. */
export function stacked(lane) {
  const ends = [];
  return [...lane]
    .sort((a, b) => a.needed - b.needed)
    .map((bar) => {
      let line = ends.findIndex((end) => end <= bar.needed);
      if (line < 0) line = ends.length;
      ends[line] = Math.max(bar.end, bar.begin + 1);
      return { ...bar, line };
    });
}

export function Lanes({ shown, reply, future, onOpen }) {
  const { lanes, end, height } = useMemo(() => {
    const all = bars(shown);
    let top = 0;
    const found = ["engine", "user", "judge"].map((name) => {
      const lane = stacked(all.filter((bar) => bar.lane === name));
      const lines = lane.reduce((most, bar) => Math.max(most, bar.line + 1), 1);
      const place = { name, lane, top };
      top += lines * (BAR + GAP) + 10;
      return place;
    });
    return { lanes: found, end: all.reduce((most, bar) => Math.max(most, bar.end), 1), height: top + 18 };
  }, [shown]);
  const x = (ms) => LEFT + (ms / end) * (WIDTH - LEFT - 10);
  return h(
    "svg",
    { class: "lanes", viewBox: `0 0 ${WIDTH} ${height}`, role: "img", "aria-label": "when engine, users and judges worked" },
    lanes.map(({ name, lane, top }) =>
      h(
        "g",
        { class: `lane ${name}`, transform: `translate(0,${top})` },
        h("text", { x: 4, y: BAR }, name),
        lane.map((bar) => {
          const y = bar.line * (BAR + GAP);
          const chosen = bar.reply === reply && (future === null || bar.future === null || bar.future === future);
          return h(
            "g",
            { class: chosen ? "chosen" : "", onClick: () => onOpen(bar.reply, bar.future) },
            bar.needed < bar.begin && h("line", { class: "wait", x1: x(bar.needed), x2: x(bar.begin), y1: y + BAR / 2, y2: y + BAR / 2 }),
            h("rect", { x: x(bar.begin), y, width: Math.max(1, x(bar.end) - x(bar.begin)), height: BAR, rx: 2 }),
            h("title", null, `reply ${bar.reply + 1}${bar.future === null ? "" : `, future ${bar.future + 1}`}: ${bar.label}, ${bar.end - bar.begin} ms after ${bar.begin - bar.needed} ms of waiting`),
          );
        }),
      ),
    ),
    h("text", { class: "axis", x: LEFT, y: height - 4 }, "0 s"),
    h("text", { class: "axis end", x: WIDTH - 10, y: height - 4 }, `${(end / 1000).toFixed(2)} s`),
  );
}

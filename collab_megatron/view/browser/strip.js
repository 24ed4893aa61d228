// Token log-probs as a heat strip: the less probable a sampled token was, the darker. A bar marks a change of weight
// version. Without a tokenizer (view --tokenizer) a token is shown by its id.

import { h } from "preact";
import { useEffect, useState } from "preact/hooks";
import { readWords } from "./data.js";
import { Line, counted, weights } from "./text.js";

const SHADES = 8; // classes heat-0 to heat-7 of viewer.css
const DARKEST = -6; // log-prob
const FIRST = 800; // tokens

/** The shade of a log-prob; null where the engine gave none. Pure. */
export function shade(logprob) {
  if (logprob === null || logprob === undefined) return null;
  return Math.min(SHADES - 1, Math.floor((Math.max(DARKEST, Math.min(0, logprob)) / DARKEST) * SHADES));
}

/** Positions at which the weight version changes, with the new version. Pure. */
export function versionChanges(runs) {
  const changes = new Map();
  let position = 0;
  for (const [version, length] of runs) {
    changes.set(position, version);
    position += length;
  }
  return changes;
}

export function Strip({ turn, run }) {
  const [words, setWords] = useState({});
  const [limit, setLimit] = useState(FIRST);
  useEffect(() => {
    let here = true;
    readWords(run).then((found) => here && setWords(found));
    return () => {
      here = false;
    };
  }, [run]);
  if (!turn.ids.length) return null;
  const changes = versionChanges(turn.vr);
  const sum = turn.lp.reduce((total, each) => total + (each ?? 0), 0);
  return h(
    "details",
    { class: "strip" },
    h("summary", null, counted(turn.ids.length, "token"), turn.lp.length > 0 && `, mean log-prob ${(sum / turn.lp.length).toFixed(3)}`, turn.vr.length > 0 && `, weights ${turn.vr.map(([version]) => weights([version, version])).join(" → ")}`),
    h(
      "div",
      { class: "tokens" },
      turn.ids.slice(0, limit).map((id, place) => {
        const heat = shade(turn.lp[place]);
        return [
          changes.has(place) && h("span", { class: "version", title: "weight version from here on" }, `weights ${weights([changes.get(place), changes.get(place)])}`),
          h(
            "span",
            { class: `token ${heat === null ? "" : `heat-${heat}`}`, title: `id ${id}, log-prob ${turn.lp[place] ?? "none"}` },
            h(Line, { value: (words[id] ?? `${id}`).replaceAll("\n", "⏎") }),
          ),
        ];
      }),
      limit < turn.ids.length && h("button", { class: "more", onClick: () => setLimit(limit + 4000) }, `${turn.ids.length - limit} tokens more`),
    ),
  );
}

// Untrusted text on the page. Strings become text nodes (Preact escapes nothing because it never parses markup).
//
// A bidirectional control or another invisible character could show a text in another order than it has, or hide a part
// of it: each is shown by its code point. A long text is cut, with a button for the next part, so that a turn of 2 MB
// does not lay out 2 MB.

import { h } from "preact";
import { useState } from "preact/hooks";

const FIRST = 6000; // characters
const MORE = 100000;
const LONGEST_LINE = 300;
// bidirectional controls, zero-width and other format characters, C0 and C1 controls other than tab and line feed
const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]|[\u{e0000}-\u{e007f}]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/gu;
const JOINER = "\u200d"; // part of emoji; shown only where it joins none

export function parts(text) {
  const found = [];
  let end = 0;
  for (const match of text.matchAll(HIDDEN)) {
    const character = match[0];
    if (character === JOINER && /\p{Extended_Pictographic}\ufe0f?$/u.test(text.slice(Math.max(0, match.index - 4), match.index))) continue;
    if (match.index > end) found.push(text.slice(end, match.index));
    found.push({ code: `U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}` });
    end = match.index + character.length;
  }
  if (end < text.length) found.push(text.slice(end));
  return found;
}

function shown(text) {
  return parts(text).map((part) => (typeof part === "string" ? part : h("span", { class: "code", title: "an invisible character of the text" }, part.code)));
}

/** A text of any length. dir=auto and isolation keep right-to-left text from moving what stands around it. */
export function Text({ value, class: name = "" }) {
  const [limit, setLimit] = useState(FIRST);
  if (!value) return h("span", { class: "none" }, "empty");
  const rest = value.length - limit;
  // a pair of surrogates is not cut in two
  const end = rest > 0 && /[\ud800-\udbff]/.test(value[limit - 1]) ? limit - 1 : limit;
  return h(
    "div",
    { class: `text ${name}`, dir: "auto" },
    shown(value.slice(0, end)),
    rest > 0 && h("button", { class: "more", onClick: () => setLimit(limit + MORE) }, `${rest.toLocaleString("en")} characters more`),
  );
}

/** A short text on one line, as in the list. A name may have megabytes too. */
export function Line({ value, class: name = "" }) {
  const text = value ?? "";
  return h("bdi", { class: `line ${name}` }, shown(text.length > LONGEST_LINE ? `${text.slice(0, LONGEST_LINE)}…` : text));
}

/** The beginning of a text for where only a string can stand: a node of the tree, a choice, a hint. */
export function label(text, limit = 26) {
  const visible = parts([...text.slice(0, 4 * limit)].slice(0, 2 * limit).join(""))
    .map((part) => (typeof part === "string" ? part : `[${part.code}]`))
    .join("")
    .replace(/\s+/g, " ");
  const characters = [...visible]; // a pair of surrogates is one
  return characters.length > limit ? `${characters.slice(0, limit - 1).join("")}…` : visible;
}

export function figure(value, digits = 2) {
  if (value === null || value === undefined) return "–";
  const written = value.toFixed(digits);
  return /^-0\.?0*$/.test(written) ? written.slice(1) : written; // no minus in front of what rounds to 0
}

export function signed(value, digits = 2) {
  return value > 0 ? `+${figure(value, digits)}` : figure(value, digits);
}

export function counted(number, noun) {
  return `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;
}

/** The weights of a range of versions; a server that never got weights from a trainer reports -1. */
export function weights([lowest, highest]) {
  const name = (version) => (version < 0 ? "as loaded" : `${version}`);
  return lowest === highest ? name(lowest) : `${name(lowest)} to ${name(highest)}`;
}

export function dollars(value) {
  return value === null || value === undefined ? "–" : value === 0 ? "$0" : `$${value < 0.01 ? value.toFixed(5) : value.toFixed(2)}`;
}

// Reads the payload that payload.py wrote: the index at once, the blocks of trees when one is opened.
//
// Every string in it is untrusted. It reaches the page as text nodes only; text.js makes invisible characters visible.

const FORM = 1; // of the payload
const KEPT_BLOCKS = 24; // inflated blocks in memory

export const STATUS_SCORED = new Set(["terminated", "max_turns", "truncated"]);

export function readIndex() {
  const index = JSON.parse(document.getElementById("index").textContent);
  if (index.form !== FORM) throw new Error(`the data has form ${index.form}, the script knows ${FORM}`);
  const columns = index.columns;
  const count = columns.step ? columns.step.length : 0;
  const times = new Map(); // prompt -> trees that have it
  const runs = new Map(); // prompt -> 1: the first run has it, 2: the second, 3: both
  for (let row = 0; row < count; row++) {
    const prompt = columns.prompt[row];
    times.set(prompt, (times.get(prompt) ?? 0) + 1);
    runs.set(prompt, (runs.get(prompt) ?? 0) | (1 << columns.run[row]));
  }
  const several = Math.max(0, ...times.values()) > 1;
  const shared = [...runs.values()].includes(3);
  // the rows stay columns: an object for each would take longer to build than the first paint may
  return {
    ...index,
    count,
    timesOf: (prompt) => times.get(prompt) ?? 0,
    inBoth: (prompt) => runs.get(prompt) === 3,
    // a file for a comparison opens with what can be compared
    firstState: index.runs.length > 1 && shared ? "both" : (index.runs.length > 1 || index.steps.length > 1) && several ? "again" : "",
    get: (name, row) => columns[name][row],
    score: (metric, row) => index.scores[index.metrics.indexOf(metric)]?.[row] ?? null,
    key: (row) => `${columns.run[row]}.${columns.source[row]}.${columns.step[row]}.${columns.slot[row] ?? "h"}.${columns.task[row]}`,
  };
}

/** Waits for the part of the file after the script, of which the block is one. */
const parsed =
  document.readyState === "loading"
    ? new Promise((done) => document.addEventListener("DOMContentLoaded", done, { once: true }))
    : Promise.resolve();

async function inflated(id) {
  let element = document.getElementById(id);
  if (!element) {
    await parsed;
    element = document.getElementById(id);
  }
  if (!element) throw new Error(`the file has no ${id}: was it cut?`);
  const binary = atob(element.textContent);
  const bytes = Uint8Array.from(binary, (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).json();
}

const blocks = new Map(); // number -> promise of its trees, least recently used first

export async function readTree(index, row) {
  const number = index.get("block", row);
  const block = blocks.get(number) ?? inflated(`block-${number}`);
  blocks.delete(number);
  blocks.set(number, block);
  if (blocks.size > KEPT_BLOCKS) blocks.delete(blocks.keys().next().value);
  return (await block)[index.get("at", row)];
}

const words = new Map(); // run -> promise of {id: text}

export function readWords(run) {
  if (!words.has(run)) words.set(run, inflated(`words-${run}`));
  return words.get(run);
}

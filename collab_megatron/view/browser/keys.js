// Which key does what. A key with a modifier belongs to the browser, a key in a field to the field.

const ACTIONS = {
  j: "nextTree",
  k: "previousTree",
  ArrowDown: "nextTree",
  ArrowUp: "previousTree",
  n: "nextReply",
  p: "previousReply",
  f: "nextFuture",
  b: "previousFuture",
  t: "secrets",
  c: "compare",
  l: "lanes",
  "/": "search",
  d: "theme",
  "?": "help",
  Escape: "close",
};

export function keyAction(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return null;
  const field = event.target instanceof Element && event.target.closest("input, select, textarea");
  if (field && event.key !== "Escape") return null;
  // the arrows scroll the open tree while the focus is in it
  if (event.key.startsWith("Arrow") && event.target instanceof Element && event.target.closest(".detail")) return null;
  return Object.hasOwn(ACTIONS, event.key) ? ACTIONS[event.key] : null;
}

// Bundles the viewer's modules with their libraries into one script, and the libraries' licenses into a file next to it.
//
//     npm ci && npm run build                    collab_megatron/view/bundle/
//     node build.mjs FOLDER_OF_MODULES OUTPUT    elsewhere (tests/view/test_bundle.py)
//
// The script begins with a digest of what it was built from, so a test without node notices a bundle that is too old.

import { createHash } from "node:crypto";
import { mkdirSync, readFileSync, readdirSync, writeFileSync } from "node:fs";
import { dirname, join, resolve } from "node:path";
import { fileURLToPath } from "node:url";
import { build } from "esbuild";

const here = dirname(fileURLToPath(import.meta.url));
const [modules, output] = process.argv.length > 2 ? process.argv.slice(2).map((path) => resolve(path)) : ["browser", "bundle"].map((name) => resolve(here, "../../collab_megatron/view", name));

/** sha256 over name, size and content of every module, then of the lock file. */
function digest() {
  const hash = createHash("sha256");
  const names = readdirSync(modules).filter((name) => name.endsWith(".js")).sort();
  for (const file of [...names.map((name) => join(modules, name)), join(here, "package-lock.json")]) {
    const content = readFileSync(file);
    hash.update(`${file.split("/").at(-1)} ${content.length}\n`).update(content);
  }
  return hash.digest("hex");
}

function licenses() {
  const { dependencies } = JSON.parse(readFileSync(join(here, "package.json"), "utf8"));
  return Object.keys(dependencies).sort().map((name) => {
    const { version } = JSON.parse(readFileSync(join(here, "node_modules", name, "package.json"), "utf8"));
    return `${name} ${version}\n\n${readFileSync(join(here, "node_modules", name, "LICENSE"), "utf8").trim()}\n`;
  }).join("\n\n");
}

mkdirSync(output, { recursive: true });
await build({
  entryPoints: [join(modules, "main.js")],
  outfile: join(output, "viewer.js"),
  banner: { js: `// built from ${digest()}` },
  nodePaths: [join(here, "node_modules")],
  bundle: true,
  minify: true,
  format: "iife",
  target: ["chrome123", "firefox120", "safari17.5"],
  charset: "ascii",
  legalComments: "inline",
});
writeFileSync(join(output, "LICENSES.txt"), licenses());

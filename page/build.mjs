// Builds src/ into ../src/maskwright/web/page/ and writes the hashes of the sources and of the results into app.js,
// by which tests/page/test_built.py sees, without node, that the committed files belong to the sources.
import { createHash } from "node:crypto";
import { mkdirSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { build } from "esbuild";

const here = dirname(fileURLToPath(import.meta.url));
const out = join(here, "..", "src", "maskwright", "web", "page");

const text = (path) => readFileSync(path, "utf8").replaceAll("\r\n", "\n");

/** Hash of names and texts; the test computes the same. */
function digest(files) {
  const hash = createHash("sha256");
  for (const [name, content] of files) hash.update(`${name}\n${Buffer.byteLength(content)}\n${content}`);
  return hash.digest("hex");
}

const sources = readdirSync(join(here, "src"), { recursive: true })
  .map((name) => `src/${name.replaceAll("\\", "/")}`)
  .filter((name) => /\.\w+$/.test(name))
  .concat("build.mjs", "package.json", "tsconfig.json")
  .sort()
  .map((name) => [name, text(join(here, name))]);

const bundled = async (entry, options) => {
  const result = await build({
    entryPoints: [join(here, "src", entry)],
    bundle: true,
    minify: true,
    charset: "utf8",
    target: ["es2022"],
    write: false,
    legalComments: "none",
    logLevel: "warning",
    ...options,
  });
  return result.outputFiles[0].text;
};

const results = [
  ["index.html", text(join(here, "src", "index.html"))],
  ["icon.svg", text(join(here, "src", "icon.svg"))],
  ["app.css", await bundled("app.css", {})],
];
const script = await bundled("main.ts", { format: "iife" });
const banner = `/* maskwright annotate. sources ${digest(sources)} results ${digest([...results, ["app.js", script]])} */\n`;

mkdirSync(out, { recursive: true });
for (const [name, content] of [...results, ["app.js", banner + script]]) {
  writeFileSync(join(out, name), content);
  console.log(`${name}: ${(Buffer.byteLength(content) / 1000).toFixed(1)} kB`);
}

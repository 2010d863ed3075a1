// Builds src/ into ../src/maskwright/web/page/ and writes the hashes of the sources and of the results into app.js,
// by which tests/page/test_built.py sees, without node, that the committed files belong to the sources.
import { createHash } from "node:crypto";
import { existsSync, mkdirSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { gunzipSync, gzipSync } from "node:zlib";
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
  .concat("build.mjs", "onnxruntime.LICENSE", "package.json", "tsconfig.json")
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

// ONNX Runtime Web: its WASM build without GPUs, of which a page loads three files only where it decodes by itself.
const runtime = join(dirname(createRequire(import.meta.url).resolve("onnxruntime-web/wasm")));
const { version } = JSON.parse(text(join(runtime, "..", "package.json")));
const notice = `/*
onnxruntime-web ${version} is a part of this file, or this file is a part of it. Its license:

${text(join(here, "onnxruntime.LICENSE")).trim()}
*/
`;
const decoder = await bundled("worker.ts", { format: "esm", conditions: ["onnxruntime-web-use-extern-wasm"] });

const results = [
  ["index.html", text(join(here, "src", "index.html"))],
  ["icon.svg", text(join(here, "src", "icon.svg"))],
  ["app.css", await bundled("app.css", {})],
  ["decoder.js", notice + decoder],
  ["ort-wasm-simd-threaded.mjs", notice + text(join(runtime, "ort-wasm-simd-threaded.mjs"))],
];
const wasm = readFileSync(join(runtime, "ort-wasm-simd-threaded.wasm"));
const packed = join(out, "ort-wasm-simd-threaded.wasm.gz");
mkdirSync(out, { recursive: true });
if (!existsSync(packed) || !gunzipSync(readFileSync(packed)).equals(wasm))
  writeFileSync(packed, gzipSync(wasm, { level: 9 }));
results.push(["ort-wasm-simd-threaded.wasm", createHash("sha256").update(wasm).digest("hex")]);

const script = await bundled("main.ts", { format: "iife" });
const banner = `/* maskwright annotate. sources ${digest(sources)} results ${digest([...results, ["app.js", script]])} */\n`;

for (const [name, content] of [...results.slice(0, -1), ["app.js", banner + script]]) {
  writeFileSync(join(out, name), content);
  console.log(`${name}: ${(Buffer.byteLength(content) / 1000).toFixed(1)} kB`);
}
console.log(`ort-wasm-simd-threaded.wasm.gz: ${(readFileSync(packed).length / 1e6).toFixed(2)} MB`);

// Bundles and runs the unit tests: `npm test`.
import { mkdtempSync, readdirSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { fileURLToPath, pathToFileURL } from "node:url";
import { build } from "esbuild";

const here = dirname(fileURLToPath(import.meta.url));
const out = mkdtempSync(join(tmpdir(), "maskwright-page-"));
try {
  for (const name of readdirSync(here).filter((file) => file.endsWith(".test.ts"))) {
    const outfile = join(out, name.replace(/ts$/, "mjs"));
    await build({
      entryPoints: [join(here, name)],
      bundle: true,
      platform: "node",
      format: "esm",
      outfile,
      logLevel: "warning",
    });
    await import(pathToFileURL(outfile).href);
  }
} finally {
  rmSync(out, { recursive: true });
}

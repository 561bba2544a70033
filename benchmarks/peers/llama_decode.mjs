// llama.cpp through node-llama-cpp: waits for "go N" lines, decodes N tokens, answers with times.
// node llama_decode.mjs FOLDER_WITH_node_modules MODEL.gguf THREADS PROMPT_TOKENS
import { createRequire } from "module";
import { createInterface } from "readline";

const [, , folder, path, threads, prompt] = process.argv;
const { getLlama } = await import(createRequire(`${folder}/`).resolve("node-llama-cpp"));
const llama = await getLlama({ gpu: false, build: "never", maxThreads: +threads, logLevel: "error" });
const model = await llama.loadModel({ modelPath: path, useMmap: false });
const count = { ideal: +threads, min: +threads };
const context = await model.createContext({ contextSize: 1024, threads: count });
const ids = model.tokenize("The history of the world is long. ".repeat(200)).slice(0, +prompt);
console.log("ready");
for await (const line of createInterface({ input: process.stdin })) {
  const wanted = +line.split(" ")[1];
  const sequence = context.getSequence();
  let done = 0, first = 0, used = 0;
  for await (const _ of sequence.evaluate(ids, { temperature: 0, yieldEogToken: true })) {
    done += 1;
    if (done === 1) { first = performance.now(); used = process.cpuUsage(); }
    if (done === wanted) break;
  }
  const seconds = (performance.now() - first) / 1e3;
  const cpu = process.cpuUsage(used);
  await sequence.dispose();
  console.log(JSON.stringify({ tokens: done - 1, seconds, cpu: (cpu.user + cpu.system) / 1e6 }));
}
process.exit(0);

// Answers jobs by llama.cpp through node-llama-cpp: node in_llama_cpp.mjs JOBS DIRECTORY_WITH_IT
// Jobs and answers are as jobs.py says; one that crashes the process is named by its absent answer.
import { createRequire } from "module";
import { readFileSync, renameSync, writeFileSync } from "fs";
import path from "path";
import { pathToFileURL } from "url";

const [, , jobsFile, directory] = process.argv;
let library, version;
try {
  const require = createRequire(path.resolve(directory, "any.js"));
  const main = require.resolve("node-llama-cpp");
  library = await import(pathToFileURL(main));
  const root = main.slice(0, main.lastIndexOf("node-llama-cpp") + "node-llama-cpp".length);
  const own = JSON.parse(readFileSync(path.join(root, "package.json"), "utf8"));
  const core = JSON.parse(readFileSync(path.join(root, "llama", "binariesGithubRelease.json"), "utf8"));
  version = `node-llama-cpp ${own.version} (llama.cpp ${core.release})`;
} catch (error) {
  console.error(String(error));
  process.exit(3);
}

const said = []; // llama.cpp's own complaints, the last ones
const threads = Number(process.env.OMP_NUM_THREADS || 1);
const llama = await library.getLlama({
  gpu: false, build: "never", maxThreads: threads, logLevel: "error",
  logger: (_, message) => { said.push(message.trim()); if (said.length > 8) said.shift(); },
});

for (const job of JSON.parse(readFileSync(jobsFile, "utf8"))) {
  said.length = 0;
  let answer;
  try {
    answer = await answered(job);
  } catch (error) {
    answer = { refused: { gguf: [...said, String(error?.message ?? error)].join(" ").slice(0, 1000) } };
  }
  writeFileSync(`${job.out}.json.part`, JSON.stringify(answer));
  renameSync(`${job.out}.json.part`, `${job.out}.json`);
}
process.exit(0);

async function answered(job) {
  const model = await llama.loadModel({ modelPath: job.model, useMmap: false });
  const longest = Math.max(...job.sequences.map((s) => s.length), ...job.prompts.map((p) => p.length));
  const contextSize = Math.ceil((longest + job.new_tokens) / 32) * 32;
  const context = await model.createContext({
    contextSize, batchSize: contextSize, sequences: 1, swaFullCache: true, flashAttention: false,
    threads: { ideal: threads, min: threads },
  });
  const sequence = context.getSequence();
  const rows = [];
  for (const tokens of job.sequences) {
    await sequence.clearHistory();
    const wanted = { generateNext: { logits: true, options: { temperature: 0 } } };
    const inputs = tokens.map((token, place) => (place + 1 < tokens.length ? [token, wanted] : token));
    for (const found of await sequence.controlledEvaluate(inputs)) {
      if (found !== undefined) rows.push(logProbabilities(found.next.logits));
    }
  }
  const generated = [];
  for (const tokens of job.prompts) {
    await sequence.clearHistory();
    const next = { generateNext: { token: true, options: { temperature: 0 } } };
    const found = [];
    let inputs = tokens.map((token, place) => (place + 1 < tokens.length ? token : [token, next]));
    while (found.length < job.new_tokens) {
      const answers = await sequence.controlledEvaluate(inputs);
      found.push(answers[inputs.length - 1].next.token);
      inputs = [[found[found.length - 1], next]];
    }
    generated.push(found);
  }
  const tokenizer = model.fileInfo.metadata.tokenizer ?? {};
  const answer = {
    version, dtype: "gguf", refused: {}, generated,
    tokens: job.text === undefined ? undefined : [...model.tokenize(job.text)],
    chat_template: tokenizer.chat_template ?? null,
  };
  writeFileSync(`${job.out}.f32`, Buffer.concat(rows.map((row) => Buffer.from(row.buffer))));
  await context.dispose();
  await model.dispose();
  return answer;
}

function logProbabilities(logits) {
  let largest = -Infinity, sum = 0;
  for (const value of logits.values()) if (value > largest) largest = value;
  for (const value of logits.values()) sum += Math.exp(value - largest);
  const shift = largest + Math.log(sum);
  const row = new Float32Array(logits.size);
  for (const [token, value] of logits) row[token] = value - shift;
  return row;
}

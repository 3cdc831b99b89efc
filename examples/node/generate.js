// Text from a bundle that was exported with `sdgm-edge export --loop`.
//
//     node generate.js bundles/mine "Once upon a time" --count 64 --temperature 0.8 --top-k 40 --seed 1
//
// The whole decoding loop is one graph, generate.onnx: token ids go in, token ids come out.

import { readFileSync } from "node:fs";
import { join } from "node:path";
import { parseArgs } from "node:util";
import { Tokenizer } from "@huggingface/tokenizers";
import { InferenceSession, Tensor } from "onnxruntime-node";

const int64 = (values, shape) => new Tensor("int64", BigInt64Array.from(values, BigInt), shape);

export async function load(folder) {
  const read = (name) => JSON.parse(readFileSync(join(folder, name), "utf8"));
  const session = await InferenceSession.create(join(folder, "generate.onnx"), {
    intraOpNumThreads: 1, // a token of a small model is done before another thread wakes
    interOpNumThreads: 1,
  });
  const config = read("config.json");
  const tokenizer = new Tokenizer(read("tokenizer.json"), {});
  const { begin_token: begin, end_tokens: end } = read("generation_config.json");
  return { session, config, tokenizer, begin, end };
}

// Feed ids, then choose up to `count` tokens: [tokens, the state before the last of them].
async function run({ session, end }, ids, state, count, { temperature = 0, topK = 40, seed = 0 }) {
  const { tokens, next_state } = await session.run({
    ids: int64(ids, [1, ids.length]),
    state,
    count: int64([count], []),
    temperature: new Tensor("float32", [temperature], []),
    top_k: int64([topK], []),
    seed: int64([seed], []),
    end: int64(end, [end.length]),
  });
  return [Array.from(tokens.data, Number), next_state];
}

export async function generate(model, prompt, { count = 64, ...options } = {}) {
  const { state_size: size, chunk } = model.config;
  let ids = [model.begin, ...model.tokenizer.encode(prompt).ids];
  let state = new Tensor("float32", new Float32Array(size), [1, size]);
  for (; ids.length > chunk; ids = ids.slice(chunk)) {
    [, state] = await run(model, ids.slice(0, chunk), state, 1, {}); // the token is not needed
  }
  const [tokens] = await run(model, ids, state, count, options);
  return tokens;
}

if (process.argv[1] === import.meta.filename) {
  const { values, positionals } = parseArgs({
    allowPositionals: true,
    options: {
      count: { type: "string", default: "64" },
      temperature: { type: "string", default: "0" },
      "top-k": { type: "string", default: "40" },
      seed: { type: "string", default: "0" },
      ids: { type: "boolean", default: false }, // print token ids, not text
    },
  });
  const [folder, prompt = ""] = positionals;
  if (folder === undefined) {
    console.error("usage: node generate.js BUNDLE [PROMPT] [--count N --temperature T --top-k K --seed S --ids]");
    process.exit(2);
  }
  const model = await load(folder);
  const tokens = await generate(model, prompt, {
    count: Number(values.count),
    temperature: Number(values.temperature),
    topK: Number(values["top-k"]),
    seed: Number(values.seed),
  });
  const text = () => model.tokenizer.decode(tokens, { skip_special_tokens: true });
  console.log(values.ids ? JSON.stringify(tokens) : prompt + text());
}

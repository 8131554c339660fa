// OpenAI's unmodified client over streams that break. The package is looked for where NODE_PATH or
// a node_modules folder has it.

import { after, before, test } from "node:test";
import assert from "node:assert/strict";
import { createRequire } from "node:module";

import { StreamError, everlineFetch } from "../src/index.js";
import { QUICK, fakeCluster } from "./support.js";

let OpenAI;
try {
  ({ default: OpenAI } = createRequire(import.meta.url)("openai"));
} catch {
  OpenAI = null;
}
const skip = OpenAI === null ? "npm install openai, and set NODE_PATH to its node_modules" : false;
const messages = [{ role: "user", content: "x" }];

let cluster;
let client;
before(async () => {
  cluster = await fakeCluster();
  if (OpenAI !== null) client = new OpenAI({ baseURL: `${cluster.url}/v1`, apiKey: "k", maxRetries: 0, fetch: everlineFetch(QUICK) });
});
after(() => cluster.stop());


test("chat, completions and responses", { skip }, async () => {
  const faults = [{ at: 350, how: "rst" }, { at: 20, how: "fin" }, { status: 503 }, { at: 600, how: "end" }];
  const fake = { events: 20, faults, dribble: 11 };
  let count = 0;
  for await (const chunk of await client.chat.completions.create({ model: "m", messages, stream: true, fake })) {
    count += chunk.choices.length;
  }
  assert.equal(count, 20);
  for await (const chunk of await client.completions.create({ model: "m", prompt: "x", stream: true, fake })) {
    count += chunk.choices.length;
  }
  assert.equal(count, 40);
  for await (const event of await client.responses.create({ model: "m", input: "x", stream: true, fake })) {
    count += event.type === "response.output_text.delta" ? 1 : 0;
  }
  assert.equal(count, 60);
  const asked = (await cluster.log()).map((said) => said.method);
  assert.deepEqual(asked, Array.from({ length: 3 }, () => ["POST", "GET", "GET", "GET", "GET"]).flat());
});

test("leaving a stream cancels it", { skip }, async () => {
  const fake = { events: 500, interval: 0.02 };
  for await (const _ of await client.chat.completions.create({ model: "m", messages, stream: true, fake })) break;
  for (;;) {
    if ((await cluster.log()).some((said) => said.path.endsWith("/cancel"))) break;
    await new Promise((resolve) => setTimeout(resolve, 10));
  }
});

test("a stream that is lost is an error", { skip }, async () => {
  const fake = { faults: [{ at: 300, how: "fin" }, { status: 410, code: "stream_lost" }] };
  const stream = await client.chat.completions.create({ model: "m", messages, stream: true, fake });
  const read = async () => {
    for await (const _ of stream);
  };
  const error = await read().catch((thrown) => thrown);
  assert.ok([error, error.cause].some((one) => one instanceof StreamError && one.code === "stream_lost"), error);
});

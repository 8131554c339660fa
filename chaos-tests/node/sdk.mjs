// Asks through OpenAI's client for JavaScript.
//
// Usage: node --throw-deprecation sdk.mjs BASE_URL MODEL
//
// The package is looked for where NODE_PATH or a node_modules folder beside the working
// directory has it.

import { createRequire } from "node:module";
import assert from "node:assert/strict";

const { default: OpenAI } = createRequire(`${process.cwd()}/`)("openai");
const [baseURL, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "unused", maxRetries: 0, timeout: 20_000 });

const models = [];
for await (const one of client.models.list()) models.push(one.id);
assert.ok(models.includes(model), "the model is listed");

let answers = 0;
for (let round = 0; round < 3; round += 1) {
  const prompt = `prompt number ${round}`;
  const chat = { model, messages: [{ role: "user", content: prompt }], max_tokens: 24 };

  const { data: whole, response } = await client.chat.completions.create(chat).withResponse();
  assert.ok(response.headers.get("everline-worker") && response.headers.get("x-request-id"));
  const text = whole.choices[0].message.content;
  assert.ok(text);
  assert.equal(whole.usage.completion_tokens, 24);

  let streamed = "";
  let reason = null;
  for await (const chunk of await client.chat.completions.create({ ...chat, stream: true })) {
    streamed += chunk.choices[0]?.delta?.content ?? "";
    reason = chunk.choices[0]?.finish_reason ?? reason;
  }
  assert.deepEqual([streamed, reason], [text, "length"]);

  // An early end, by the client's own means.
  const cut = await client.chat.completions.create({ ...chat, max_tokens: 400, stream: true });
  for await (const _ of cut) break;

  const completion = { model, prompt, max_tokens: 24 };
  const plain = (await client.completions.create(completion)).choices[0].text;
  streamed = "";
  for await (const chunk of await client.completions.create({ ...completion, stream: true })) {
    streamed += chunk.choices[0]?.text ?? "";
  }
  assert.equal(streamed, plain);

  const vectors = (await client.embeddings.create({ model, input: [prompt, "another"] })).data;
  assert.deepEqual([vectors.length, vectors[0].embedding.length], [2, 64]);
  answers += 6;
}

const expect = async (kind, status, code, act) => {
  const error = await act().then(() => null, (error) => error);
  assert.ok(error instanceof kind, `${kind.name} expected, got ${error}`);
  assert.equal(error.status, status);
  if (code) assert.equal(error.code, code);
  assert.ok(error.requestID, "the error names its request");
  answers += 1;
};
const ask = (more) => client.completions.create({ model, prompt: "x", max_tokens: 2, ...more });
await expect(OpenAI.NotFoundError, 404, "model_not_found", () => ask({ model: "nobody-serves-this" }));
await expect(OpenAI.BadRequestError, 400, "missing_model", () => ask({ model: "" }));
await expect(OpenAI.BadRequestError, 400, null, () => ask({ max_tokens: -1 }));

console.log(`${answers} answers as expected`);

// Streams that break in every way.

import { after, afterEach, before, test } from "node:test";
import assert from "node:assert/strict";
import { createServer } from "node:net";
import { once } from "node:events";

import { StreamError, everlineFetch } from "../src/index.js";
import { KEY, QUICK, chat, chatText, datas, fakeCluster, fetched } from "./support.js";

let cluster;
let url;
before(async () => {
  cluster = await fakeCluster();
  url = `${cluster.url}/v1/chat/completions`;
});
afterEach(() => cluster.log());
after(() => cluster.stop());

/** Fetches a stream that breaks as told; it must be whole. Returns what was asked. */
async function same(fake, options) {
  const straight = await fetched(url, chat({ ...fake, faults: [] }));
  await cluster.log();
  const { response, text } = await fetched(url, chat(fake), options);
  assert.equal(response.status, 200);
  // The text depends on the body, so only its shape can be compared with the other's.
  assert.equal(datas(text).length, datas(straight.text).length);
  const pieces = chatText(text);
  const again = await cluster.log();
  const key = again[0].headers["idempotency-key"];
  const replayed = await fetched(url, chat(fake), {}, { headers: { ...KEY, "idempotency-key": key } });
  assert.equal(replayed.response.headers.get("everline-attached"), "1");
  assert.equal(pieces, chatText(replayed.text), "the same as the cluster has it");
  await cluster.log();
  return again;
}

const methods = (log) => log.map((said) => said.method);

test("a stream that is not cut is asked for once", async () => {
  const [post, ...others] = await same({ events: 30 });
  assert.equal(others.length, 0);
  assert.equal(post.headers["everline-resume"], "1");
  assert.match(post.headers["idempotency-key"], /^everline-client-[0-9a-f]{32}$/);
});

test("cut anywhere in any way, the events are the same", async () => {
  for (const how of ["fin", "rst", "end"]) {
    for (let at = 0; at < 700; at += 83) {
      const log = await same({ events: 4, faults: [{ at, how }] });
      assert.deepEqual(methods(log), ["POST", "GET"], `${how} ${at}`);
    }
  }
});

test("many cuts of one stream, dribbled", async () => {
  const faults = [300, 1, 333, 0, 517, 250].flatMap((at) => ["rst", "end", "fin"].map((how) => ({ at, how })));
  const log = await same({ events: 40, dribble: 3, faults });
  assert.equal(log.length, 1 + faults.length);
  assert.equal(new Set(log.map((said) => said.peer)).size, log.length, "each over a connection of its own");
  assert.ok(log.every((said) => said.headers.authorization === "Bearer k"));
});

test("a silent connection is given up, a slow one with heartbeats is not", async () => {
  const began = performance.now();
  await same({ events: 9, faults: [{ at: 400, how: "stall" }] }, { stallTimeout: 200 });
  assert.ok(performance.now() - began < 3000);
  const log = await same({ events: 2, interval: 0.6, ping: 0.05 }, { stallTimeout: 300 });
  assert.equal(log.length, 1);
});

test("a request that died before its head is sent again with the same key", async () => {
  const log = await same({ events: 5, faults: [{ how: "dead" }, { status: 503 }] });
  assert.deepEqual(methods(log), ["POST", "POST", "POST"]);
  assert.equal(new Set(log.map((said) => said.headers["idempotency-key"])).size, 1);
});

test("a head that does not come is waited for as long as was said", async () => {
  const log = await same({ events: 5, faults: [{ how: "mute" }] }, { headTimeout: 200 });
  assert.deepEqual(methods(log), ["POST", "POST"]);
  assert.equal(new Set(log.map((said) => said.headers["idempotency-key"])).size, 1);
});

test("a name that could lead elsewhere is not asked for", async () => {
  const faults = [{ at: 300, how: "end", name: "../models?x=" }];
  const error = await fetched(url, chat({ faults })).catch((thrown) => thrown);
  assert.equal(error.code, "not_resumable", String(error));
  assert.equal((await cluster.log()).length, 1);
});

test("answers that may pass are waited out", async () => {
  const faults = [{ at: 300, how: "rst" }, { status: 503 }, { status: 429 }, { status: 502 }, { how: "dead" }];
  assert.equal((await same({ events: 9, faults })).length, 6);
});

test("a first answer is the caller's, whatever it is", async () => {
  for (const status of [401, 429, 503]) {
    const { response } = await fetched(url, chat({ faults: [{ status }] }));
    assert.equal(response.status, status);
    assert.equal((await cluster.log()).length, 1);
  }
});

test("final answers are told at once", async () => {
  for (const status of [204, 400, 401, 403, 404, 410, 412]) {
    const faults = [{ at: 300, how: "fin" }, { status, code: "stream_expired" }];
    const error = await fetched(url, chat({ faults })).catch((thrown) => thrown);
    assert.ok(error instanceof StreamError, String(error));
    assert.equal(error.code, status === 204 ? "incomplete" : "stream_expired");
    assert.equal(error.status, status);
    assert.ok(error.message.includes(error.stream));
    assert.equal((await cluster.log()).length, 2, "asked once, and not cancelled");
  }
});

test("no progress within the budget is an error", async () => {
  const again = Array.from({ length: 500 }, () => [{ at: 0, how: "end" }, { how: "dead" }]).flat();
  const began = performance.now();
  const faults = [{ at: 400, how: "rst" }, ...again];
  const error = await fetched(url, chat({ events: 9, faults }), { retryBudget: 400 }).catch((thrown) => thrown);
  assert.equal(error.code, "unreachable", String(error));
  assert.ok(performance.now() - began < 3000);
  assert.ok((await cluster.log()).length > 8);
});

test("a missing event is never passed over and a repeated one never passed on", async () => {
  const cut = { at: 400, how: "rst" };
  await same({ events: 9, faults: [cut, { skip: 1 }, { again: 1 }] });
  const faults = [cut, ...Array.from({ length: 500 }, () => ({ skip: 1 }))];
  const error = await fetched(url, chat({ events: 9, faults }), { retryBudget: 200 }).catch((thrown) => thrown);
  assert.match(error.message, /was expected/);
});

test("other routes end with their own events", async () => {
  for (const [path, last] of [["responses", "response.completed"], ["messages", "message_stop"], ["completions", ""]]) {
    const faults = [200, 700, 900].map((at) => ({ at, how: "end" }));
    const { text } = await fetched(`${cluster.url}/v1/${path}`, chat({ events: 9, faults }));
    const said = datas(text);
    assert.ok(last === "" ? said.at(-1) === "[DONE]" : JSON.parse(said.at(-1)).type === last);
    assert.deepEqual(methods(await cluster.log()), ["POST", "GET", "GET", "GET"]);
  }
});

/** Waits for the cluster to have been told. */
async function cancelled() {
  for (;;) {
    const told = (await cluster.log()).find((said) => said.path.endsWith("/cancel"));
    if (told !== undefined) return told;
    await new Promise((resolve) => setTimeout(resolve, 10));
  }
}

test("an abort cancels the generation, and ends the body at once", async () => {
  const controller = new AbortController();
  const fetch = everlineFetch(QUICK);
  const body = chat({ events: 500, interval: 0.5 });
  const response = await fetch(url, { method: "POST", headers: KEY, body, signal: controller.signal });
  const reader = response.body.getReader();
  await reader.read();
  const reading = reader.read();
  controller.abort();
  await assert.rejects(reading, { name: "AbortError" });
  assert.equal((await cancelled()).headers.authorization, "Bearer k");
});

test("an abort while reconnecting ends that too", async () => {
  const controller = new AbortController();
  const fetch = everlineFetch({ ...QUICK, backoffMin: 10_000, backoffMax: 10_000 });
  const faults = [{ at: 400, how: "rst" }, { status: 503 }];
  const body = chat({ events: 9, faults });
  const response = await fetch(url, { method: "POST", headers: KEY, body, signal: controller.signal });
  setTimeout(() => controller.abort(), 100);
  await assert.rejects(response.text(), { name: "AbortError" });
  await cancelled();
});

test("cancelling the body cancels the generation", async () => {
  const fetch = everlineFetch(QUICK);
  const response = await fetch(url, { method: "POST", headers: KEY, body: chat({ events: 500, interval: 0.02 }) });
  const reader = response.body.getReader();
  await reader.read();
  await reader.cancel();
  await cancelled();
});

test("a request whose signal is aborted already is not sent", async () => {
  const init = { signal: AbortSignal.abort() };
  await assert.rejects(fetched(url, chat({}), {}, init), { name: "AbortError" });
  assert.equal((await cluster.log()).length, 0);
});

test("nothing is read before it is asked for", async () => {
  let reads = 0;
  const counting = async (input, init) => {
    const response = await fetch(input, init);
    const reader = response.body.getReader();
    const pull = async (controller) => {
      reads += 1;
      const { done, value } = await reader.read();
      if (done) controller.close();
      else controller.enqueue(value);
    };
    return new Response(new ReadableStream({ pull }, { highWaterMark: 0 }), { status: 200, headers: response.headers });
  };
  const wrapped = everlineFetch({ ...QUICK, fetch: counting });
  const response = await wrapped(url, { method: "POST", headers: KEY, body: chat({ events: 50, interval: 0.001 }) });
  await new Promise((resolve) => setTimeout(resolve, 100));
  assert.equal(reads, 0);
  assert.ok(chatText(await response.text()).length > 0);
  assert.ok(reads > 1);
});

test("a Request object is resumed as well", async () => {
  const fetch = everlineFetch(QUICK);
  const body = chat({ events: 9, faults: [{ at: 400, how: "rst" }] });
  const response = await fetch(new Request(url, { method: "POST", headers: KEY, body }));
  assert.equal(datas(await response.text()).length, 10);
  assert.deepEqual(methods(await cluster.log()), ["POST", "GET"]);
});

test("whole answers, and clients that resume by themselves, pass untouched", async () => {
  const whole = await fetched(url, JSON.stringify({ model: "m", fake: { events: 3 } }));
  assert.match(whole.text, /pieces/);
  const [post] = await cluster.log();
  assert.ok(!("everline-resume" in post.headers) && !("idempotency-key" in post.headers));
  const headers = { ...KEY, "everline-resume": "1" };
  await fetched(url, chat({ events: 9, faults: [{ at: 300, how: "end" }] }), {}, { headers });
  assert.equal((await cluster.log()).length, 1);
});

/** An address at which nobody listens. */
async function nobody() {
  const server = createServer();
  server.listen(0, "127.0.0.1");
  await once(server, "listening");
  const { port } = server.address();
  server.close();
  return `http://127.0.0.1:${port}`;
}

test("an address nobody listens at is tried again, and then an error", async () => {
  const base = await nobody();
  for (const body of [chat({}), JSON.stringify({ model: "m" })]) {
    const began = performance.now();
    await assert.rejects(fetched(`${base}/v1/chat/completions`, body, { connectBudget: 200 }), TypeError);
    assert.ok(performance.now() - began > 150);
  }
});

test("further addresses are tried in turn", async () => {
  const base = await nobody();
  const faults = [{ at: 300, how: "rst" }, { at: 300, how: "fin" }];
  const options = { baseURLs: [cluster.url, base] };
  const { text } = await fetched(`${base}/v1/chat/completions`, chat({ events: 9, faults }), options);
  assert.equal(datas(text).length, 10);
  assert.deepEqual(methods(await cluster.log()), ["POST", "GET", "GET"]);
});

test("options that make no sense are refused", () => {
  assert.throws(() => everlineFetch({ heartbeat: -1 }), /heartbeat/);
  assert.throws(() => everlineFetch({ stallTimeout: "5s" }), /stallTimeout/);
  for (const wrong of ["r2:8080", "ftp://x", "http://x/v1"]) {
    assert.throws(() => everlineFetch({ baseURLs: [wrong] }), TypeError);
  }
});

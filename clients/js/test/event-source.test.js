// The unmodified @microsoft/fetch-event-source: it sends its POST again with Last-Event-ID, which is
// a resumption. It takes note of an event's id as soon as it has read that line, which is the event's
// last; so by itself it is exact but where a connection ends right behind that line, over our fetch
// everywhere.

import { after, before, test } from "node:test";
import assert from "node:assert/strict";
import { createRequire } from "node:module";

import { everlineFetch } from "../src/index.js";
import { QUICK, chat, chatText, cuttingProxy, datas as datasOf, fakeCluster, fetched } from "./support.js";

let fetchEventSource;
try {
  ({ fetchEventSource } = createRequire(import.meta.url)("@microsoft/fetch-event-source"));
} catch {
  fetchEventSource = undefined;
}
const skip = fetchEventSource === undefined ? "npm install @microsoft/fetch-event-source, and set NODE_PATH" : false;
// It is made for browsers, of which it uses the timers and whether the page is seen.
globalThis.window ??= globalThis;
globalThis.document ??= { hidden: false, addEventListener() {}, removeEventListener() {} };

const { EVERLINE_URL, EVERLINE_MODEL = "everline-demo", EVERLINE_API_KEY = "unused" } = process.env;
const headers = { authorization: `Bearer ${EVERLINE_API_KEY}`, "content-type": "application/json" };

let fake = null;
before(async () => {
  if (EVERLINE_URL === undefined) fake = await fakeCluster();
});
after(() => fake?.stop());

/** The data of all events, and how often it connected. */
async function streamed(url, body, key, fetch) {
  const datas = [];
  let opened = 0;
  await fetchEventSource(url, {
    method: "POST",
    headers: { ...headers, "idempotency-key": key },
    body,
    openWhenHidden: true,
    fetch,
    async onopen(response) {
      assert.equal(response.status, 200);
      opened += 1;
    },
    onmessage({ data }) {
      datas.push(data);
    },
    onclose() {
      if (datas.at(-1) !== "[DONE]") throw new Error("cut off");
    },
    // A connection that is cut is no reason to stop; an answer that is none of ours is.
    onerror(error) {
      if (error instanceof assert.AssertionError) throw error;
      return 5;
    },
  });
  return { datas, opened };
}

/** Streams through a fetch; the text must be that of `straight`. */
async function same(url, body, straight, fetch) {
  const { datas } = await streamed(url, body, crypto.randomUUID(), fetch);
  assert.equal(datas.filter((data) => data === "[DONE]").length, 1);
  const said = (data) => JSON.parse(data).choices.map((choice) => choice.delta.content ?? "").join("");
  assert.equal(datas.slice(0, -1).map(said).join(""), straight);
}

test("it resumes by itself where connections end between two events", { skip, timeout: 20_000 }, async () => {
  if (fake === null) return;
  const url = `${fake.url}/v1/chat/completions`;
  const faults = ["end", "rst", "fin", "end"].map((how, at) => ({ after: 3 + 4 * at, how }));
  // A reset may take away what was sent before it, so let that arrive.
  const body = chat({ events: 60, interval: 0.01, faults });
  const key = crypto.randomUUID();
  const { datas } = await streamed(url, body, key, globalThis.fetch);
  const replayed = await fetched(url, body, {}, { headers: { ...headers, "idempotency-key": key } });
  assert.deepEqual(datas, datasOf(replayed.text));
  assert.equal((await fake.log()).filter((said) => "last-event-id" in said.headers).length, faults.length);
});

test("by itself it is exact where connections are cut within the text of an event", { skip, timeout: 20_000 }, async () => {
  if (fake === null) return;
  const url = `${fake.url}/v1/chat/completions`;
  // Long before the id of the event that is cut.
  const faults = [400, 380, 420, 390].map((at) => ({ at, how: "fin" }));
  const body = chat({ events: 40, interval: 0.005, faults });
  const key = crypto.randomUUID();
  const { datas } = await streamed(url, body, key, globalThis.fetch);
  const replayed = await fetched(url, body, {}, { headers: { ...headers, "idempotency-key": key } });
  assert.deepEqual(datas, datasOf(replayed.text));
});

test("over our fetch it is exact wherever connections are cut", { skip, timeout: 40_000 }, async () => {
  const base = (EVERLINE_URL ?? fake.url).replace(/\/$/, "");
  for (let number = 0; number < 4; number += 1) {
    const content = `Tell me story number ${number}`;
    const asked = { model: EVERLINE_MODEL, stream: true, max_tokens: 120, temperature: 0, messages: [{ role: "user", content }] };
    if (fake !== null) asked.fake = { events: 60, dribble: 5 + number };
    const body = JSON.stringify(asked);
    const straight = await fetched(`${base}/v1/chat/completions`, body, {}, { headers });
    let left = 5;
    const proxy = await cuttingProxy(base, () => {
      left -= 1;
      return left < 0 ? undefined : [1 + Math.floor(Math.random() * 2500), left % 2 === 0 ? "fin" : "rst"];
    });
    await same(`${proxy.url}/v1/chat/completions`, body, chatText(straight.text), everlineFetch(QUICK));
    proxy.stop();
    assert.ok(proxy.state.count > 0, "it was cut");
  }
});

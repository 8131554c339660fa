// Against a real cluster: connections are cut on the way, the text must be that of an uncut run.
//
// EVERLINE_URL is its address, EVERLINE_MODEL a model whose text is the same for the same request
// (the demo's is), EVERLINE_API_KEY a key if it wants one, EVERLINE_STREAMS how many streams.
// Without an address it is the fake cluster.

import { after, before, test } from "node:test";
import assert from "node:assert/strict";

import { chatText, cuttingProxy, fakeCluster, fetched } from "./support.js";

const { EVERLINE_URL, EVERLINE_MODEL = "everline-demo", EVERLINE_API_KEY = "unused", EVERLINE_STREAMS = "6" } = process.env;
const headers = { authorization: `Bearer ${EVERLINE_API_KEY}`, "content-type": "application/json" };

let fake = null;
before(async () => {
  if (EVERLINE_URL === undefined) fake = await fakeCluster();
});
after(() => fake?.stop());

test("streams cut on their way are those that were not", async () => {
  const base = (EVERLINE_URL ?? fake.url).replace(/\/$/, "");
  for (let number = 0; number < Number(EVERLINE_STREAMS); number += 1) {
    const content = `Tell me story number ${number}`;
    const asked = { model: EVERLINE_MODEL, stream: true, max_tokens: 120, temperature: 0, messages: [{ role: "user", content }] };
    if (fake !== null) asked.fake = { events: 120, interval: 0.001, dribble: 1 + number };
    const body = JSON.stringify(asked);
    const straight = await fetched(`${base}/v1/chat/completions`, body, {}, { headers });
    let left = 6;
    const how = () => ["fin", "rst", "stall"][Math.floor(Math.random() * (number % 3 === 0 ? 3 : 2))];
    const proxy = await cuttingProxy(base, () => {
      left -= 1;
      const kind = how();
      const least = kind === "stall" ? 1000 : 1;
      return left < 0 ? undefined : [least + Math.floor(Math.random() * 2500), kind];
    });
    const patience = { stallTimeout: 300, resumeHeadTimeout: 2000 };
    const cut = await fetched(`${proxy.url}/v1/chat/completions`, body, patience, { headers });
    proxy.stop();
    assert.equal(chatText(cut.text), chatText(straight.text), String(number));
    assert.ok(proxy.state.count > 0, "it was cut");
  }
});

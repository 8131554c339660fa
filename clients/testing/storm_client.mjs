// Real JavaScript clients of a real cluster, for the tests that hurt it while they read.
//
// Reads questions from standard input and answers them as their streams end, each a line of JSON:
//
//     {"n": 1, "manner": "js", "base": "http://…", "path": "/v1/completions", "body": {…}}
//     {"n": 1, "stream": "st_…", "edge": "r2", "worker": "e1", "events": ["{…}", …], "ids": ["st_….0", …], "error": null}
//
// `manner` is who asks: `js` is OpenAI's SDK over our fetch, `event-source` the package eventsource,
// which reads with a capability what a POST began, `fetch-event-source` the package of that name,
// both as they are. `events` are the chunks that the SDK gave, or the events' data, in order; `ids`
// their ids where the client tells them. It ends with its standard input.

import { createInterface } from "node:readline";
import { createRequire } from "node:module";

import { everlineFetch } from "../js/src/index.js";

// It is made for browsers, of which it uses the timers and whether the page is seen.
globalThis.window ??= globalThis;
globalThis.document ??= { hidden: false, addEventListener() {}, removeEventListener() {} };

const require = createRequire(import.meta.url);
const { default: OpenAI } = require("openai");
const { EventSource } = require("eventsource");
const { fetchEventSource } = require("@microsoft/fetch-event-source");

const JSON_TYPE = { "content-type": "application/json" };
/** How long a program goes on asking for what it could not begin. */
const PATIENCE = 30_000;

/** Longest time for a stream: more than any client's own patience. */
const LIMIT = 120_000;

const sdks = new Map();

function sdkOf(base) {
  if (!sdks.has(base)) {
    sdks.set(base, new OpenAI({ baseURL: `${base}/v1`, apiKey: "unused", fetch: everlineFetch() }));
  }
  return sdks.get(base);
}

function begun(heard, response) {
  heard.stream = response.headers.get("everline-stream") ?? heard.stream;
  heard.edge = response.headers.get("everline-replica") ?? heard.edge;
  heard.worker = response.headers.get("everline-worker") ?? heard.worker;
}

async function sdk({ base, path, body }, heard) {
  const client = sdkOf(base);
  const resource = path.endsWith("/chat/completions") ? client.chat.completions : client.completions;
  const { data, response } = await resource.create(body).withResponse();
  begun(heard, response);
  for await (const chunk of data) heard.events.push(JSON.stringify(chunk));
}

/** A request that is sent until it is answered, as every program with a retry loop does. */
async function insistent(url, init) {
  const until = Date.now() + PATIENCE;
  for (;;) {
    let failed;
    try {
      const response = await fetch(url, init);
      if (response.status < 500 && response.status !== 429) return response;
      failed = new Error(`${response.status} ${await response.text()}`);
    } catch (error) {
      failed = error;
    }
    if (Date.now() > until) throw failed;
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
}

/** Somebody who has the key begins the stream and asks for a capability; the EventSource reads. */
async function eventSource({ base, path, body }, heard) {
  const headers = { ...JSON_TYPE, "everline-resume": "1", "idempotency-key": crypto.randomUUID() };
  const first = await insistent(`${base}${path}`, { method: "POST", headers, body: JSON.stringify(body) });
  if (first.status !== 200) throw new Error(`${first.status} ${await first.text()}`);
  begun(heard, first);
  await first.body.cancel();
  const token = await insistent(`${base}/v1/streams/${heard.stream}/token`, { method: "POST" });
  if (token.status !== 200) throw new Error(`${token.status} ${await token.text()}`);
  const { cap } = await token.json();
  const source = new EventSource(`${base}/v1/streams/${heard.stream}?cap=${cap}`);
  await new Promise((resolve, reject) => {
    source.onmessage = ({ data, lastEventId }) => {
      heard.events.push(data);
      heard.ids.push(lastEventId);
      if (data !== "[DONE]") return;
      source.close();
      resolve();
    };
    source.onerror = ({ code, message }) => {
      // It comes back by itself unless it was told not to.
      if (source.readyState === EventSource.CLOSED) reject(new Error(`given up at ${code}: ${message}`));
    };
  });
}

class Refused extends Error {}

/** As docs/how-to/resume-with-any-client.md has it. */
async function fetchEventSourced({ base, path, body }, heard) {
  let done = false;
  await fetchEventSource(`${base}${path}`, {
    method: "POST",
    headers: { ...JSON_TYPE, "idempotency-key": crypto.randomUUID() },
    body: JSON.stringify(body),
    openWhenHidden: true,
    async onopen(response) {
      if (response.status >= 500 || response.status === 429) throw new Error(`${response.status}`);
      if (response.status !== 200) throw new Refused(`${response.status} ${await response.text()}`);
      begun(heard, response);
    },
    onmessage({ data, id }) {
      heard.events.push(data);
      heard.ids.push(id);
      if (data === "[DONE]") done = true;
    },
    onclose() {
      if (!done) throw new Error("cut off");
    },
    onerror(error) {
      if (error instanceof Refused) throw error;
    },
  });
}

const MANNERS = { js: sdk, "event-source": eventSource, "fetch-event-source": fetchEventSourced };

/** An error with its causes. */
function why(error) {
  const said = [];
  for (let each = error; each != null && said.length < 5; each = each.cause) said.push(`${each.name}: ${each.message}`);
  return said.join(", of ");
}

/** Fails when a stream has taken too long. */
function tooLate() {
  let timer;
  const promise = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new Error(`no end within ${LIMIT / 1000} s`)), LIMIT);
  });
  return { promise, timer };
}

async function answer(question) {
  const late = tooLate();
  const heard = { n: question.n, stream: null, edge: null, worker: null, events: [], ids: [], error: null };
  try {
    await Promise.race([MANNERS[question.manner](question, heard), late.promise]);
  } catch (error) {
    heard.error = why(error);
  }
  clearTimeout(late.timer);
  process.stdout.write(`${JSON.stringify(heard)}\n`);
}

process.stdout.write(`${JSON.stringify({ ready: `Node ${process.versions.node}` })}\n`);
for await (const line of createInterface({ input: process.stdin })) answer(JSON.parse(line));
process.exit(0);

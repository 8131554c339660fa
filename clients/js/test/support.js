// What the tests share: the fake cluster, and a proxy that cuts connections.

import { spawn } from "node:child_process";
import { createServer, connect } from "node:net";
import { once } from "node:events";
import { fileURLToPath } from "node:url";
import assert from "node:assert/strict";

import { everlineFetch } from "../src/index.js";

export const QUICK = { backoffMin: 1, backoffMax: 20 };
export const KEY = { authorization: "Bearer k", "content-type": "application/json" };

/** Starts the fake cluster; it ends with its standard input. */
export async function fakeCluster() {
  const script = fileURLToPath(new URL("../../testing/fake_cluster.py", import.meta.url));
  const child = spawn("python3", [script], { stdio: ["pipe", "pipe", "inherit"] });
  const [said] = await once(child.stdout, "data");
  const url = String(said).trim();
  let seen = 0;
  return {
    url,
    /** What was asked since the last look; nothing a client did wrong is forgiven. */
    async log() {
      const { log, wrong } = await (await fetch(`${url}/_fake/log`)).json();
      assert.deepEqual(wrong, []);
      const since = log.slice(seen);
      seen = log.length;
      return since;
    },
    async stop() {
      child.stdin.end();
      await once(child, "exit");
    },
  };
}

export function chat(fake, more = {}) {
  return JSON.stringify({ model: "m", stream: true, messages: [{ role: "user", content: "x" }], fake, ...more });
}

/** A whole body, through the client. */
export async function fetched(url, body, options = {}, init = {}) {
  const fetch = everlineFetch({ ...QUICK, ...options });
  const response = await fetch(url, { method: "POST", headers: KEY, body, ...init });
  return { response, text: await response.text() };
}

/** The data of each event, the ids checked to be in order. */
export function datas(text) {
  return text
    .split("\n\n")
    .filter((block) => block !== "")
    .map((block, number) => {
      const lines = block.split("\n").filter((line) => !line.startsWith(":"));
      // Last, for clients that take note of an id as soon as they have read its line.
      assert.match(lines.at(-1), new RegExp(`^id: .*\\.${number}$`));
      return lines.find((line) => line.startsWith("data: ")).slice(6);
    });
}

/** The text of a whole chat stream. */
export function chatText(text) {
  const said = datas(text);
  assert.equal(said.at(-1), "[DONE]");
  const choices = said.slice(0, -1).flatMap((data) => JSON.parse(data).choices);
  return choices.map((choice) => choice.delta.content ?? "").join("");
}

/** Copies TCP and cuts each connection some bytes after its answer began; `cuts` gives [bytes, how] or nothing. */
export async function cuttingProxy(url, cuts) {
  const { hostname, port } = new URL(url);
  const open = new Set();
  const state = { count: 0 };
  const server = createServer((client) => {
    const upstream = connect(Number(port || 80), hostname);
    const cut = cuts();
    let passed = 0;
    for (const socket of [client, upstream]) {
      open.add(socket);
      socket.on("error", () => {});
      socket.on("close", () => {
        open.delete(socket);
        client.destroy();
        upstream.destroy();
      });
    }
    client.pipe(upstream);
    upstream.on("data", (data) => {
      if (cut === undefined || passed + data.length < cut[0]) {
        passed += data.length;
        client.write(data);
        return;
      }
      state.count += 1;
      upstream.pause();
      client.write(data.subarray(0, cut[0] - passed), () => {
        if (cut[1] === "rst") client.resetAndDestroy();
        else if (cut[1] === "fin") client.end();
      });
    });
    upstream.on("end", () => client.end());
  });
  server.listen(0, "127.0.0.1");
  await once(server, "listening");
  return {
    url: `http://127.0.0.1:${server.address().port}`,
    state,
    stop() {
      server.close();
      for (const socket of open) socket.destroy();
    },
  };
}

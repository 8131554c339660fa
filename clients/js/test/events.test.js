// From bytes to whole events, cut everywhere.

import { test } from "node:test";
import assert from "node:assert/strict";

import { Events, MAX_EVENT_BYTES } from "../src/events.js";

const NAME = "st_abcdefghijklmnopqrstuvwxyz";
const bytes = (text) => new TextEncoder().encode(text);
const text = (...pieces) => new TextDecoder().decode(Buffer.concat(pieces));
const event = (seq, data, more = "") => {
  // What the second attempt says has that in its id.
  const lines = [`data: ${data}\n${more}`, `id: ${NAME}.${seq}${seq < 2 ? "" : ".2"}\n`];
  // The cluster writes the id last; to a reader it is the same wherever it stands.
  return `${(seq === 1 ? lines.reverse() : lines).join("")}\n`;
};
const EVENTS = [
  event(0, '{"a":1}', "retry: 500\n"),
  event(1, '{"ü":"🦀"}'),
  event(2, "x\ndata: y"),
  event(3, "[DONE]"),
];
const WHOLE = EVENTS.join("");
const SENT = bytes([EVENTS[0], ": ping\n", EVENTS[1], ": everline attempt=2\n", EVENTS[2], EVENTS[3]].join(""));
const after = (id) => bytes(EVENTS.slice(id === null ? 0 : Number(id.split(".")[1]) + 1).join(""));

test("whatever is cut once or twice, the events are the same", () => {
  for (let first = 0; first <= SENT.length; first += 1) {
    for (let second = 0; second < SENT.length; second += 7) {
      const events = new Events("chat/completions");
      const out = [events.feed(SENT.subarray(0, first))];
      events.reconnected();
      out.push(events.feed(after(events.lastEventId).subarray(0, second)));
      events.reconnected();
      out.push(events.feed(after(events.lastEventId)));
      assert.equal(text(...out).replaceAll(/^: .*\n/gm, ""), WHOLE, `${first} ${second}`);
      assert.ok(events.ended && events.fault === null);
    }
  }
});

test("single bytes and all at once give the same", () => {
  for (const size of [1, 2, 3, 50, SENT.length]) {
    const events = new Events("chat/completions");
    const out = [];
    for (let at = 0; at < SENT.length; at += size) out.push(events.feed(SENT.subarray(at, at + size)));
    assert.equal(text(...out), text(SENT));
    assert.ok(out.every((piece) => piece.length === 0 || piece.at(-1) === 10));
  }
});

test("an error in place of a stream is handed on and ends it", () => {
  // What comes when the head was given early: one event with a number, and the route's own end.
  const error = `data: {"error":{"code":"workers_saturated"}}\nretry: 500\nid: ${NAME}.0\n\n`;
  const cases = [
    ["chat/completions", `${error}data: [DONE]\n\n`],
    ["messages", `event: error\n${error}`],
    ["responses", `event: error\n${error}`],
  ];
  for (const [route, end] of cases) {
    const whole = bytes(`: ping\n${end}`);
    for (let cut = 0; cut < whole.length; cut += 1) {
      const events = new Events(route);
      assert.equal(text(events.feed(whole.subarray(0, cut)), events.feed(whole.subarray(cut))), text(whole));
      assert.ok(events.ended && events.fault === null, route);
    }
  }
});

test("carriage returns end lines too", () => {
  const whole = bytes(WHOLE.replaceAll("\n", "\r\n"));
  for (let cut = 0; cut < whole.length; cut += 1) {
    const events = new Events("chat/completions");
    assert.equal(text(events.feed(whole.subarray(0, cut)), events.feed(whole.subarray(cut))), text(whole));
    assert.deepEqual([events.ended, events.lastEventId], [true, `${NAME}.3.2`]);
  }
});

test("events that were had are dropped and a missing one is a fault", () => {
  const events = new Events("chat/completions");
  events.feed(bytes(EVENTS[0] + EVENTS[1]));
  events.reconnected();
  assert.equal(text(events.feed(bytes(EVENTS[0] + EVENTS[1] + EVENTS[2]))), EVENTS[2]);
  const other = new Events("chat/completions");
  assert.equal(text(other.feed(bytes(EVENTS[0] + EVENTS[2] + EVENTS[1]))), EVENTS[0]);
  assert.match(other.fault, /event 2 came where 1 was expected/);
  assert.equal(other.feed(bytes(EVENTS[1])).length, 0);
  other.reconnected();
  assert.equal(text(other.feed(bytes(EVENTS[1]))), EVENTS[1]);
});

test("an event of another stream is a fault", () => {
  for (const strange of ["id: st_other.1\ndata: x\n\n", "id: 7\ndata: x\n\n", "id: a.b\ndata: x\n\n"]) {
    const events = new Events("chat/completions");
    assert.equal(text(events.feed(bytes(EVENTS[0] + strange))), EVENTS[0]);
    assert.notEqual(events.fault, null);
  }
});

test("what closes a stream depends on the route", () => {
  for (const [route, data, name, closes] of [
    ["chat/completions", "[DONE]", null, true],
    ["chat/completions", '{"error":{"code":"stream_lost"}}', null, false],
    ["completions", '"[DONE]"', null, false],
    ["responses", "{}", "response.completed", true],
    ["responses", '{"type":"response.incomplete"}', null, true],
    ["responses", '{"type":"response.output_text.delta","delta":"response.completed"}', null, false],
    ["responses", "{}", "response.output_text.done", false],
    ["messages", "{}", "message_stop", true],
    ["messages", "{}", "message_delta", false],
    ["messages", "[DONE]", null, true],
  ]) {
    const events = new Events(route);
    events.feed(bytes(event(0, data, name === null ? "" : `event: ${name}\n`)));
    assert.equal(events.ended, closes, `${route} ${name} ${data}`);
  }
});

test("what is held back is bounded", () => {
  const events = new Events("chat/completions");
  events.feed(new Uint8Array(MAX_EVENT_BYTES + 1).fill(120));
  assert.match(events.fault, /larger than/);
});

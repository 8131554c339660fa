// From the bytes of a body to whole events: pure, without I/O.
//
// What is handed on ends between two events, always, so that a connection may break anywhere and
// the next one goes on behind the last whole event. Events that were handed on already are
// dropped, an event that is missing is a fault.

/** An event's id: stream, number, and which attempt said it unless it was the first. */
const EVENT_ID = /^([^.]+)\.([0-9]+)(?:\.[0-9]+)?$/;

/** Largest event held back until it is whole: what a replica keeps of a whole stream. */
export const MAX_EVENT_BYTES = 8 * 1024 * 1024;

/** Names of the events that close a stream, by route. On every route `data: [DONE]` does as well. */
const CLOSING = {
  responses: new Set(["response.completed", "response.incomplete", "response.failed", "error"]),
  messages: new Set(["message_stop", "error"]),
};

const LF = 10;
const CR = 13;
const COLON = 58;

/** The events of one stream, over all the connections that it takes. */
export class Events {
  #closing;
  #buffer = new Uint8Array(4096);
  #length = 0;
  /** Where the first line begins that was not looked at yet, and how far its end was looked for. */
  #line = 0;
  #scanned = 0;
  #id = null;
  #name = "";
  #data = [];
  #decoder = new TextDecoder();

  constructor(route) {
    this.#closing = CLOSING[route];
    /** The stream's id, when it is known. */
    this.stream = null;
    /** Of the last event that was handed on. */
    this.lastEventId = null;
    /** How many events were handed on. */
    this.count = 0;
    /** The event that closes the stream was handed on. */
    this.ended = false;
    /** An event without a number was handed on: nobody can say where to go on. */
    this.unnumbered = false;
    /** What is wrong with this connection. Everything before it was handed on. */
    this.fault = null;
  }

  /** Forgets the unfinished event of a connection that broke. */
  reconnected() {
    this.#length = this.#line = this.#scanned = 0;
    this.#forgetBlock();
    this.fault = null;
  }

  /** Takes what was read and returns what may be handed on, as one array, maybe empty. */
  feed(chunk) {
    if (this.fault !== null) return new Uint8Array(0);
    this.#append(chunk);
    const out = [];
    let block = 0;
    while (this.fault === null) {
      const from = Math.max(this.#line, this.#scanned);
      const found = this.#buffer.subarray(from, this.#length).indexOf(LF);
      if (found < 0) {
        this.#scanned = this.#length;
        break;
      }
      const newline = from + found;
      let end = newline;
      while (end > this.#line && this.#buffer[end - 1] === CR) end -= 1;
      const line = this.#buffer.subarray(this.#line, end);
      const first = this.#line === block;
      this.#line = newline + 1;
      if (line.length === 0) {
        if (!first && this.#takeEvent()) out.push(this.#buffer.slice(block, this.#line));
        block = this.#line;
        this.#forgetBlock();
      } else if (first && line[0] === COLON) {
        // A heartbeat or a note between two events.
        out.push(this.#buffer.slice(block, this.#line));
        block = this.#line;
      } else {
        this.#field(this.#decoder.decode(line));
      }
    }
    this.#buffer.copyWithin(0, block, this.#length);
    this.#length -= block;
    this.#line -= block;
    this.#scanned = Math.max(0, this.#scanned - block);
    if (this.#length > MAX_EVENT_BYTES && this.fault === null) {
      this.fault = `an event is larger than ${MAX_EVENT_BYTES} bytes`;
    }
    return joined(out);
  }

  #append(chunk) {
    const needed = this.#length + chunk.length;
    if (needed > this.#buffer.length) {
      const larger = new Uint8Array(Math.max(needed, 2 * this.#buffer.length));
      larger.set(this.#buffer.subarray(0, this.#length));
      this.#buffer = larger;
    }
    this.#buffer.set(chunk, this.#length);
    this.#length = needed;
  }

  #forgetBlock() {
    this.#id = null;
    this.#name = "";
    this.#data = [];
  }

  #field(line) {
    const colon = line.indexOf(":");
    const name = colon < 0 ? line : line.slice(0, colon);
    let value = colon < 0 ? "" : line.slice(colon + 1);
    if (value.startsWith(" ")) value = value.slice(1);
    if (name === "data") this.#data.push(value);
    else if (name === "id") this.#id = value;
    else if (name === "event") this.#name = value;
  }

  /** Whether the event that just became whole is to be handed on. */
  #takeEvent() {
    if (this.#id === null) {
      if (this.#data.length > 0) this.unnumbered = true;
    } else if (this.#isNext(this.#id)) {
      this.lastEventId = this.#id;
    } else {
      return false;
    }
    this.count += 1;
    this.ended ||= this.#isClosing();
    return true;
  }

  #isNext(id) {
    const [, stream, number] = EVENT_ID.exec(id) ?? [];
    if (stream === undefined) {
      this.fault = `an event has the id ${JSON.stringify(id)}, which is none of Everline's`;
      return false;
    }
    this.stream ??= stream;
    if (stream !== this.stream) {
      this.fault = `an event of ${stream} came in the stream ${this.stream}`;
      return false;
    }
    const expected = this.lastEventId === null ? 0 : numberOf(this.lastEventId) + 1;
    if (Number(number) > expected) this.fault = `event ${number} came where ${expected} was expected`;
    return Number(number) === expected;
  }

  #isClosing() {
    const data = this.#data.join("\n");
    if (data.trim() === "[DONE]") return true;
    if (this.#closing === undefined) return false;
    if (this.#name !== "") return this.#closing.has(this.#name);
    try {
      return this.#closing.has(JSON.parse(data)?.type);
    } catch {
      return false;
    }
  }
}

/** The number in an event's id. */
export function numberOf(eventId) {
  return Number(EVENT_ID.exec(eventId)?.[2]);
}

function joined(pieces) {
  if (pieces.length === 1) return pieces[0];
  const whole = new Uint8Array(pieces.reduce((sum, piece) => sum + piece.length, 0));
  let at = 0;
  for (const piece of pieces) {
    whole.set(piece, at);
    at += piece.length;
  }
  return whole;
}

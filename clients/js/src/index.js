// A `fetch` under which Everline's output streams outlive the replica that carries them.

import { Events, numberOf } from "./events.js";
import {
  Patience,
  describe,
  failureOf,
  isPassing,
  isWatched,
  newKey,
  readError,
  routeOf,
  settingsOf,
  wantsStream,
} from "./policy.js";

/** Most of an error's body that is read for its message. */
const MAX_ERROR_BODY = 64 * 1024;
/** How long the end of a body may take after the event that closes the stream. */
const AFTER_END = 1_000;
/** Headers of the first request that say nothing about a resumption. */
const OF_THE_BODY = ["content-length", "content-type", "content-encoding", "idempotency-key"];

/** A stream could not be brought to its end. */
export class StreamError extends Error {
  constructor(message, { code, status, stream, lastEventId, cause }) {
    super(message, cause === undefined ? undefined : { cause });
    this.name = "StreamError";
    this.code = code;
    this.status = status ?? null;
    this.stream = stream;
    this.lastEventId = lastEventId;
  }
}

/** Makes a `fetch` that resumes streams; all other requests pass as they are. */
export function everlineFetch(options = {}) {
  const settings = settingsOf(options);
  const inner = options.fetch ?? ((input, init) => globalThis.fetch(input, init));
  return async (input, init = {}) => {
    const asked = await askedBy(input, init);
    if (asked === null) return plain(settings, inner, input, init);
    return new Exchange(settings, inner, asked).begin();
  };
}

/** The request, if it is one whose stream would be resumed. */
async function askedBy(input, init) {
  const isRequest = typeof Request !== "undefined" && input instanceof Request;
  const href = isRequest ? input.url : String(input);
  const url = new URL(href, globalThis.location?.href);
  const method = (init.method ?? (isRequest ? input.method : "GET")).toUpperCase();
  const route = routeOf(method, url);
  if (route === null) return null;
  const headers = new Headers(init.headers ?? (isRequest ? input.headers : undefined));
  // A client that goes on by itself is left alone.
  if (headers.has("last-event-id") || headers.has("everline-resume")) return null;
  let content;
  if (typeof init.body === "string") content = init.body;
  else if (init.body instanceof ArrayBuffer || ArrayBuffer.isView(init.body)) content = new TextDecoder().decode(init.body);
  else if (init.body == null && isRequest) content = await input.clone().text();
  // A body that can be sent only once.
  else return null;
  if (!wantsStream(content)) return null;
  headers.set("everline-resume", "1");
  if (!headers.has("idempotency-key")) headers.set("idempotency-key", newKey());
  const signal = init.signal ?? (isRequest ? input.signal : undefined);
  const extra = isRequest ? { credentials: input.credentials, mode: input.mode, cache: input.cache } : {};
  const { body: _, ...rest } = init;
  return { url, route, headers, content, signal, init: { ...extra, ...rest } };
}

/** Any other request: tried again only while nothing of it was sent. */
async function plain(settings, inner, input, init) {
  const patience = new Patience(settings, settings.connectBudget);
  const once = init.body != null && typeof init.body === "object" && typeof init.body.getReader === "function";
  const used = typeof Request !== "undefined" && input instanceof Request && input.body !== null;
  for (;;) {
    try {
      return await inner(input, init);
    } catch (error) {
      const pause = !once && !used && failureOf(error) === "unsent" ? patience.nextPause() : null;
      if (pause === null) throw error;
      await sleep(pause, init.signal);
    }
  }
}

/** One streaming request, over all the connections that it takes. */
class Exchange {
  #settings;
  #inner;
  #asked;
  #events;
  #patience;
  #turn = 0;
  #resumable = false;
  #reader = null;
  /** Ends the connection in use. */
  #abort = null;
  #closed = false;
  #forgetSignal = () => {};

  constructor(settings, inner, asked) {
    this.#settings = settings;
    this.#inner = inner;
    this.#asked = asked;
    this.#events = new Events(asked.route);
    this.#patience = new Patience(settings, settings.retryBudget);
  }

  /** Sends the request until there is an answer. */
  async begin() {
    const { content, headers, signal } = this.#asked;
    const connecting = new Patience(this.#settings, this.#settings.connectBudget);
    let died = false;
    for (;;) {
      let pause;
      try {
        const response = await this.#send(this.#asked.url, { method: "POST", headers, body: content }, this.#settings.headTimeout);
        if (!died || !isPassing(response) || (pause = this.#patience.nextPause()) === null) {
          return this.#began(response);
        }
        await response.body?.cancel();
      } catch (error) {
        if (signal?.aborted) throw error;
        const failure = error instanceof Silent ? "broken" : failureOf(error);
        died ||= failure === "broken";
        pause = failure === null ? null : (died ? this.#patience : connecting).nextPause();
        if (pause === null) throw error instanceof Silent ? this.#lost("unreachable", error.message, undefined, error) : error;
      }
      this.#turn += 1;
      await sleep(pause, signal);
    }
  }

  #began(response) {
    if (!isWatched(response)) return response;
    const name = response.headers.get("everline-stream") ?? "";
    // It becomes part of a path; nothing else may.
    this.#resumable = /^[A-Za-z0-9_]{1,64}$/.test(name);
    this.#events.stream = this.#resumable ? name : null;
    this.#reader = response.body.getReader();
    // Nothing is read before it is asked for, so that a slow reader is felt by the cluster.
    const strategy = { highWaterMark: 0 };
    const source = {
      start: (controller) => this.#followSignal(controller),
      pull: (controller) => this.#pull(controller),
      cancel: () => this.#close(),
    };
    const { status, statusText, headers } = response;
    const whole = new Response(new ReadableStream(source, strategy), { status, statusText, headers });
    Object.defineProperty(whole, "url", { value: response.url });
    return whole;
  }

  #followSignal(controller) {
    const { signal } = this.#asked;
    if (signal == null) return;
    const stop = () => {
      if (this.#closed) return;
      this.#close();
      controller.error(signal.reason);
    };
    if (signal.aborted) stop();
    else signal.addEventListener("abort", stop, { once: true });
    this.#forgetSignal = () => signal.removeEventListener("abort", stop);
  }

  /** Hands on the next whole events, over as many connections as that takes. */
  async #pull(controller) {
    try {
      while (!this.#closed) {
        const whole = await this.#next();
        if (this.#closed) return;
        if (whole === null) {
          this.#finish();
          controller.close();
          return;
        }
        if (whole.length > 0) {
          controller.enqueue(whole);
          return;
        }
      }
    } catch (error) {
      if (this.#closed) return;
      this.#finish();
      controller.error(error);
    }
  }

  /** What may be handed on of the next read, maybe nothing; null at the end. */
  async #next() {
    const events = this.#events;
    let failed;
    if (events.fault === null) {
      try {
        const { done, value } = await this.#read();
        if (!done) {
          this.#patience.heard();
          const before = events.count;
          const whole = events.feed(value);
          if (events.count !== before) this.#patience.progressed();
          return whole;
        }
      } catch (error) {
        if (this.#closed) return null;
        failed = error;
      }
    }
    if (events.ended) return null;
    await this.#resume(failed);
    return new Uint8Array(0);
  }

  /** Reads, but waits no longer than a live connection would be silent. */
  async #read() {
    const longest = this.#events.ended ? AFTER_END : this.#resumable ? this.#settings.stallTimeout : null;
    const reading = this.#reader.read();
    if (longest === null) return reading;
    return within(reading, longest, () => this.#drop());
  }

  /** Ends the connection in use. */
  #drop() {
    this.#abort?.abort();
    this.#reader?.cancel().catch(() => {});
  }

  async #resume(failed) {
    const events = this.#events;
    let error = failed;
    let why = events.fault ?? (failed === undefined ? "the body ended before its stream did" : describe(failed));
    if (!this.#resumable || events.unnumbered) {
      throw this.#lost("not_resumable", `${why}, and this stream cannot be resumed`, undefined, error);
    }
    this.#drop();
    for (;;) {
      const pause = this.#patience.nextPause();
      if (pause === null) {
        const budget = `no progress within ${this.#settings.retryBudget / 1000} s`;
        throw this.#lost("unreachable", `${budget}; at last: ${why}`, undefined, error);
      }
      await sleep(pause, this.#asked.signal);
      if (this.#closed) return;
      this.#turn += 1;
      let response;
      try {
        response = await this.#send(this.#streamURL(), { method: "GET", headers: this.#resumeHeaders() }, this.#settings.resumeHeadTimeout);
      } catch (caught) {
        if (this.#closed) return;
        if (!(caught instanceof Silent) && failureOf(caught) === null) throw caught;
        [error, why] = [caught, describe(caught)];
        continue;
      }
      if (this.#closed) {
        this.#abort?.abort();
        return;
      }
      if (isWatched(response)) {
        events.reconnected();
        this.#reader = response.body.getReader();
        return;
      }
      let { code, message } = readError(await someText(response, this.#settings.resumeHeadTimeout));
      [error, why] = [undefined, `${response.status} ${message ?? "without a message"}`];
      if (isPassing(response)) continue;
      if (response.status === 204) {
        [code, message] = ["incomplete", "it ended there without the event that closes it"];
      }
      throw this.#lost(code ?? "refused", message ?? `the answer was ${response.status}`, response.status);
    }
  }

  /** Sends to whoever's turn it is; the connection lives until `#abort` or the caller's signal. */
  async #send(url, request, headTimeout) {
    const origins = [this.#asked.url, ...this.#settings.baseURLs];
    const origin = origins[this.#turn % origins.length];
    const to = new URL(url);
    // Port first: not every port goes with every scheme.
    [to.protocol, to.hostname, to.port] = [origin.protocol, origin.hostname, origin.port];
    const abort = new AbortController();
    this.#abort = abort;
    const { signal } = this.#asked;
    const pass = () => abort.abort(signal.reason);
    if (signal?.aborted) pass();
    signal?.addEventListener("abort", pass, { once: true });
    const forget = () => signal?.removeEventListener("abort", pass);
    try {
      const sent = this.#inner(to.href, { ...this.#asked.init, ...request, signal: abort.signal });
      const response = await (headTimeout === undefined ? sent : within(sent, headTimeout, () => abort.abort()));
      // Any other answer is the caller's, with its body, which the signal must end as well.
      if (isWatched(response)) forget();
      return response;
    } catch (error) {
      forget();
      throw error;
    }
  }

  #streamURL(end = "") {
    const url = new URL(this.#asked.url);
    const before = url.pathname.slice(0, -this.#asked.route.length);
    [url.pathname, url.search, url.hash] = [`${before}streams/${this.#events.stream}${end}`, "", ""];
    return url;
  }

  #resumeHeaders() {
    const headers = new Headers(this.#asked.headers);
    for (const name of OF_THE_BODY) headers.delete(name);
    headers.set("accept", "text/event-stream");
    if (this.#events.lastEventId !== null) headers.set("last-event-id", this.#events.lastEventId);
    // Another connection may reach another replica. Browsers leave this header out.
    headers.set("connection", "close");
    return headers;
  }

  /** The caller is done, or has had enough. */
  #finish() {
    this.#closed = true;
    this.#forgetSignal();
    this.#drop();
  }

  #close() {
    if (this.#closed) return;
    this.#finish();
    const isOver = !this.#resumable || this.#events.ended;
    if (isOver || !this.#settings.cancelOnClose) return;
    const headers = this.#resumeHeaders();
    headers.delete("accept");
    headers.delete("last-event-id");
    const signal = AbortSignal.timeout(this.#settings.cancelTimeout);
    const request = { ...this.#asked.init, method: "POST", headers, signal, keepalive: true };
    // If it does not arrive, the cluster cancels by itself, some time later.
    Promise.resolve(this.#inner(this.#streamURL("/cancel").href, request))
      .then((response) => response.body?.cancel())
      .catch(() => {});
  }

  #lost(code, message, status, cause) {
    const { stream, lastEventId } = this.#events;
    const where = lastEventId === null ? "" : ` after event ${numberOf(lastEventId)}`;
    const text = `stream ${stream ?? "without an id"} broke${where}: ${message}`;
    return new StreamError(text, { code, status, stream, lastEventId, cause });
  }
}

/** Nothing came in time. */
class Silent extends Error {}

/** What a promise says, unless that takes too long. */
async function within(promise, milliseconds, tooLate) {
  let timer;
  const silence = new Promise((_, reject) => {
    timer = setTimeout(() => {
      reject(new Silent(`silent for ${milliseconds} ms`));
      tooLate();
    }, milliseconds);
  });
  // What it says later is of no interest any more.
  promise.catch(() => {});
  try {
    return await Promise.race([promise, silence]);
  } finally {
    clearTimeout(timer);
  }
}

/** Waits, but not after the caller has had enough. */
function sleep(milliseconds, signal) {
  return new Promise((resolve) => {
    if (signal?.aborted || milliseconds === 0) {
      resolve();
      return;
    }
    const done = () => {
      clearTimeout(timer);
      signal?.removeEventListener("abort", done);
      resolve();
    };
    const timer = setTimeout(done, milliseconds);
    signal?.addEventListener("abort", done, { once: true });
  });
}

/** The beginning of a body, as text; what cannot be read is not waited for. */
async function someText(response, longest) {
  if (response.body === null) return "";
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  let text = "";
  try {
    while (text.length < MAX_ERROR_BODY) {
      const { done, value } = await within(reader.read(), longest, () => {});
      if (done) break;
      text += decoder.decode(value, { stream: true });
    }
  } catch {
    // The status says enough.
  }
  reader.cancel().catch(() => {});
  return text;
}

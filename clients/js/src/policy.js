// What is resumed, when it is tried again, and for how long.

const ROUTES = ["chat/completions", "completions", "messages", "responses"];
/** Answers of a replica that may be different a moment later, or from another replica. */
const PASSING = new Set([408, 429, 500, 502, 503, 504]);
/** Codes of errors after which nothing of the request can have been received. */
const UNSENT = new Set([
  "ECONNREFUSED",
  "EHOSTUNREACH",
  "ENETUNREACH",
  "ENOTFOUND",
  "EAI_AGAIN",
  "UND_ERR_CONNECT_TIMEOUT",
]);
/** Codes of errors after which something may have been. */
const BROKEN = new Set(["ECONNRESET", "EPIPE", "UND_ERR_SOCKET"]);

const DEFAULTS = {
  retryBudget: 30_000,
  connectBudget: 5_000,
  heartbeat: 5_000,
  stallTimeout: undefined,
  headTimeout: undefined,
  resumeHeadTimeout: 5_000,
  backoffMin: 20,
  backoffMax: 1_000,
  cancelTimeout: 1_000,
  cancelOnClose: true,
  baseURLs: [],
};

/** Options with their defaults; throws where one makes no sense. */
export function settingsOf(options) {
  const settings = { ...DEFAULTS, ...options };
  for (const [name, preset] of Object.entries(DEFAULTS)) {
    const value = settings[name];
    const isTime = typeof preset === "number" || (preset === undefined && value !== undefined);
    if (isTime && !(Number.isFinite(value) && value >= 0)) {
      throw new TypeError(`everlineFetch: ${name} is ${value}; it is a time in milliseconds`);
    }
  }
  settings.stallTimeout ??= 1.75 * settings.heartbeat;
  settings.baseURLs = settings.baseURLs.map((base) => {
    const url = URL.canParse?.(base) === false ? null : new URL(base);
    if (url === null || !/^https?:$/.test(url.protocol) || url.pathname !== "/" || url.search !== "") {
      throw new TypeError(`everlineFetch: baseURLs has ${base}; write it like https://r2.example:8080, without a path`);
    }
    return url;
  });
  return settings;
}

/** How long it has been tried, and how long to wait before the next attempt. */
export class Patience {
  #settings;
  #budget;
  #attempt = 0;
  #spent = 0;
  #since = null;

  constructor(settings, budget) {
    this.#settings = settings;
    this.#budget = budget;
  }

  /** Bytes came: the outage is over for now. */
  heard() {
    if (this.#since === null) return;
    this.#spent += performance.now() - this.#since;
    this.#since = null;
  }

  /** An event came: everything before is forgotten. */
  progressed() {
    this.#attempt = this.#spent = 0;
    this.#since = null;
  }

  /** Called when something failed: how long to wait, or null if it is enough. */
  nextPause() {
    this.#since ??= performance.now();
    const left = this.#budget - this.#spent - (performance.now() - this.#since);
    if (left <= 0) return null;
    this.#attempt += 1;
    if (this.#attempt === 1) return 0;
    const { backoffMin, backoffMax } = this.#settings;
    const longest = Math.min(backoffMax, backoffMin * 2 ** Math.min(this.#attempt - 2, 30));
    return Math.min(left, longest * (0.5 + Math.random() / 2));
  }
}

/** The route of a request whose stream would be resumed. */
export function routeOf(method, url) {
  if (method !== "POST") return null;
  return ROUTES.find((route) => url.pathname.endsWith(`/v1/${route}`)) ?? null;
}

/** Whether a body asks for a stream. */
export function wantsStream(text) {
  if (!text.includes('"stream"')) return false;
  try {
    return JSON.parse(text)?.stream === true;
  } catch {
    return false;
  }
}

/** Whether the answer is a stream of Everline's. */
export function isWatched(response) {
  const kind = (response.headers.get("content-type") ?? "").split(";")[0].trim().toLowerCase();
  const isOurs = response.headers.has("everline-stream") || response.headers.has("everline-replica");
  return response.status === 200 && kind === "text/event-stream" && isOurs && response.body !== null;
}

/** Whether asking again may help. */
export function isPassing(response) {
  return PASSING.has(response.status) && response.headers.get("x-should-retry")?.toLowerCase() !== "false";
}

/** What became of a request that failed: "unsent", "broken", "unknown" or, if it was not the network, null. */
export function failureOf(error) {
  for (let at = error, depth = 0; at != null && depth < 5; at = at.cause, depth += 1) {
    if (UNSENT.has(at.code)) return "unsent";
    if (BROKEN.has(at.code)) return "broken";
    // Several addresses of one name were tried.
    if (Array.isArray(at.errors) && at.errors.length > 0 && at.errors.every((one) => UNSENT.has(one.code))) {
      return "unsent";
    }
  }
  // Browsers say no more than this.
  return error instanceof TypeError ? "unknown" : null;
}

/** An error in words. */
export function describe(error) {
  const cause = error?.cause?.message;
  return `${error?.message ?? error}${cause ? ` (${cause})` : ""}`;
}

/** Code and message of an error object, as OpenAI or Anthropic have it. */
export function readError(text) {
  try {
    const { error } = JSON.parse(text);
    return { code: error.code ?? error.type ?? null, message: error.message ?? null };
  } catch {
    return { code: null, message: null };
  }
}

/** A key nobody else has. */
export function newKey() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return `everline-client-${Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("")}`;
}

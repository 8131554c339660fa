/** Times are in milliseconds. */
export interface EverlineOptions {
  /** What does the requests; the global `fetch`. */
  fetch?: (input: any, init?: any) => Promise<Response>;
  /** How long a stream may make no progress while nobody can be reached: 30,000. */
  retryBudget?: number;
  /** How long connecting is tried again for requests of which nothing was sent yet: 5,000. */
  connectBudget?: number;
  /** What the cluster sends in silence, `streams.heartbeat`: 5,000. */
  heartbeat?: number;
  /** A connection silent for this long is dead; by default 1.75 heartbeats. */
  stallTimeout?: number;
  /** Longest wait for the head of the first answer before the request is sent again, with the same key; by default none. */
  headTimeout?: number;
  /** Longest wait for the head of a resumption: 5,000. */
  resumeHeadTimeout?: number;
  /** Shortest pause between two attempts, after the first, which comes at once: 20. */
  backoffMin?: number;
  /** Longest pause between two attempts: 1,000. */
  backoffMax?: number;
  /** How long telling the cluster of an early close may take: 1,000. */
  cancelTimeout?: number;
  /** Whether an abort, or cancelling the body, cancels the generation: true. */
  cancelOnClose?: boolean;
  /** Further addresses of the same cluster, such as `https://r2.example:8080`, tried in turn. */
  baseURLs?: string[];
}

/** A stream could not be brought to its end. */
export class StreamError extends Error {
  private constructor();
  /** Everline's code, such as `stream_expired`; `unreachable` if nobody answered in time. */
  readonly code: string;
  /** Status of the answer that was final, if there was one. */
  readonly status: number | null;
  /** The stream, if it began. */
  readonly stream: string | null;
  /** The last event that was delivered. */
  readonly lastEventId: string | null;
}

/** Makes a `fetch` that resumes streams; all other requests pass as they are. */
export function everlineFetch(options?: EverlineOptions): typeof fetch;

//! What this process says of itself, on standard error. Lines are written by a thread of their own: whoever
//! reads them may be slow, or have stopped, and nothing else waits for that. What there is no room for is
//! left out, and counted.

use std::io::IsTerminal;
use std::sync::OnceLock;
use std::time::Duration;

use parking_lot::Mutex;
use tracing_appender::non_blocking::{ErrorCounter, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::EnvFilter;

/// Lines that wait to be written.
const LINES: usize = 16_384;
/// How often it is looked whether lines were left out.
const LOOK: Duration = Duration::from_secs(10);
/// openraft says as errors what is ordinary when a peer is away or a group stops; that is
/// silenced unless asked for.
const QUIET: &str = "openraft=off,h2=warn,hyper=warn,tonic=warn,sled=warn";

static LEFT_OUT: OnceLock<ErrorCounter> = OnceLock::new();
static WRITER: Mutex<Option<WorkerGuard>> = Mutex::new(None);

/// Logs from now on: what `filter` lets through, in the syntax of `tracing_subscriber`'s `EnvFilter`; for
/// people or as JSON, by default for people where standard error is a terminal; in colour there, unless
/// that is not wanted. Only the first call counts.
pub fn start(filter: &str, pretty: Option<bool>, no_color: bool) {
    let asked = EnvFilter::try_new(format!("{QUIET},{filter}"));
    let filter = asked.unwrap_or_else(|_| EnvFilter::new(format!("{QUIET},info")));
    let is_terminal = std::io::stderr().is_terminal();
    let ansi = is_terminal && !no_color;
    let queue = NonBlockingBuilder::default().buffered_lines_limit(LINES).lossy(true).thread_name("log");
    let (writer, guard) = queue.finish(std::io::stderr());
    let left_out = writer.error_counter();
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(writer).with_ansi(ansi);
    let started = match pretty.unwrap_or(is_terminal) {
        true => builder.try_init(),
        false => builder.json().flatten_event(true).try_init(),
    };
    // Fails only where a subscriber is set already, as in tests.
    if started.is_ok() {
        let _ = LEFT_OUT.set(left_out);
        *WRITER.lock() = Some(guard);
    }
}

/// Lines that were left out because nobody took those before them in time.
pub fn left_out() -> u64 {
    LEFT_OUT.get().map_or(0, |counter| counter.dropped_lines() as u64)
}

/// Says now and then how many lines were left out. Never ends.
pub async fn tell_what_is_left_out() {
    let mut told = 0;
    loop {
        tokio::time::sleep(LOOK).await;
        let all = left_out();
        if all > told {
            tracing::warn!(
                lines = all - told,
                "lines of this log were left out: they were not taken in time"
            );
            told = all;
        }
    }
}

/// Waits until what was said is written, for a second at most; nothing is said behind that. For the end
/// of the process.
pub fn finish() {
    let guard = WRITER.lock().take();
    drop(guard);
}

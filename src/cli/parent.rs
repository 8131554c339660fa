//! Ends this process when its parent is gone.

use std::io::Read as _;
use std::time::Duration;

use rustix::process::{Signal, getpid, kill_process};

/// How long an orderly stop may take before the process just ends.
const GRACE: Duration = Duration::from_secs(3);

/// Watches standard input from a thread of its own: the parent holds the other end of the pipe,
/// and however the parent ends, the kernel closes it. Then this process gets SIGTERM, so that
/// it stops in order, and ends after [`GRACE`] at the latest.
pub(crate) fn follow() {
    let watch = || {
        let mut stdin = std::io::stdin().lock();
        let mut buffer = [0; 256];
        while stdin.read(&mut buffer).is_ok_and(|read| read > 0) {}
        let _ = kill_process(getpid(), Signal::TERM);
        std::thread::sleep(GRACE);
        crate::telemetry::log::finish();
        std::process::exit(1);
    };
    // A thread cannot be had only when the machine is out of them; then nothing else starts either.
    let _ = std::thread::Builder::new().name("parent".to_owned()).spawn(watch);
}

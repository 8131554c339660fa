//! What is measured, below everything that measures: histograms without a lock, the process as
//! the kernel sees it, what it says of itself, and spans on their way to a collector.
//!
//! [`histogram`] is pure; [`process`] reads `/proc/self` when asked; [`log`] writes to standard error from a
//! thread of its own; [`trace`] is the only part
//! that names OpenTelemetry, and does not exist in a process that was not told where to send.

pub mod histogram;
pub mod log;
pub mod process;
pub mod trace;

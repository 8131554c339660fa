//! What is measured, below everything that measures: histograms without a lock, the process as
//! the kernel sees it, and spans on their way to a collector.
//!
//! [`histogram`] is pure; [`process`] reads `/proc/self` when asked; [`trace`] is the only part
//! that names OpenTelemetry, and does not exist in a process that was not told where to send.

pub mod histogram;
pub mod process;
pub mod trace;

//! The `everline` binary; see the library for everything.

fn main() {}

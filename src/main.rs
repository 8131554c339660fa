//! The `everline` binary; see the library for everything.

fn main() -> std::process::ExitCode {
    everline::cli::main()
}

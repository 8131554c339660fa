//! Standard output that never panics, and failures with their exit codes.

use std::io::{self, IsTerminal as _, Write as _};
use std::process::ExitCode;

/// Why a command did not do what it was asked to.
#[derive(Debug)]
pub(crate) enum Failure {
    /// It was tried and did not work.
    Failed(String),
    /// The command line or the configuration is wrong.
    Usage(String),
    /// Nobody answers.
    Unreachable(String),
    /// The reader of our output has seen enough.
    PipeClosed,
}

impl Failure {
    /// Says it on standard error.
    pub(crate) fn report(&self) {
        if let Failure::Failed(text) | Failure::Usage(text) | Failure::Unreachable(text) = self {
            // With standard error gone there is nobody left to tell.
            let _ = writeln!(io::stderr(), "everline: {text}");
        }
    }

    /// The documented code.
    pub(crate) fn exit_code(&self) -> ExitCode {
        ExitCode::from(match self {
            Failure::PipeClosed => 0,
            Failure::Failed(_) => 1,
            Failure::Usage(_) => 2,
            Failure::Unreachable(_) => 3,
        })
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::BrokenPipe => Failure::PipeClosed,
            _ => Failure::Failed(error.to_string()),
        }
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        match error.downcast_ref::<crate::config::ConfigErrors>() {
            Some(errors) => Failure::Usage(errors.to_string()),
            None => Failure::Failed(format!("{error:#}")),
        }
    }
}

impl From<crate::config::ConfigErrors> for Failure {
    fn from(errors: crate::config::ConfigErrors) -> Self {
        Failure::Usage(errors.to_string())
    }
}

/// Standard output.
#[derive(Debug)]
pub(crate) struct Out {
    terminal: bool,
    color: bool,
}

impl Out {
    /// Standard output, with colour where a person looks at it and did not refuse it.
    pub(crate) fn stdout() -> Self {
        let terminal = io::stdout().is_terminal();
        Self { terminal, color: terminal && !crate::config::no_color() }
    }

    /// Whether a person looks at it.
    pub(crate) fn is_terminal(&self) -> bool {
        self.terminal
    }

    /// Columns of the terminal, if it is one and says so.
    pub(crate) fn width(&self) -> Option<usize> {
        let size = rustix::termios::tcgetwinsize(io::stdout()).ok().filter(|_| self.terminal)?;
        Some(usize::from(size.ws_col)).filter(|columns| *columns > 0)
    }

    /// The paint to use.
    pub(crate) fn paint(&self) -> Paint {
        Paint { on: self.color }
    }

    /// Writes text as it is and flushes.
    pub(crate) fn write(&mut self, text: &str) -> Result<(), Failure> {
        let mut stdout = io::stdout().lock();
        stdout.write_all(text.as_bytes())?;
        Ok(stdout.flush()?)
    }

    /// Writes a line.
    pub(crate) fn line(&mut self, text: &str) -> Result<(), Failure> {
        self.write(&format!("{text}\n"))
    }

    /// Writes a value as indented JSON.
    pub(crate) fn json(&mut self, value: &impl serde::Serialize) -> Result<(), Failure> {
        let text = serde_json::to_string_pretty(value).map_err(|e| Failure::Failed(e.to_string()))?;
        self.line(&text)
    }
}

/// ANSI colours, or none.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Paint {
    /// Whether to paint at all.
    pub(crate) on: bool,
}

impl Paint {
    fn wrap(self, code: &str, text: &str) -> String {
        if self.on { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    /// Good.
    pub(crate) fn green(self, text: &str) -> String {
        self.wrap("32", text)
    }

    /// Bad.
    pub(crate) fn red(self, text: &str) -> String {
        self.wrap("31", text)
    }

    /// To be noticed.
    pub(crate) fn yellow(self, text: &str) -> String {
        self.wrap("33", text)
    }

    /// Headings.
    pub(crate) fn bold(self, text: &str) -> String {
        self.wrap("1", text)
    }

    /// Less important.
    pub(crate) fn dim(self, text: &str) -> String {
        self.wrap("2", text)
    }
}

//! `everline completions`

use clap::CommandFactory as _;
use clap_complete::Shell;

use super::output::{Failure, Out};

/// Print a completion script for a shell
///
/// Examples:
///   everline completions bash > ~/.local/share/bash-completion/completions/everline
///   everline completions zsh > "${fpath[1]}/_everline"
///   everline completions fish > ~/.config/fish/completions/everline.fish
#[derive(clap::Args, Debug)]
#[command(verbatim_doc_comment)]
pub(crate) struct Args {
    /// Which shell
    shell: Shell,
}

impl Args {
    pub(crate) fn run(self, out: &mut Out) -> Result<(), Failure> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut super::Cli::command(), "everline", &mut script);
        out.write(&String::from_utf8_lossy(&script))
    }
}

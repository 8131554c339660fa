//! `everline demo`
use super::output::{Failure, Out};

/// Run a whole cluster on this machine
#[derive(clap::Args, Debug)]
pub(crate) struct Args {}

impl Args {
    pub(crate) fn run(self, _out: &mut Out) -> Result<(), Failure> {
        Err(Failure::Failed("not yet".into()))
    }
}

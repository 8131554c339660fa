//! `everline engine-sim`

use tokio::signal::unix::{SignalKind, signal};

use super::output::{Failure, Out};
use crate::engines::sim::{EngineSimArgs, run};

/// Run a simulated engine that speaks like vLLM
///
/// It answers vLLM's routes with vLLM's bytes; its text is a pure function of the prompt, so that
/// every stream can be checked. It says on standard output where it listens.
///
/// Examples:
///   everline engine-sim --listen 127.0.0.1:8000 --model my-model
///   everline engine-sim --instant                    no delays at all
///   everline worker add http://127.0.0.1:8000        let a replica route to it
#[derive(clap::Args, Debug)]
#[command(verbatim_doc_comment)]
pub(crate) struct Args {
    #[command(flatten)]
    engine: EngineSimArgs,
}

impl Args {
    pub(crate) fn run(self, out: &mut Out) -> Result<(), Failure> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        runtime.block_on(async {
            let (mut terminate, mut interrupt) =
                (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
            let stop = async move {
                tokio::select! {
                    _ = terminate.recv() => {}
                    _ = interrupt.recv() => {}
                }
            };
            let mut said = Ok(());
            let announce = |address| said = out.line(&format!("engine-sim listening on http://{address}"));
            run(self.engine, stop, announce).await?;
            said
        })
    }
}

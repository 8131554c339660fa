//! `everline drain`

use std::time::{Duration, Instant};

use http::Method;

use super::client::{Server, block_on};
use super::output::{Failure, Out};
use crate::admin_types::{MessageReply, StatusReply};

const DRAIN: &str = "/v1/admin/drain";
const STATUS: &str = "/v1/admin/status";
/// Pause between two looks.
const LOOK: Duration = Duration::from_millis(200);

/// Stop one replica as planned: its streams are handed to others, its clients sent there
///
/// The replica stops being ready, hands over leadership and the streams it generates, waits until
/// balancers have noticed, ends the answers of clients that can come back, lets the others finish,
/// and ends its process. SIGTERM does the same.
///
/// Examples:
///   everline drain --server http://127.0.0.1:8081 --wait 60
#[derive(clap::Args, Debug)]
#[command(verbatim_doc_comment)]
pub(crate) struct Args {
    #[command(flatten)]
    server: Server,
    /// Wait until the process has ended, at most so long
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    wait: u64,
}

impl Args {
    pub(crate) fn run(self, out: &mut Out) -> Result<(), Failure> {
        block_on(async {
            let client = self.server.client()?;
            let reply: MessageReply = client.call(Method::POST, DRAIN, None::<&()>).await?;
            out.line(&reply.message)?;
            if self.wait == 0 {
                return Ok(());
            }
            let until = Instant::now() + Duration::from_secs(self.wait);
            // The admin listener stays to the end.
            while client.get::<StatusReply>(STATUS).await.is_ok() {
                if Instant::now() >= until {
                    return Err(Failure::Failed(format!("it has not ended within {} s", self.wait)));
                }
                tokio::time::sleep(LOOK).await;
            }
            out.line("it has ended")
        })
    }
}

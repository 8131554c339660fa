//! `everline status`: asks a replica, and through what it says the others, and shows a page.
//!
//! [`survey`] is the asking, [`page`] the showing.

mod page;
mod survey;

use std::time::Duration;

use super::client::{Client, Server, block_on};
use super::output::{Failure, Out};
use page::page;
#[cfg(test)]
pub(crate) use page::tests;
pub(crate) use page::{leaders, members_table, state, workers_table};
use survey::{Rates, Survey};

/// Time between two looks with `--watch`.
const WATCH: Duration = Duration::from_secs(1);

/// Show the cluster: replicas, workers, loads, recent errors
///
/// The replica that is asked tells what it knows of the cluster; the other living replicas are
/// asked for what only they know, such as how long they have been up. Where two numbers are
/// shown as one/other, they are of the control group and the cache group.
///
/// Examples:
///   everline status
///   everline status --server http://10.0.0.2:8081 --watch
///   everline status -o json | jq '.cluster.members[].info.name'
#[derive(clap::Args, Debug)]
#[command(verbatim_doc_comment)]
pub(crate) struct Args {
    #[command(flatten)]
    server: Server,
    /// As a table for people, or as JSON: the replica's answer, with those of the others in `others`
    #[arg(long, short, value_name = "FORMAT", default_value = "table")]
    output: Format,
    /// The same as -o json
    #[arg(long)]
    json: bool,
    /// Look again each second, and show rates
    #[arg(long, short)]
    watch: bool,
    /// Ask no other replica
    #[arg(long)]
    local: bool,
}

/// How the answer is shown.
#[derive(clap::ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
enum Format {
    Table,
    Json,
}

impl Args {
    pub(crate) fn run(self, out: &mut Out) -> Result<(), Failure> {
        block_on(async {
            let client = self.server.client()?;
            let mut rates = Rates::default();
            loop {
                let shown = self.look(&client, &mut rates, out).await;
                if !self.watch {
                    return shown.and_then(|text| out.write(&text));
                }
                let text = match shown {
                    Ok(text) => text,
                    // While watching, a cluster that is away is news, not the end.
                    Err(Failure::Unreachable(why) | Failure::Failed(why)) => {
                        format!("{}\n", out.paint().red(&why))
                    }
                    Err(other) => return Err(other),
                };
                let clear = if out.is_terminal() { "\x1b[H\x1b[2J" } else { "" };
                out.write(&format!("{clear}{text}"))?;
                tokio::time::sleep(WATCH).await;
            }
        })
    }

    async fn look(&self, client: &Client, rates: &mut Rates, out: &Out) -> Result<String, Failure> {
        let mut survey = Survey::of(client, self.local).await?;
        if self.json || self.output == Format::Json {
            return Ok(format!("{:#}\n", survey.json()?));
        }
        if self.watch {
            rates.see(&mut survey);
        }
        Ok(page(&survey, out.paint(), out.width()))
    }
}

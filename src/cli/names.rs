//! `everline names`

use super::client::{Listing, block_on};
use super::output::{Failure, Out};
use super::table::{Column, count, duration, render_within};
use crate::admin_types::names::{NameStatus, NamesReply};

/// Look at what the names that are followed stand for
///
/// Examples:
///   everline names                     all names, and whether the name service answers
///   everline names prefill-service     one of them, with its endpoints
#[derive(clap::Args, Debug)]
#[command(verbatim_doc_comment)]
pub(crate) struct Args {
    /// A name; shows its endpoints
    name: Option<String>,
    #[command(flatten)]
    listing: Listing,
}

impl Args {
    pub(crate) fn run(self, out: &mut Out) -> Result<(), Failure> {
        let reply: NamesReply = block_on(self.listing.get("/v1/admin/names"))?;
        if reply.provider.is_empty() {
            let text = "this replica follows no names; name_service.provider and [[discover]], or ksana.enabled, \
                        say which";
            return Err(Failure::Usage(text.to_owned()));
        }
        match self.name {
            None if self.listing.json => out.json(&reply),
            None => {
                let columns = ["NAME", ">USED", ">ENDPOINTS", ">AGE", "STATE"].map(Column::kept);
                let rows = reply.names.iter().map(row).collect();
                out.line(&format!("by {}", reply.provider))?;
                out.line(&render_within(&columns, rows, out.paint(), out.width()))
            }
            Some(name) => {
                let Some(found) = reply.names.iter().find(|is| is.name == name) else {
                    let known: Vec<&str> = reply.names.iter().map(|name| name.name.as_str()).collect();
                    let text = format!("{name} is not followed; followed are: {}", known.join(", "));
                    return Err(Failure::Usage(text));
                };
                if self.listing.json {
                    return out.json(found);
                }
                show(found, out)
            }
        }
    }
}

fn used(name: &NameStatus) -> usize {
    name.endpoints.iter().filter(|endpoint| endpoint.used).count()
}

fn state(name: &NameStatus) -> String {
    match (&name.trouble, name.expired) {
        (Some(why), true) => format!("too old to be used: {why}"),
        (Some(why), false) => why.clone(),
        (None, true) => "too old to be used".to_owned(),
        (None, false) if name.age_ms.is_none() => "not answered yet".to_owned(),
        (None, false) if used(name) == 0 => "nobody to send requests to".to_owned(),
        (None, false) => "ok".to_owned(),
    }
}

fn row(name: &NameStatus) -> Vec<String> {
    let age = name.age_ms.map_or_else(|| "-".to_owned(), duration);
    vec![name.name.clone(), used(name).to_string(), name.endpoints.len().to_string(), age, state(name)]
}

fn show(name: &NameStatus, out: &mut Out) -> Result<(), Failure> {
    let ends = count(name.endpoints.len(), "endpoint");
    let age = name.age_ms.map(|age| format!(", as said {} ago", duration(age))).unwrap_or_default();
    out.line(&format!("{}: {ends}, {} used{age}; {}", name.name, used(name), state(name)))?;
    if name.left_out > 0 {
        out.line(&format!("{} more were left out: a name stands for 4096 at most", name.left_out))?;
    }
    if name.endpoints.is_empty() {
        return Ok(());
    }
    let columns = ["ADDRESS", ">WEIGHT", "STATE", "USED"].map(Column::kept);
    let row = |endpoint: &crate::admin_types::names::NameEndpoint| {
        let used = if endpoint.used { "yes" } else { "no" };
        vec![endpoint.address.clone(), endpoint.weight.to_string(), endpoint.state.clone(), used.to_owned()]
    };
    let rows = name.endpoints.iter().map(row).collect();
    out.line(&render_within(&columns, rows, out.paint(), out.width()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin_types::names::NameEndpoint;

    #[test]
    fn the_state_says_the_worst_that_is_so() {
        let fresh = NameStatus { age_ms: Some(1), ..NameStatus::default() };
        let endpoint = NameEndpoint { used: true, ..NameEndpoint::default() };
        let good = NameStatus { endpoints: vec![endpoint], ..fresh.clone() };
        assert_eq!(state(&good), "ok");
        assert_eq!(state(&fresh), "nobody to send requests to");
        assert_eq!(state(&NameStatus::default()), "not answered yet");
        let away = NameStatus { trouble: Some("refused".to_owned()), ..good };
        assert_eq!(state(&away), "refused");
        assert_eq!(state(&NameStatus { expired: true, ..away }), "too old to be used: refused");
    }
}

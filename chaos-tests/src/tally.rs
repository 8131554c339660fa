//! What came of all clients of a storm: what they heard beside what an unhurt run says, and what
//! they felt of who was hurt.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::figures::Figures;
use crate::hurts::{How, Hurt};
use crate::streams::{Broken, Heard, Pause, Said};

/// A client that does not come back may lose what its own replica carried. What its pauses are
/// told apart by is when they began; that is known as closely as this.
const SLACK: Duration = Duration::from_millis(100);

/// A stream that was not read to its end.
#[derive(Debug)]
pub struct Lost {
    /// What kind of client.
    pub client: &'static str,
    /// Why.
    pub broken: Broken,
    /// When it was asked for.
    pub began: Instant,
    /// When it broke.
    pub broke: Instant,
}

impl Lost {
    /// In words, with who was hurt meanwhile, and when, in milliseconds since it was asked for.
    pub fn tell(&self, hurts: &[Hurt]) -> String {
        let heard = &self.broken.heard;
        let since = |at: Instant| {
            let (after, before) =
                (at.saturating_duration_since(self.began), self.began.saturating_duration_since(at));
            after.as_millis() as i128 - before.as_millis() as i128
        };
        let near = hurts.iter().filter(|hurt| since(hurt.at) > -4000 && hurt.at <= self.broke);
        let near: Vec<String> = near
            .map(|hurt| {
                format!("{:?} {} {}..{:?}", hurt.how, hurt.name, since(hurt.at), hurt.over.map(since))
            })
            .collect();
        format!(
            "{} {} at {:?} and {}, after {} events and {} ms{}: {}; hurt: {}",
            self.client,
            heard.id,
            heard.edges,
            heard.worker.as_deref().unwrap_or("nobody known"),
            heard.events,
            since(self.broke),
            if self.broken.silent { ", silently" } else { "" },
            self.broken.why,
            near.join(", "),
        )
    }
}

/// See the module.
#[derive(Default, Debug)]
pub struct Tally {
    /// Streams read to their end, by kind of client.
    pub good: BTreeMap<&'static str, u32>,
    /// Those that said something else.
    pub wrong: Vec<String>,
    /// Those that were not read to their end.
    pub lost: Vec<Lost>,
    /// Times that a replica said it went on elsewhere.
    pub seams: u32,
    /// Times that a client came back.
    pub returns: u32,
    pauses: Vec<(&'static str, Pause)>,
    aways: Figures,
}

impl Tally {
    /// Takes in what a client got.
    pub fn take(
        &mut self,
        client: &'static str,
        expected: &Said,
        got: Result<Heard, Broken>,
        began: Instant,
    ) {
        match got {
            Ok(heard) => {
                *self.good.entry(client).or_default() += 1;
                self.seams += heard.seams;
                self.returns += heard.returns;
                self.pauses.extend(heard.pauses.iter().map(|pause| (client, pause.clone())));
                if heard.returns > 0 {
                    self.aways.add(heard.away);
                }
                if let Err(difference) = same(expected, &heard.said) {
                    self.wrong.push(format!("{client} {} {difference}", heard.id));
                }
            }
            Err(broken) => self.lost.push(Lost { client, broken, began, broke: Instant::now() }),
        }
    }

    /// Takes in another.
    pub fn merge(&mut self, other: Self) {
        for (client, count) in other.good {
            *self.good.entry(client).or_default() += count;
        }
        self.wrong.extend(other.wrong);
        self.lost.extend(other.lost);
        self.seams += other.seams;
        self.returns += other.returns;
        self.pauses.extend(other.pauses);
        self.aways.merge(&other.aways);
    }

    /// Prints everything, for a record. Where nobody is hurt, two events are a `step` apart.
    pub fn print(&self, hurts: &[Hurt], step: Duration) {
        let mut lost: BTreeMap<&str, u32> = BTreeMap::new();
        self.lost.iter().for_each(|lost_one| *lost.entry(lost_one.client).or_default() += 1);
        let mut clients: Vec<&str> = self.good.keys().chain(lost.keys()).copied().collect();
        clients.sort_unstable();
        clients.dedup();
        for client in clients {
            let of = |counts: &BTreeMap<&str, u32>| counts.get(client).copied().unwrap_or_default();
            let wrong = self.wrong.iter().filter(|text| text.split(' ').next() == Some(client)).count();
            let good = self.good.get(client).copied().unwrap_or_default() as usize - wrong;
            println!("  {client:20} good {good:6}  lost {:5}  wrong {wrong}", of(&lost));
        }
        println!("  {} times a client read over a seam, {} times one came back", self.seams, self.returns);
        let mut pauses: BTreeMap<String, (Figures, Figures)> = BTreeMap::new();
        for (client, pause) in &self.pauses {
            let cause = cause(pause, hurts);
            let kind = cause.map_or_else(|| "nothing that is known".to_owned(), Hurt::kind);
            // Nobody can say anything to the client of a frozen replica, nor to its shim, which comes back
            // when it has waited long enough.
            let whose = match cause {
                _ if client.ends_with("shim") => " (the client of a shim)",
                Some(hurt) if pause.edge.as_ref() == Some(&hurt.name) => " (its own client)",
                _ => "",
            };
            let (all, beyond) = pauses.entry(format!("{kind}{whose}")).or_default();
            let took = pause.until - pause.from;
            all.add(took);
            beyond.add(took.saturating_sub(step));
        }
        for (cause, (all, beyond)) in pauses {
            println!("  between two events, over a seam after {cause}: {all}");
            println!("    without the step that there is between any two: {beyond}");
        }
        println!("  between two events, where the client came back: {}", self.aways);
    }
}

/// Whose hurt a pause is of: the first that falls into it. A replica that is asked to stop hands
/// over while it goes on, so that its falls before.
fn cause<'a>(pause: &Pause, hurts: &'a [Hurt]) -> Option<&'a Hurt> {
    let within = hurts.iter().find(|hurt| hurt.at + SLACK >= pause.from && hurt.at <= pause.until);
    let stopping = |hurt: &&Hurt| {
        let over = hurt.over.is_none_or(|over| over >= pause.from);
        hurt.how == How::Term && hurt.at <= pause.until && over
    };
    within.or_else(|| hurts.iter().rev().find(stopping))
}

/// Whether a client that does not come back may have lost a stream: its own replica was hurt
/// meanwhile. One that got no head does not know which that was.
pub fn is_excused(lost: &Lost, hurts: &[Hurt]) -> bool {
    let edges = &lost.broken.heard.edges;
    let own = |hurt: &&Hurt| edges.contains(&hurt.name);
    let meanwhile = |hurt: &&Hurt| hurt.at <= lost.broke && hurt.over.is_none_or(|over| over >= lost.began);
    edges.is_empty() || hurts.iter().any(|hurt| own(&hurt) && meanwhile(&hurt))
}

/// Where two answers differ; the cached share of the prompt may.
pub fn same(expected: &Said, got: &Said) -> Result<(), String> {
    let usage = |said: &Said| {
        said.usage
            .as_ref()
            .map(|usage| ["prompt_tokens", "completion_tokens"].map(|name| usage[name].clone()))
    };
    if usage(expected) != usage(got) {
        return Err(format!("usage {:?} instead of {:?}", usage(got), usage(expected)));
    }
    for (index, expected) in &expected.choices {
        let Some(got) = got.choices.get(index) else { return Err(format!("no choice {index}")) };
        let at = expected.text.bytes().zip(got.text.bytes()).position(|(one, other)| one != other);
        if expected.text != got.text {
            return Err(format!(
                "choice {index}, from byte {at:?}: {:?} instead of {:?}",
                got.text, expected.text
            ));
        }
        if expected.logprobs != got.logprobs {
            let differing = expected.logprobs.iter().zip(&got.logprobs).find(|(one, other)| one != other);
            let counts = (got.logprobs.len(), expected.logprobs.len());
            return Err(format!("choice {index}, log probabilities {counts:?}: {differing:?}"));
        }
        if (&expected.end, expected.roles) != (&got.end, got.roles) {
            return Err(format!(
                "choice {index}: {:?}, {} roles instead of {:?}, {} roles",
                got.end, got.roles, expected.end, expected.roles
            ));
        }
    }
    if expected.choices.len() != got.choices.len() {
        return Err(format!("{} choices", got.choices.len()));
    }
    Ok(())
}

//! Whether one worker does all of a request or two share it, and which.

use std::sync::OnceLock;

use super::Attempts;
use crate::disagg::Members;
use crate::disagg::shape::Shape;
use crate::http::front::Front;
use crate::http::placing::Placing;
use crate::ids::WorkerId;
use crate::routing::part::{Connectors, Part};
use crate::routing::select::{NoWorker, Selection};
use crate::routing::view::RegistryView;

/// Who does a request.
#[derive(Debug)]
pub(in crate::http) enum Plan {
    /// One worker.
    One(Selection),
    /// One the prefill, and another the rest.
    Two(Box<Pair>),
}

/// Two workers that share a request.
#[derive(Debug)]
pub(in crate::http) struct Pair {
    pub(in crate::http) prefill: Selection,
    pub(in crate::http) decode: Selection,
}

/// Why a plan is what it is, for the metrics.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(in crate::http) enum Why {
    /// Two workers share it.
    Pair,
    /// Little of the prompt has to be computed: not worth a transfer.
    Bypass,
    /// It cannot be split, or nobody is there to split it.
    Alone,
}

impl Why {
    /// All of them, in the order of their declaration.
    pub(in crate::http) const ALL: [Why; 3] = [Why::Pair, Why::Bypass, Why::Alone];

    /// The name in metrics.
    pub(in crate::http) fn as_str(self) -> &'static str {
        match self {
            Why::Pair => "pair",
            Why::Bypass => "bypass",
            Why::Alone => "alone",
        }
    }
}

/// What of a request says how it may be split, looked up when it is first asked for.
#[derive(Debug, Default)]
pub(super) struct Splits(OnceLock<Option<Shape>>);

impl Splits {
    pub(super) fn of(&self, path: &str, body: &[u8]) -> Option<Shape> {
        *self.0.get_or_init(|| Shape::of(path, &Members::parse(body)?))
    }
}

/// Workers of pairs that failed without saying whose fault it was.
#[derive(Debug, Default)]
pub(super) struct Suspects {
    prefill: Vec<WorkerId>,
    decode: Vec<WorkerId>,
}

impl Suspects {
    /// Notes both of a pair. Those that were suspected before, to be tried no more.
    pub(super) fn note(&mut self, pair: &Pair) -> Vec<WorkerId> {
        let mut known = Vec::new();
        for (list, of) in [(&mut self.prefill, &pair.prefill), (&mut self.decode, &pair.decode)] {
            let id = of.worker.id().clone();
            let list = if list.contains(&id) { &mut known } else { list };
            list.push(id);
        }
        known
    }

    /// Whom to do without if that can be, the longest list first, each with those that were tried.
    fn avoided(&self, tried: &[WorkerId]) -> Vec<Vec<WorkerId>> {
        let both = [&self.prefill[..], &self.decode].concat();
        let lists = [both, self.decode.clone()].into_iter().filter(|list| !list.is_empty());
        lists.map(|list| [tried, &list].concat()).collect()
    }
}

impl Attempts<'_> {
    /// Chooses; those that are under suspicion only if there is nobody else.
    pub(super) fn select(&self) -> Result<Plan, NoWorker> {
        let front = &self.shard.front;
        let view = front.control.registry();
        if !view.has_parts {
            return self.timed(Part::Whole, &self.tried).map(Plan::One);
        }
        let shape = self.splits.of(self.outgoing.path(), self.outgoing.body());
        let connectors = shape.map(|shape| shape.connectors()).unwrap_or_default();
        let choose = |part: Part, tried: &[WorkerId]| self.timed(part, tried);
        // Another pair, or the same prefill worker with another decode worker; one worker alone is no better
        // than the pair that failed once.
        for avoided in self.suspects.avoided(&self.tried) {
            if let Ok((plan @ Plan::Two(_), why)) = self.plan(front, &view, connectors, &avoided, choose) {
                front.metrics.planned(why);
                return Ok(plan);
            }
        }
        let (plan, why) = self.plan(front, &view, connectors, &self.tried, choose)?;
        front.metrics.planned(why);
        Ok(plan)
    }

    fn plan(
        &self,
        front: &Front,
        view: &RegistryView,
        connectors: Connectors,
        tried: &[WorkerId],
        choose: impl Fn(Part, &[WorkerId]) -> Result<Selection, NoWorker>,
    ) -> Result<(Plan, Why), NoWorker> {
        let model = self.asked.model.as_deref();
        let connectors = connectors.and(self.asked.placing.prefill_connectors(front, view, model, tried));
        let most = front.config.pd.bypass_tokens;
        let near = Part::Alone { most_uncached: Some(most) };
        if let (true, false, Ok(near)) = (most > 0, connectors.is_empty(), choose(near, tried)) {
            return Ok((Plan::One(near), Why::Bypass));
        }
        let pair = match connectors.is_empty() {
            true => None,
            false => Some(choose(Part::Decode(connectors), tried).and_then(|decode| {
                let connector = decode.worker.record.spec.connector();
                let prefill = choose(Part::Prefill(connector), tried)?;
                Ok(Plan::Two(Box::new(Pair { prefill, decode })))
            })),
        };
        let waits = match pair {
            Some(Ok(pair)) => return Ok((pair, Why::Pair)),
            Some(Err(saturated @ NoWorker::Saturated { .. })) => Some(saturated),
            Some(Err(_)) | None => None,
        };
        let whole = match (choose(Part::Whole, tried), waits) {
            (Ok(whole), _) => Ok(whole),
            // A decode worker is spared others' prefills for as long as somebody is there for them.
            (Err(_), Some(saturated)) => Err(saturated),
            (Err(saturated @ NoWorker::Saturated { .. }), None) => Err(saturated),
            (Err(_), None) => choose(Part::Alone { most_uncached: None }, tried),
        };
        whole.map(|selection| (Plan::One(selection), Why::Alone))
    }

    fn timed(&self, part: Part, tried: &[WorkerId]) -> Result<Selection, NoWorker> {
        let (front, placing) = (&self.shard.front, &self.asked.placing);
        let began = std::time::Instant::now();
        let selection = placing.choose(front, self.asked.model.as_deref(), part, tried);
        self.tracked.selected(placing.policy_name(front, part), began.elapsed());
        selection
    }
}

/// What somebody who explains a choice looks at: the parts, in the order in which they are chosen. One of
/// them is the whole.
pub(in crate::http) fn parts(
    front: &Front,
    placing: &Placing,
    model: Option<&str>,
    path: &str,
    body: &[u8],
) -> Vec<Part> {
    let view = front.control.registry();
    if !view.has_parts {
        return vec![Part::Whole];
    }
    let shape = Splits::default().of(path, body);
    let connectors = shape.map(|shape| shape.connectors()).unwrap_or_default();
    let connectors = connectors.and(placing.prefill_connectors(front, &view, model, &[]));
    let has = |part: Part| {
        placing.rehearse(front, model, part).is_ok_and(|r| r.ranks.iter().any(|(_, share)| *share > 0.0))
    };
    let most = front.config.pd.bypass_tokens;
    let near = Part::Alone { most_uncached: Some(most) };
    if most > 0 && !connectors.is_empty() && has(near) {
        return vec![near];
    }
    let decode = Part::Decode(connectors);
    if !connectors.is_empty()
        && let Ok(rehearsal) = placing.rehearse(front, model, decode)
        && let Some((likeliest, share)) = rehearsal.ranks.iter().max_by(|(_, a), (_, b)| a.total_cmp(b))
        && *share > 0.0
        && let Some(worker) = view.worker(&likeliest.worker)
    {
        return vec![decode, Part::Prefill(worker.record.spec.connector())];
    }
    match has(Part::Whole) {
        true => vec![Part::Whole],
        false => vec![Part::Alone { most_uncached: None }],
    }
}

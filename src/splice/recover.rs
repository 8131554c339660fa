//! What to do about lost legs.

use super::choice::{Channel, Choice, End};
use super::json;
use super::leg;
use super::plan::Resumable;
use super::stream::{BROKEN, Leg, LegId, Lost, Next, Out, Progress, REASONS, Splice};

impl Splice {
    /// What to do about the legs that are lost; what it hands out goes to the client first.
    pub fn recover(&mut self, out: &mut Vec<Out>) -> Next {
        if self.done {
            return Next::Finish;
        }
        if self.all_finished() {
            // Only the end itself was lost.
            self.finish(out);
            return Next::Finish;
        }
        if self.own.is_some() {
            return Next::Continue(Vec::new());
        }
        let nothing_said = self.choices.iter().all(|choice| !choice.spoke && choice.leg.is_none());
        let unread = self.delivered() && self.head.is_none();
        if nothing_said && !unread {
            return self.replay();
        }
        match self.plan.resumable {
            Resumable::Replay(why) => return Next::Lost(Lost::NotResumable(why)),
            Resumable::Continue { .. } => {}
        }
        if let Some(why) = self.broken {
            return Next::Lost(Lost::NotAnyMore(BROKEN[usize::from(why)]));
        }
        let count = self.plan.choices as usize;
        self.choices.resize_with(count, Choice::default);
        let mut lost = Vec::new();
        for at in 0..count {
            let choice = &mut self.choices[at];
            if choice.finished || choice.leg.is_some() {
                continue;
            }
            let before = choice.ids.len();
            choice.cut();
            self.kept = self.kept.saturating_sub(before - self.choices[at].ids.len());
            if let Some(end) = self.over(at) {
                let raw = std::mem::take(&mut self.choices[at].held);
                self.choices[at].dirty.held |= !raw.is_empty();
                if self.speak(at, raw, Some(end), out) == Progress::Done {
                    return Next::Finish;
                }
            } else {
                lost.push(at);
            }
        }
        if lost.is_empty() {
            return Next::Continue(Vec::new());
        }
        let setbacks = lost.iter().map(|at| self.choices[*at].setbacks()).max().unwrap_or(0);
        if self.is_too_often(setbacks) {
            return Next::Lost(Lost::Attempts);
        }
        let legs: Result<Vec<Leg>, Lost> = lost.iter().map(|at| self.leg(*at)).collect();
        match legs {
            Ok(legs) => {
                legs.iter().zip(lost).for_each(|(leg, at)| self.choices[at].leg = Some(leg.id));
                Next::Continue(legs)
            }
            Err(lost) => Next::Lost(lost),
        }
    }

    /// Begins again: the client has seen nothing but that the stream began.
    fn replay(&mut self) -> Next {
        if self.is_too_often(self.setbacks) {
            return Next::Lost(Lost::Attempts);
        }
        for choice in &mut self.choices {
            choice.begin_again();
        }
        self.kept = 0;
        self.broken = None;
        self.prompts.clear();
        if !self.delivered() {
            // Another engine's names for it are as good.
            self.head = None;
        }
        let id = self.next_leg();
        self.own = Some(id);
        Next::Replay(id)
    }

    /// Whether so many engines in a row are enough. The loss of whoever drives this is none of them.
    fn is_too_often(&self, setbacks: u32) -> bool {
        let most = self.plan.options.max_continuations;
        most == 0 || setbacks > most
    }

    /// Notes that an engine was lost, of which choice if not of all.
    pub(super) fn set_back(&mut self, choice: Option<usize>) {
        if let Some(at) = choice {
            return self.choices[at].set_back();
        }
        if self.choices.iter().all(|choice| !choice.spoke) {
            self.setbacks += 1;
            self.unwritten.setbacks = true;
            self.unwritten.any = true;
            return;
        }
        self.choices.iter_mut().filter(|choice| !choice.finished).for_each(Choice::set_back);
    }

    fn next_leg(&mut self) -> LegId {
        self.legs += 1;
        LegId(self.legs - 1)
    }

    /// Whether nothing is left to generate for a choice.
    fn over(&self, at: usize) -> Option<End> {
        let choice = &self.choices[at];
        if let Some(end) = &choice.ending {
            return Some(end.clone());
        }
        let prompt = self.prompts.get(self.prompt_of(at)).and_then(Option::as_ref)?.len();
        let exhausted =
            !choice.ids.is_empty() && leg::remaining(&self.plan, prompt, choice.ids.len()).is_none();
        exhausted.then(|| End { reason: b"\"length\"".to_vec(), stop: b"null".to_vec() })
    }

    fn leg(&mut self, at: usize) -> Result<Leg, Lost> {
        let lost = |why: u8| Lost::NotAnyMore(BROKEN[usize::from(why)]);
        if self.plan.echo && !self.choices[at].spoke {
            return Err(lost(6));
        }
        let state = &self.choices[at];
        if state.guard.is_some() {
            if state.channel.reasons() && self.plan.options.reasoning_end.is_none() {
                return Err(lost(REASONS));
            }
            if self.plan.tools {
                return Err(lost(8));
            }
        }
        let seen = self.choices.iter().any(|choice| choice.channel != Channel::Unset);
        if self.chat && !seen {
            // Another choice is at its end without text. Whether this one reasons nothing tells.
            return Err(lost(REASONS));
        }
        let prompt = self.prompt_of(at);
        let known = self.prompts.get(prompt).cloned().flatten().or_else(|| {
            // The client may have said them itself.
            let mut ids = Vec::new();
            let plan = &self.plan;
            let raw = plan.members.raw(&plan.body, "prompt").filter(|_| !self.chat && plan.prompts == 1)?;
            json::ids(raw, &mut ids).map(|()| ids.into())
        });
        let prompt = known.ok_or(lost(5))?;
        let choice = &self.choices[at];
        let left = leg::remaining(&self.plan, prompt.len(), choice.ids.len()).unwrap_or(1);
        let body = leg::body(&self.plan, at as u32, &prompt, &choice.ids, left);
        let prompt_tokens = prompt.len() + choice.ids.len();
        self.choices[at].begin_leg();
        Ok(Leg { id: self.next_leg(), choice: at as u32, path: leg::PATH, body, prompt_tokens })
    }
}

//! How streams are generated and handed out.

use std::collections::HashMap;
use std::time::Duration;

use crate::http::throttle::Rate;
use crate::splice;

/// How streams are generated and handed out.
#[derive(Clone, Debug)]
pub struct StreamOptions {
    /// What may be continued, and how often.
    pub splice: splice::Options,
    /// The same of models that are configured otherwise.
    pub by_model: HashMap<String, splice::Options>,
    /// After what silence a client gets a sign of life: 5 s.
    pub heartbeat: Duration,
    /// How long generation goes on while no client listens: 30 s.
    pub orphan_grace: Duration,
    /// How long a stream is kept after its end: 300 s.
    pub keep: Duration,
    /// How often each key may ask for streams that are not its own, or do not exist: 10 a second, 100
    /// at once.
    pub guesses: Rate,
}

impl Default for StreamOptions {
    fn default() -> Self {
        Self {
            splice: splice::Options::default(),
            by_model: HashMap::new(),
            heartbeat: Duration::from_secs(5),
            orphan_grace: Duration::from_secs(30),
            keep: Duration::from_secs(300),
            guesses: Rate::new(10.0, 100),
        }
    }
}

impl StreamOptions {
    /// What may be continued of a model's answers, where it has so much context.
    pub(crate) fn splice_of(&self, model: Option<&str>, context: Option<u32>) -> splice::Options {
        let own = model.and_then(|model| self.by_model.get(model));
        let mut options = own.unwrap_or(&self.splice).clone();
        options.context = options.context.or(context);
        options
    }
}

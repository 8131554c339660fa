//! Output streams through the deaths of whoever carries them, read by clients of every kind.
//!
//! `EVERLINE_STREAMS`, `EVERLINE_STREAM_SECONDS` and `EVERLINE_STREAM_STEP_MS` make the storm larger,
//! longer, and the engines slower; see `docs/explanation/streams.md` for a recorded run.

use std::sync::Arc;
use std::time::{Duration, Instant};

use chaos_tests::fleet::Fleet;
use chaos_tests::hurts::{Hurt, Hurter};
use chaos_tests::ports::free_address;
use chaos_tests::process::Process;
use chaos_tests::programs::Program;
use chaos_tests::streams::{Broken, Heard, Manner, Question, Reader, STALL, Said, read};
use chaos_tests::tally::{Lost, Tally, is_excused};
use chaos_tests::wait::{check, until};
use tokio::sync::watch;
use tokio::task::JoinSet;

/// Different questions.
const QUESTIONS: usize = 30;
/// Tokens of an answer.
const TOKENS: u32 = 80;
/// After so much silence even the shim would have given up.
const LIMIT: Duration = Duration::from_secs(60);
/// Until the cluster has forgotten what clients left behind: the grace for those that may come back,
/// and some more.
const FORGOTTEN: Duration = Duration::from_secs(60);

fn number(variable: &str, default: usize) -> usize {
    std::env::var(variable).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// Each question and its right answer, from a fleet that nobody hurts. Half of the questions have a
/// stop string that comes in the second half of the text.
async fn answers(base: &str) -> Vec<(Question, Said)> {
    let ask =
        async |question: &Question| read(base, question, Manner::Get).await.expect("nobody is hurt").said;
    let mut known = Vec::new();
    for at in 0..QUESTIONS {
        let open = Question::mixed(at, TOKENS, None);
        let base = base.to_owned();
        known.push(tokio::spawn(async move {
            let said = read(&base, &open, Manner::Get).await.expect("nobody is hurt").said;
            (open, said)
        }));
    }
    let mut all = Vec::new();
    for (at, known) in known.into_iter().enumerate() {
        let (open, whole) = known.await.expect("clients do not panic");
        if at % 4 < 2 {
            all.push((open, whole));
            continue;
        }
        let text: Vec<char> = whole.choices[&0].text.chars().collect();
        let stop: String = text[text.len() * 3 / 5..].iter().take(5).collect();
        let question = Question::mixed(at, TOKENS, Some(&stop));
        let said = ask(&question).await;
        assert_eq!(said.choices[&0].end.as_ref().map(|end| end.0.as_str()), Some("stop"), "{stop:?}");
        all.push((question, said));
    }
    all
}

/// Who reads, and how.
#[derive(Clone)]
enum Reads {
    /// Here, and takes its replica to be dead after so much silence.
    Here(Manner, Duration),
    /// A program does, in this manner.
    There(Arc<Program>, &'static str),
}

/// A kind of client.
#[derive(Clone)]
struct Client {
    name: &'static str,
    reads: Reads,
    base: String,
}

impl Client {
    async fn ask(&self, question: &Question) -> Result<Heard, Broken> {
        match &self.reads {
            Reads::Here(manner, stall) => {
                let (base, progress) = (self.base.clone(), watch::Sender::default());
                Reader { base, key: None, manner: *manner, stall: *stall, progress }.read(question).await
            }
            Reads::There(program, manner) => program.ask(manner, &self.base, question).await,
        }
    }

    /// It does nothing when it is cut off.
    fn is_helpless(&self) -> bool {
        self.name.starts_with("plain")
    }
}

/// All kinds of clients that there are programs for, and those programs.
async fn clients(fleet: &Fleet, base: &str, shim: &str) -> (Vec<Client>, Vec<Arc<Program>>) {
    let client = |name, reads, base: &str| Client { name, reads, base: base.to_owned() };
    let mut all = vec![
        client("get", Reads::Here(Manner::Get, STALL), base),
        client("post-again", Reads::Here(Manner::Repost, STALL), base),
        client("plain", Reads::Here(Manner::Plain, LIMIT), base),
        client("http-through-shim", Reads::Here(Manner::Plain, LIMIT), shim),
    ];
    let python = Program::python(fleet.folder(), "python-asyncio").await;
    // A process of their own. With both in one, Python 3.11 was seen to complain, once in ten minutes, of
    // asynchronous generators of httpx that it collected while they ran.
    let threads = Program::python(fleet.folder(), "python-threads").await;
    let node = Program::node(fleet.folder()).await;
    for (program, name, manner, base) in [
        (&python, "python", "python", base),
        (&threads, "python-sync", "python-sync", base),
        (&python, "sdk-through-shim", "plain", shim),
        (&python, "plain-sdk", "plain", base),
    ] {
        if let Some(program) = program {
            all.push(client(name, Reads::There(Arc::clone(program), manner), base));
        }
    }
    if let Some(program) = &node {
        for name in ["js", "event-source", "fetch-event-source"] {
            all.push(client(name, Reads::There(Arc::clone(program), name), base));
        }
    }
    (all, [python, threads, node].into_iter().flatten().collect())
}

struct Storm {
    stop: watch::Sender<bool>,
    clients: JoinSet<Tally>,
}

impl Storm {
    fn begin(kinds: &[Client], known: &Arc<Vec<(Question, Said)>>, clients: usize) -> Self {
        let stop = watch::Sender::new(false);
        let mut set = JoinSet::new();
        for at in 0..clients {
            let (known, stopped, client) =
                (Arc::clone(known), stop.subscribe(), kinds[at % kinds.len()].clone());
            set.spawn(async move {
                let mut tally = Tally::default();
                let mut turn = at * 7;
                while !*stopped.borrow() {
                    let (question, expected) = &known[turn % known.len()];
                    turn += 1;
                    let began = Instant::now();
                    let got = client.ask(question).await;
                    let failed = got.is_err();
                    tally.take(client.name, expected, got, began);
                    if failed {
                        tokio::time::sleep(Duration::from_millis(50)).await;
                    }
                }
                tally
            });
        }
        Self { stop, clients: set }
    }

    async fn end(mut self) -> Tally {
        self.stop.send_replace(true);
        let mut all = Tally::default();
        while let Some(tally) = self.clients.join_next().await {
            all.merge(tally.expect("clients do not panic"));
        }
        all
    }
}

/// Nobody who comes back lost anything; who does not lost only what their own replica carried when
/// it was hurt, and got an error.
fn judge(tally: &Tally, kinds: &[Client], hurts: &[Hurt]) {
    assert!(tally.wrong.is_empty(), "{:#?}", &tally.wrong[..tally.wrong.len().min(5)]);
    let is_helpless = |name| kinds.iter().any(|kind| kind.name == name && kind.is_helpless());
    let unexcused: Vec<&Lost> = tally
        .lost
        .iter()
        .filter(|lost| !is_helpless(lost.client) || lost.broken.silent || !is_excused(lost, hurts))
        .collect();
    let told: Vec<String> = unexcused.iter().take(10).map(|lost| lost.tell(hurts)).collect();
    assert!(unexcused.is_empty(), "{} lost, such as\n{}", unexcused.len(), told.join("\n"));
    for kind in kinds {
        assert!(tally.good.contains_key(kind.name), "no stream of {} came to its end", kind.name);
    }
}

/// Nothing is left behind: no request is booked anywhere, and no stream runs.
async fn forgets(fleet: &Fleet) {
    for replica in &fleet.replicas {
        until("no load is left", FORGOTTEN, async || {
            let workers = replica.local_workers().await?;
            let booked: Vec<_> = workers
                .iter()
                .map(|w| (w.id.to_string(), w.requests, w.decode_blocks, w.prefill_tokens))
                .collect();
            let is_idle =
                booked.iter().all(|(_, requests, blocks, tokens)| (*requests, *blocks, *tokens) == (0, 0, 0));
            check(is_idle, || format!("{} has {booked:?}", replica.name))
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_go_on_through_the_deaths_of_replicas_and_workers() {
    let (streams, seconds) = (number("EVERLINE_STREAMS", 44), number("EVERLINE_STREAM_SECONDS", 60));
    // Two cores carry so many tokens a second, and the clients that read them.
    let step = number("EVERLINE_STREAM_STEP_MS", (streams * 2 / 5).max(40));
    let fleet = Fleet::of(3).engines(4).engine_arg("--decode-step-ms").engine_arg(&step.to_string());
    // Somebody is hurt each second: a long answer may live through more than the default of three.
    let mut fleet = fleet.set("streams.max_continuations=16").start().await;
    let base = format!("http://{}", fleet.balancer);
    let at = free_address();
    let arguments = ["shim", "--listen", &at.to_string(), "--upstream", &base].map(str::to_owned);
    let shim_log = fleet.folder().join("shim.log");
    let shim = Process::start(&arguments, &shim_log);
    let shim_base = format!("http://{at}");
    let known = Arc::new(answers(&base).await);
    let (kinds, programs) = clients(&fleet, &base, &shim_base).await;
    // Each of them can ask, and reads what the others read, while nobody is hurt.
    let mut trials = JoinSet::new();
    for (at, (kind, (question, _))) in
        kinds.iter().flat_map(|kind| known.iter().take(6).map(move |one| (kind, one))).enumerate()
    {
        let (kind, question) = (kind.clone(), question.clone());
        trials.spawn(async move { (at % 6, kind.name, kind.ask(&question).await) });
    }
    let mut tally = Tally::default();
    while let Some(trial) = trials.join_next().await {
        let (at, name, got) = trial.expect("clients do not panic");
        tally.take(name, &known[at].1, got, Instant::now());
    }
    assert!(tally.wrong.is_empty() && tally.lost.is_empty(), "nobody is hurt: {tally:#?}");

    let storm = Storm::begin(&kinds, &known, streams);
    let mut hurter = Hurter::default();
    let began = Instant::now();
    let mut next = began;
    while began.elapsed() < Duration::from_secs(seconds as u64) {
        hurter.heal(&mut fleet).await;
        if Instant::now() >= next {
            hurter.strike(&mut fleet).await;
            next += Duration::from_secs(1);
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let took = began.elapsed();
    hurter.settle(&mut fleet).await;
    let tally = storm.end().await;

    println!(
        "{} hurt in {} s, {streams} streams of {TOKENS} tokens at a time, a token each {step} ms:",
        hurter.hurts.len(),
        took.as_secs()
    );
    for (kind, count) in hurter.kinds() {
        println!("  {count:4} {kind}");
    }
    tally.print(&hurter.hurts, Duration::from_millis(step as u64));
    println!("  until no other replica counts a request of a killed one: {}", hurter.load_gone);
    let resumed = std::fs::read_to_string(&shim_log).unwrap_or_default().matches("a stream goes on").count();
    println!("  {resumed} times the shim came back");
    judge(&tally, &kinds, &hurter.hurts);
    assert!(tally.seams > 0 && tally.returns > 0 && resumed > 0, "nobody was hurt");
    for program in &programs {
        assert_eq!(program.complaints(), "", "on standard error");
    }
    drop((programs, kinds, shim));
    forgets(&fleet).await;
    fleet.agree().await;
}

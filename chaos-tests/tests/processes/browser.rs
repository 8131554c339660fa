//! A page in a real browser, of another origin, that reads a stream with `EventSource` while the
//! replicas die one after the other.

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use chaos_tests::binary::run_ok;
use chaos_tests::client::Http;
use chaos_tests::fleet::{Fleet, MODEL, ready};
use chaos_tests::raw::{Answer, RawWorker, Seen, Then, exchange, header};
use chaos_tests::streams::Question;
use chaos_tests::wait::{check, until};
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio::sync::mpsc;

const LIMIT: Duration = Duration::from_secs(60);

/// Reads the stream to its end, says how far it has come, and in the end what it was told. Nothing
/// in it knows of replicas: reconnecting is the browser's.
const PAGE: &str = r#"<!doctype html><title>reader</title><script>
const { url, key } = JSON.parse(decodeURIComponent(location.hash.slice(1)));
const say = (said) => fetch("/said", { method: "POST", body: JSON.stringify(said) });
const heard = { what: "end", opens: 0, errors: 0, text: "", ids: [] };
const source = new EventSource(url);
source.onopen = () => { heard.opens += 1; };
source.onerror = () => {
  heard.errors += 1;
  if (source.readyState === EventSource.CLOSED) say({ ...heard, what: "closed" });
};
source.onmessage = async ({ data, lastEventId }) => {
  heard.ids.push(lastEventId);
  if (data !== "[DONE]") {
    for (const { text } of JSON.parse(data).choices) heard.text += text;
    if (heard.ids.length % 10 === 0) say({ what: "progress", events: heard.ids.length });
    return;
  }
  source.close();
  // What needs the browser's leave: headers of our own, and reading some of the answer's.
  const headers = { authorization: `Bearer ${key}`, accept: "application/json", "everline-resume": "1" };
  const status = await fetch(url.split("?")[0], { headers });
  heard.stream = status.headers.get("everline-stream");
  heard.state = (await status.json()).state;
  say(heard);
};
</script>"#;

/// The browser; ended with its page.
struct Browser(Child);

impl Browser {
    /// The name of one that is installed.
    fn installed() -> Option<&'static str> {
        let names = ["chromium-headless-shell", "chromium", "chromium-browser", "google-chrome"];
        let runs = |name: &&&str| {
            let version = Command::new(name).arg("--version").stdin(Stdio::null()).output();
            version.is_ok_and(|output| output.status.success())
        };
        names.iter().find(runs).copied()
    }

    fn open(program: &str, url: &str, folder: &std::path::Path) -> Self {
        let profile = format!("--user-data-dir={}", folder.join("browser").display());
        // As root there is no sandbox; nothing but our own page is opened.
        let flags =
            ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"];
        let child = Command::new(program)
            .args(flags)
            .arg(profile)
            .arg(url)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        Self(child.expect("the browser starts"))
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The page's own server: hands it out, and takes what it says.
async fn site() -> (RawWorker, mpsc::UnboundedReceiver<Value>) {
    let (say, said) = mpsc::unbounded_channel();
    let server = RawWorker::start(move |mut stream: TcpStream, seen: Seen| {
        let say = say.clone();
        async move {
            let answer = match seen.head.split(' ').nth(1) {
                Some("/page") => format!(
                    "HTTP/1.1 200 OK\r\ncontent-type: text/html\r\ncontent-length: {}\r\n\r\n{PAGE}",
                    PAGE.len()
                ),
                Some("/said") => {
                    // The test is over when nobody listens.
                    let _ = say.send(serde_json::from_slice(&seen.body).expect("the page says JSON"));
                    "HTTP/1.1 204 No Content\r\n\r\n".to_owned()
                }
                _ => "HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n".to_owned(),
            };
            // A browser that is gone needs no answer.
            let _ = stream.write_all(answer.as_bytes()).await;
            (stream, Then::KeepAlive)
        }
    })
    .await;
    (server, said)
}

async fn next(said: &mut mpsc::UnboundedReceiver<Value>) -> Value {
    tokio::time::timeout(LIMIT, said.recv()).await.expect("the page goes on").expect("its server is there")
}

/// Percent-encodes what follows a `#`.
fn fragment(json: &Value) -> String {
    json.to_string().bytes().fold(String::new(), |mut text, byte| {
        match byte.is_ascii_alphanumeric() {
            true => text.push(char::from(byte)),
            false => text.push_str(&format!("%{byte:02X}")),
        }
        text
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_browsers_event_source_reads_a_stream_whole_through_the_deaths_of_all_replicas() {
    let Some(program) = Browser::installed() else {
        println!("SKIPPED: there is no browser; apt-get install chromium-headless-shell");
        return;
    };
    let made = run_ok(&["keys", "new", "a"]).await;
    let key = made.lines().find(|line| line.starts_with("ev_")).expect("a key").to_owned();
    let entry = made.lines().skip_while(|line| *line != "[[key]]").collect::<Vec<_>>().join("\n");
    let (site, mut said) = site().await;
    let (origin, stranger) =
        (format!("http://{}", site.address), format!("http://localhost:{}", site.address.port()));
    let mut fleet = Fleet::of(3)
        .engines(2)
        .engine_arg("--decode-step-ms")
        .engine_arg("100")
        .config(&entry)
        .set(&format!("http.cors_origins={origin}"))
        .start()
        .await;
    let base = format!("http://{}", fleet.balancer);
    let body = json!({"model": MODEL, "stream": true, "max_tokens": 400, "prompt": "naïve café 日本"});
    let question = Question { path: "/v1/completions", body };
    // What nobody disturbs, at an engine itself, meanwhile.
    let (engine, mut alone) =
        (format!("http://{}{}", fleet.engines[0].address, question.path), question.body.clone());
    alone["stream"] = json!(false);
    let whole =
        tokio::spawn(async move { Http::fresh().post(&engine, &alone, 2 * LIMIT).await?.json::<Value>() });

    // Somebody with a key begins it, and asks for the right to read it.
    let (_stream, head) = crate::bounds::begin(fleet.balancer, Some(&key), &question.body).await;
    let id = header(&head, "everline-stream").expect("a stream").to_owned();
    let asked = format!(
        "POST /v1/streams/{id}/token HTTP/1.1\r\nhost: a\r\nconnection: close\r\nauthorization: Bearer {key}\r\n\
         content-length: 0\r\n\r\n"
    );
    let answer = Answer::parse(&exchange(fleet.balancer, asked.as_bytes(), LIMIT).await.expect("an end"));
    let granted: Value = serde_json::from_slice(&answer.body).expect("JSON");
    let cap = granted["cap"].as_str().unwrap_or_else(|| panic!("a capability, not {granted}"));
    let url = format!("{base}/v1/streams/{id}?cap={cap}");
    let about = fragment(&json!({"url": url, "key": key}));

    let browser = Browser::open(program, &format!("{origin}/page#{about}"), fleet.folder());
    assert_eq!(next(&mut said).await["what"], "progress");
    for at in 0..3 {
        until("somebody else has it, too", LIMIT, async || {
            let mut having = Vec::new();
            for replica in &fleet.replicas {
                having.extend(replica.stream_copy(&id).await.ok().map(|copy| (&replica.name, copy.role)));
            }
            check(having.len() >= 2, || format!("only {having:?}"))
        })
        .await;
        fleet.replicas[at].kill9();
        // What the page said before is no sign of life.
        while said.try_recv().is_ok() {}
        let progress = next(&mut said).await;
        assert_eq!(progress["what"], "progress", "{progress}");
        fleet.replicas[at].start();
        ready(&fleet.replicas[at], LIMIT).await;
    }
    let heard = loop {
        let said = next(&mut said).await;
        if said["what"] != "progress" {
            break said;
        }
    };
    drop(browser);
    assert_eq!(heard["what"], "end", "{heard}");
    let ids: Vec<&str> = heard["ids"].as_array().expect("a list").iter().filter_map(Value::as_str).collect();
    for (seq, event) in ids.iter().enumerate() {
        // Behind the number there may be who said it.
        let number = event.strip_prefix(&format!("{id}.")).and_then(|rest| rest.split('.').next());
        assert_eq!(number, Some(seq.to_string().as_str()), "{event}");
    }
    let whole = whole.await.expect("a client does not panic").expect("nobody hurts an engine");
    assert_eq!(heard["text"], whole["choices"][0]["text"]);
    assert!(heard["opens"].as_u64() >= Some(2), "it never had to come back: {heard}");
    assert_eq!((&heard["stream"], &heard["state"]), (&json!(id), &json!("completed")), "{heard}");
    println!("{} events, {} connections", ids.len(), heard["opens"]);

    // A page of an origin that is not listed gets nothing, with the same capability.
    let browser = Browser::open(program, &format!("{stranger}/page#{about}"), fleet.folder());
    let refused = next(&mut said).await;
    assert_eq!((&refused["what"], &refused["ids"]), (&json!("closed"), &json!([])), "{refused}");
    drop(browser);
}

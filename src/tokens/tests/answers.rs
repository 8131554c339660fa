//! The blocks behind a prompt are those that the conversation's next prompt begins with.

use super::*;
use crate::tokens::answer::Collector;

/// Local hashes of a prompt, and behind it those of the answer.
async fn with_answer(model: &str, path: &str, request: &str, events: &str) -> (Prompt, Vec<u64>) {
    let tokenizers = tiny(Options::default(), None);
    let prompt = ask(&tokenizers, model, path, request).await;
    assert!(prompt.can_go_on(), "{request}");
    let form = Form::of_path(path).unwrap();
    let mut answer = Collector::new(form, true, prompt.ids().is_none()).unwrap();
    answer.push(events.as_bytes());
    let answered = Answered { model: model.to_owned(), form, prompt: prompt.clone(), answer };
    let more = tokenizers.behind(answered, 4).await;
    let all = prompt.key(4).hashes.into_iter().chain(more).map(|hash| hash.0).collect();
    (prompt, all)
}

async fn hashes(model: &str, path: &str, request: &str) -> Vec<u64> {
    let tokenizers = tiny(Options::default(), None);
    let prompt = ask(&tokenizers, model, path, request).await;
    prompt.key(4).hashes.into_iter().map(|hash| hash.0).collect()
}

/// How many of `one` the other begins with.
fn shared(one: &[u64], other: &[u64]) -> usize {
    one.iter().zip(other).take_while(|(a, b)| a == b).count()
}

fn delta(text: &str, finish: &str) -> String {
    format!(
        "data: {{\"choices\":[{{\"index\":0,\"delta\":{{\"content\":\"{text}\"}},\"finish_reason\":{finish}}}]}}\n\n"
    )
}

const SAID: &str = r#"{"role":"user","content":"Tell me of the river and of the stones that lie in it."}"#;

#[tokio::test]
async fn the_next_prompt_begins_with_the_answer() {
    let text = "The river is long, and the stones are round and grey; nobody has counted them. ".repeat(4);
    let events = delta("", "null") + &delta(&text[..60], "null") + &delta(&text[60..], "\"stop\"");
    let before = format!(r#"{{"messages":[{SAID}]}}"#);
    let quoted = serde_json::to_string(&text).unwrap();
    let next = format!(
        r#"{{"messages":[{SAID},{{"role":"assistant","content":{quoted}}},{{"role":"user","content":"And?"}}]}}"#
    );
    let path = "/v1/chat/completions";
    // With a tokenizer, and without one.
    for model in ["tiny", "unknown"] {
        let (prompt, all) = with_answer(model, path, &before, &events).await;
        let next = hashes(model, path, &next).await;
        let own = prompt.key(4).hashes.len();
        assert!(all.len() > own + 12, "{model}: {} of {own}", all.len());
        assert_eq!(shared(&all, &next), all.len(), "{model}");
        assert!(shared(&all[..own], &next) == own && next.len() >= all.len());
    }
}

#[tokio::test]
async fn the_last_token_of_an_answer_that_was_cut_is_left_out() {
    let ids: Vec<u32> = (0..8).collect();
    let request = format!(r#"{{"prompt":{}}}"#, serde_json::to_string(&ids).unwrap());
    let event = |told: &str| {
        format!("data: {{\"choices\":[{{\"index\":0,\"text\":\"x\",\"token_ids\":{told}}}]}}\n\n")
    };
    for (told, blocks) in [("[8,9,10,11]", 2), ("[8,9,10,11,12]", 3), ("[]", 2)] {
        let (_, all) = with_answer("unknown", "/v1/completions", &request, &event(told)).await;
        let whole = local_hashes(&(0..12).collect::<Vec<u32>>(), 4, Seed::default());
        assert_eq!(all.len(), blocks, "{told}");
        assert!(all.iter().zip(whole).all(|(hash, whole)| *hash == whole.0), "{told}");
    }
    // Of ids in front, text tells nothing without a tokenizer, and with one it does.
    let text =
        "data: {\"choices\":[{\"text\":\"abc def ghi jkl mno pqr stu vwx\",\"finish_reason\":\"stop\"}]}\n\n";
    let (_, without) = with_answer("unknown", "/v1/completions", &request, text).await;
    let (_, with) = with_answer("tiny", "/v1/completions", &request, text).await;
    assert_eq!((without.len(), with.len() > 2), (2, true), "{text}");
}

//! Templates against what transformers renders.

use std::time::{Duration, UNIX_EPOCH};

use super::golden;
use crate::tokens::json::Json;
use crate::tokens::template::{ChatTemplate, Variables};

#[test]
fn templates_render_as_with_transformers() {
    let text = std::fs::read_to_string(golden("templates/cases.json")).unwrap();
    let cases: Vec<Json> = serde_json::from_str(&text).unwrap();
    let special = [("bos_token", "<s>"), ("eos_token", "</s>")];
    let special = special.map(|(key, value)| (key.to_owned(), Json::from(value)));
    let mut wrong = Vec::new();
    let mut rendered = 0;
    for case in &cases {
        let file = case.text("template").unwrap();
        let name = format!("{file}: {}", case.text("name").unwrap());
        let source = std::fs::read_to_string(golden("templates").join(file)).unwrap();
        let template = ChatTemplate::new(&source).unwrap_or_else(|e| panic!("{name}: {e}"));
        let kwargs = match case.get("kwargs") {
            Some(Json::Object(members)) => members.clone(),
            _ => Vec::new(),
        };
        let is = |key| case.get(key) == Some(&Json::Bool(true));
        let result = template.render(&Variables {
            messages: case.list("messages").unwrap(),
            tools: case.list("tools"),
            add_generation_prompt: is("add_generation_prompt"),
            continue_final_message: is("continue_final_message"),
            others: &[&special, &kwargs],
            now: UNIX_EPOCH + Duration::from_secs(1_700_000_000),
        });
        match (case.text("rendered"), result) {
            (Some(expected), Ok(text)) if text == expected => rendered += 1,
            // Of lists as text Jinja2 and minijinja think differently; engines never send them there.
            (None, Err(_)) => {}
            (None, Ok(_)) if name.ends_with("parts") => {}
            (expected, result) => {
                wrong.push(format!("{name}\n  expected {expected:?}\n  but got  {result:?}"))
            }
        }
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
    assert!(rendered > 100, "{rendered}");
}

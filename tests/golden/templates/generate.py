"""Renders the cases with transformers and writes them, with what came out, to cases.json.

Needs `pip install transformers jinja2`; no model and no network. Run it in this folder after a
template or a case was changed.
"""
import datetime
import json
import pathlib

import transformers.utils.chat_template_utils as ctu

FIXED = datetime.datetime(2023, 11, 14, 22, 13, 20)


class Clock(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return FIXED


ctu.datetime = Clock

PARAMETERS = {
    "type": "object",
    "properties": {
        "place": {"type": "string", "description": " Where, e.g. \"Zürich\" "},
        "days": {"type": ["integer", "null"], "minimum": 0.5, "maximum": 1e22},
        "tags": {"type": "array", "items": {"type": "string"}},
        "extra": {"type": "object", "additionalProperties": {"type": "boolean"}},
    },
    "required": ["place"],
}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "Foretells <weather> & more", "parameters": PARAMETERS}}
PLAIN = {"type": "function", "function": {"name": "now", "description": None, "parameters": {"type": "object", "properties": {}}}}
S = {"role": "system", "content": "  You are terse. ü \n"}
U = {"role": "user", "content": "What's the weather?\n\n"}
A = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nSunny 🌞 "}
U2 = {"role": "user", "content": "And tomorrow? {{ not a template }}"}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": {"place": "Zürich", "tags": ["a", "b\"c"]}}}]}
CALL1 = {"role": "assistant", "content": "", "tool_calls": [{"id": "abcdefghi", "type": "function", "function": {"name": "search", "arguments": {"query": "x y", "site": "z"}}}]}
RESULT = {"role": "tool", "tool_call_id": "abcdefghi", "content": "{\"sky\": \"clear\"}"}
THOUGHT = {"role": "assistant", "content": "Rain.", "reasoning_content": "clouds\n"}

CONVERSATIONS = {
    "one": dict(messages=[U]),
    "system": dict(messages=[S, U]),
    "turns": dict(messages=[S, U, A, U2]),
    "closed": dict(messages=[U, A], add_generation_prompt=False),
    "continued": dict(messages=[U, A], add_generation_prompt=False, continue_final_message=True),
    "tools": dict(messages=[S, U], tools=[WEATHER, PLAIN]),
    "called": dict(messages=[S, U, CALL, RESULT], tools=[WEATHER]),
    "called twice": dict(messages=[U, CALL, RESULT, RESULT, A, U2], tools=[WEATHER, PLAIN]),
    "thought": dict(messages=[U, CALL, RESULT, THOUGHT, U2, THOUGHT], add_generation_prompt=False),
    "unthinking": dict(messages=[U], kwargs={"enable_thinking": False}),
    "builtin": dict(messages=[U, CALL1], kwargs={"builtin_tools": ["search", "interpreter"], "date_string": "1 May"}),
    "tools apart": dict(messages=[S, U], tools=[WEATHER], kwargs={"tools_in_user_message": False}),
    "documents": dict(messages=[U], kwargs={"documents": [{"title": "a b", "text": "x", "n": 1.5}, {"k": True}]}),
    "wrong order": dict(messages=[A, U]),
    "parts": dict(messages=[{"role": "user", "content": [{"type": "text", "text": " a "}, {"type": "image"}, {"type": "text", "text": "b"}]}]),
}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


def main():
    here = pathlib.Path(__file__).parent
    out = []
    for path in sorted(here.glob("*.jinja")):
        for name, case in CONVERSATIONS.items():
            case = {"add_generation_prompt": True, "continue_final_message": False, "tools": None, "kwargs": {}, **case}
            kwargs = {**SPECIAL, **case["kwargs"]}
            documents = kwargs.pop("documents", None)
            try:
                text = ctu.render_jinja_template(
                    [json.loads(json.dumps(case["messages"]))], tools=case["tools"], documents=documents,
                    chat_template=path.read_text(encoding="utf-8"),
                    add_generation_prompt=case["add_generation_prompt"],
                    continue_final_message=case["continue_final_message"], **kwargs)[0][0]
            except Exception:
                text = None
            out.append({"template": path.name, "name": name, **case, "rendered": text})
    with open(here / "cases.json", "w", encoding="utf-8") as file:
        json.dump(out, file, ensure_ascii=False, indent=1)
        file.write("\n")
    print(len(out), "cases,", sum(case["rendered"] is None for case in out), "refused")


main()

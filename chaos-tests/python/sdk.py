"""Asks through the official client, everything it has for what Everline serves.

Usage: python -W error sdk.py BASE_URL MODEL ENGINE_URL

Warnings are errors: a client that grumbles about an answer is a failure. ENGINE_URL is an engine
of its own, which is told to answer 429 and 401 through the router.
"""

import json
import sys
import urllib.request

import openai
from openai import OpenAI

base_url, model, engine_url = sys.argv[1:]
client = OpenAI(base_url=base_url, api_key="unused", max_retries=0, timeout=20)
answers = 0

assert model in [m.id for m in client.models.list().data], "the model is listed"

for round in range(3):
    prompt = f"prompt number {round}"
    messages = [{"role": "user", "content": prompt}]

    raw = client.chat.completions.with_raw_response.create(model=model, messages=messages, max_tokens=24)
    assert raw.headers["everline-worker"] and raw.headers["everline-replica"], dict(raw.headers)
    assert raw.headers["x-request-id"], dict(raw.headers)
    whole = raw.parse()
    assert whole._request_id == raw.headers["x-request-id"], whole._request_id
    text = whole.choices[0].message.content
    assert text and whole.choices[0].finish_reason == "length", whole
    assert whole.usage.completion_tokens == 24, whole.usage

    streamed, reason, usage = "", None, None
    options = {"include_usage": True}
    for chunk in client.chat.completions.create(
        model=model, messages=messages, max_tokens=24, stream=True, stream_options=options
    ):
        if chunk.choices:
            streamed += chunk.choices[0].delta.content or ""
            reason = chunk.choices[0].finish_reason or reason
        usage = chunk.usage or usage
    assert (streamed, reason) == (text, "length"), (streamed, text, reason)
    assert usage.completion_tokens == 24, usage

    # The helper that gathers a stream, and an early end.
    with client.chat.completions.stream(model=model, messages=messages, max_tokens=24) as stream:
        gathered = "".join(event.delta for event in stream if event.type == "content.delta")
    assert gathered == text, (gathered, text)
    with client.chat.completions.create(model=model, messages=messages, max_tokens=400, stream=True) as cut:
        next(iter(cut))

    whole = client.completions.create(model=model, prompt=prompt, max_tokens=24)
    text = whole.choices[0].text
    assert text and whole.choices[0].finish_reason == "length", whole
    streamed, reason = "", None
    for chunk in client.completions.create(model=model, prompt=prompt, max_tokens=24, stream=True):
        if chunk.choices:
            streamed += chunk.choices[0].text
            reason = chunk.choices[0].finish_reason or reason
    assert (streamed, reason) == (text, "length"), (streamed, text, reason)

    # The client asks for base64 by itself and unpacks it.
    vectors = client.embeddings.create(model=model, input=[prompt, "another"]).data
    assert len(vectors) == 2 and len(vectors[0].embedding) == 64, vectors
    floats = client.embeddings.create(model=model, input=prompt, encoding_format="float").data[0].embedding
    assert max(abs(a - b) for a, b in zip(floats, vectors[0].embedding)) < 1e-6
    answers += 8


def expect(error, act, status, code=None):
    """The client must know the error for what it is."""
    global answers
    answers += 1
    try:
        act()
    except error as caught:
        assert type(caught) is error, repr(caught)
        assert caught.status_code == status and caught.body["message"], (caught.status_code, caught.body)
        assert code is None or caught.code == code, caught.code
        assert caught.request_id, "the error names its request"
    else:
        raise AssertionError(f"{error.__name__} expected, got an answer")


def ask(**more):
    return client.completions.create(**{"model": model, "prompt": "x", "max_tokens": 2, **more})


def engine(status):
    """What the engine answers from now on; None: well."""
    body = json.dumps({"error_status": status}).encode()
    urllib.request.urlopen(urllib.request.Request(f"{engine_url}/sim/faults", body)).close()


expect(openai.NotFoundError, lambda: ask(model="nobody-serves-this"), 404, "model_not_found")
expect(openai.BadRequestError, lambda: ask(model=""), 400, "missing_model")
expect(openai.BadRequestError, lambda: ask(max_tokens=-1), 400)
expect(openai.BadRequestError, lambda: ask(stream=True, max_tokens=-1), 400)
for status, error in [
    (429, openai.RateLimitError),
    (401, openai.AuthenticationError),
    (403, openai.PermissionDeniedError),
    (422, openai.UnprocessableEntityError),
    (500, openai.InternalServerError),
]:
    engine(status)
    expect(error, ask, status)
    expect(error, lambda: ask(stream=True), status)
engine(None)
assert ask().choices[0].text

print(f"{answers} answers as expected")

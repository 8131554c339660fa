"""Asks through the official client: chat and completions, streamed and not.

Usage: sdk.py BASE_URL MODEL
"""

import sys

from openai import OpenAI

base_url, model = sys.argv[1:]
client = OpenAI(base_url=base_url, api_key="unused", max_retries=0, timeout=20)

assert model in [m.id for m in client.models.list().data], "the model is listed"

for round in range(5):
    prompt = f"prompt number {round}"
    messages = [{"role": "user", "content": prompt}]

    whole = client.chat.completions.create(model=model, messages=messages, max_tokens=24)
    text = whole.choices[0].message.content
    assert text and whole.choices[0].finish_reason == "length", whole
    assert whole.usage.completion_tokens == 24, whole.usage

    streamed, reason = "", None
    for chunk in client.chat.completions.create(model=model, messages=messages, max_tokens=24, stream=True):
        if chunk.choices:
            streamed += chunk.choices[0].delta.content or ""
            reason = chunk.choices[0].finish_reason or reason
    assert (streamed, reason) == (text, "length"), (streamed, text, reason)

    whole = client.completions.create(model=model, prompt=prompt, max_tokens=24)
    text = whole.choices[0].text
    assert text and whole.choices[0].finish_reason == "length", whole

    streamed, reason = "", None
    for chunk in client.completions.create(model=model, prompt=prompt, max_tokens=24, stream=True):
        if chunk.choices:
            streamed += chunk.choices[0].text
            reason = chunk.choices[0].finish_reason or reason
    assert (streamed, reason) == (text, "length"), (streamed, text, reason)

try:
    client.completions.create(model="nobody-serves-this", prompt="x")
except Exception as error:
    assert type(error).__name__ == "NotFoundError", repr(error)
else:
    raise AssertionError("an unknown model was answered")

print("20 answers as expected")

"""Asks through the official clients for OpenAI's Responses and Anthropic's Messages.

Usage: python -W error sdk_responses.py BASE_URL MODEL
"""

import sys

from anthropic import Anthropic, NotFoundError
from openai import OpenAI

base_url, model = sys.argv[1:]

client = OpenAI(base_url=base_url, api_key="unused", max_retries=0, timeout=20)
asked = {"model": model, "input": "why is the sea salt", "max_output_tokens": 24}
whole = client.responses.create(**asked)
assert whole.output_text and whole.status == "incomplete", whole
assert whole.usage.output_tokens == 24, whole.usage
streamed, last = "", None
for number, event in enumerate(client.responses.create(**asked, stream=True)):
    assert event.sequence_number == number, event
    if event.type == "response.output_text.delta":
        streamed += event.delta
    last = event
assert last.type == "response.completed" and streamed == whole.output_text, (last, streamed)
with client.responses.stream(**asked) as stream:
    for event in stream:
        pass
    assert stream.get_final_response().output_text == streamed

# The Anthropic client adds /v1 by itself.
client = Anthropic(base_url=base_url.removesuffix("/v1"), api_key="unused", max_retries=0, timeout=20)
asked = {"model": model, "max_tokens": 24, "messages": [{"role": "user", "content": "tell a story"}]}
whole = client.messages.create(**asked)
assert whole.content[0].text and whole.stop_reason == "max_tokens", whole
with client.messages.stream(**asked) as stream:
    text = "".join(stream.text_stream)
    final = stream.get_final_message()
assert text == whole.content[0].text == final.content[0].text, (text, whole)
assert final.usage.output_tokens == 24, final.usage
try:
    client.messages.create(**{**asked, "model": "nobody-serves-this"})
except NotFoundError as error:
    assert error.status_code == 404, error
else:
    raise AssertionError("an unknown model was answered")

print("6 answers as expected")

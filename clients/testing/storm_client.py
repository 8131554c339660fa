"""Real Python clients of a real cluster, for the tests that hurt it while they read.

Reads questions from standard input and answers them as their streams end, each a line of JSON:

    {"n": 1, "manner": "python", "base": "http://…", "path": "/v1/completions", "body": {…}}
    {"n": 1, "stream": "st_…", "edge": "r2", "worker": "e1", "events": ["{…}", …], "error": null}

`manner` is who asks: `python` is OpenAI's SDK over our transport, `python-sync` the same without
asyncio, `plain` the SDK as it is. Each manner is one client for all its streams, as a program has
it. `events` are the chunks that the SDK gave, in order. It ends with its standard input.
"""

import asyncio
import json
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "python" / "src"))
import everline  # noqa: E402

#: Streams of `python-sync` at a time: each has a thread.
THREADS = 256
#: Longest time for a stream, in seconds: more than any client's own patience.
LIMIT = 120
#: Longest question.
MAX_LINE = 1 << 20


class Clients:
    """The SDK's objects, by manner and address."""

    def __init__(self):
        self._made, self._lock = {}, threading.Lock()

    def of(self, manner, base):
        with self._lock:
            if (manner, base) not in self._made:
                make = {
                    "python": everline.async_openai_client,
                    "python-sync": everline.openai_client,
                    "plain": openai.AsyncOpenAI,
                }[manner]
                self._made[manner, base] = make(base_url=f"{base}/v1", api_key="unused")
            return self._made[manner, base]


def request_of(client, question):
    """Calls the SDK as a program would; its arguments are those of the body."""
    body = question["body"]
    resource = client.chat.completions if question["path"].endswith("/chat/completions") else client.completions
    return resource.create(**body)


def begun(heard, stream):
    headers = stream.response.headers
    for name, header in (("stream", "stream"), ("edge", "replica"), ("worker", "worker")):
        heard[name] = headers.get(f"everline-{header}")


def chunk_of(chunk):
    return json.dumps(chunk.to_dict(mode="json"), ensure_ascii=False)


def why(error):
    """An error with its causes."""
    said = []
    while error is not None and len(said) < 5:
        said.append(f"{type(error).__name__}: {error}")
        error = error.__cause__
    return ", of ".join(said)


async def read(clients, question, heard):
    stream = await request_of(clients.of(question["manner"], question["base"]), question)
    begun(heard, stream)
    async for chunk in stream:
        heard["events"].append(chunk_of(chunk))


def read_in_thread(clients, question, heard):
    stream = request_of(clients.of(question["manner"], question["base"]), question)
    begun(heard, stream)
    for chunk in stream:
        heard["events"].append(chunk_of(chunk))


async def answer(clients, threads, question):
    heard = {"n": question["n"], "stream": None, "edge": None, "worker": None, "events": [], "error": None}
    try:
        if question["manner"] == "python-sync":
            loop = asyncio.get_running_loop()
            reading = loop.run_in_executor(threads, read_in_thread, clients, question, heard)
        else:
            reading = read(clients, question, heard)
        await asyncio.wait_for(reading, LIMIT)
    except Exception as error:  # Whatever it is, it is this stream's end.
        heard["error"] = why(error)
    sys.stdout.write(json.dumps(heard, ensure_ascii=False) + "\n")
    sys.stdout.flush()


async def main():
    loop = asyncio.get_running_loop()
    lines = asyncio.StreamReader(limit=MAX_LINE)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    clients, threads, running = Clients(), ThreadPoolExecutor(THREADS), set()
    print(json.dumps({"ready": f"openai {openai.__version__}"}), flush=True)
    while line := await lines.readline():
        task = asyncio.create_task(answer(clients, threads, json.loads(line)))
        running.add(task)
        task.add_done_callback(running.discard)


if __name__ == "__main__":
    asyncio.run(main())

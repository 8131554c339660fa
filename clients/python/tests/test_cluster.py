"""Against a real cluster: connections are cut on the way, the text must be that of an uncut run.

`EVERLINE_URL` is its address, `EVERLINE_MODEL` a model whose text is the same for the same request
(the demo's is), `EVERLINE_API_KEY` a key if it wants one, `EVERLINE_STREAMS` how many streams.
Without an address it is the fake cluster.
"""

import os
import unittest

from support import MODULES, CuttingProxy, WithCluster, chat_text, everline, random_cuts

MODEL = os.environ.get("EVERLINE_MODEL", "everline-demo")
HEADERS = {"authorization": f"Bearer {os.environ.get('EVERLINE_API_KEY', 'unused')}"}
STREAMS = int(os.environ.get("EVERLINE_STREAMS", "3"))


class ClusterTest(WithCluster):
    def test_streams_cut_on_their_way_are_those_that_were_not(self):
        url = os.environ.get("EVERLINE_URL", self.cluster.url).rstrip("/")
        for module in MODULES:
            for how in ("sync", "async"):
                for number in range(STREAMS):
                    body = {"model": MODEL, "stream": True, "max_tokens": 120, "temperature": 0}
                    body["messages"] = [{"role": "user", "content": f"Tell me story number {number}"}]
                    if "EVERLINE_URL" not in os.environ:
                        body["fake"] = {"events": 120, "interval": 0.001, "dribble": 1 + number}
                    _, straight = self.fetch(module, body, how, base=url, headers=HEADERS)
                    hows = ("fin", "rst", "stall") if number % 3 == 0 else ("fin", "rst")
                    proxy = CuttingProxy(url, random_cuts(number, 6, hows))
                    self.addCleanup(proxy.close)
                    patience = {"stall_timeout": 0.3, "resume_head_timeout": 2}
                    _, cut = self.fetch(module, body, how, base=proxy.url, headers=HEADERS, **patience)
                    self.assertEqual(chat_text(cut), chat_text(straight), (module.__name__, how, number))
                    self.assertGreater(proxy.count, 0, "it was cut")

    def test_an_early_close_ends_the_generation(self):
        url = os.environ.get("EVERLINE_URL", self.cluster.url).rstrip("/")
        for module in MODULES:
            body = {"model": MODEL, "stream": True, "max_tokens": 4000, "fake": {"events": 400, "interval": 0.05}}
            if "EVERLINE_URL" in os.environ:
                del body["fake"]
            body["messages"] = [{"role": "user", "content": "Tell me a long story"}]
            with everline.http_client(module=module) as client:
                asked = client.stream("POST", f"{url}/v1/chat/completions", json=body, headers=HEADERS)
                with asked as response:
                    next(response.iter_bytes())
                    stream = response.headers["everline-stream"]
                headers = {**HEADERS, "accept": "text/event-stream", "everline-resume": "1"}
                with client.stream("GET", f"{url}/v1/streams/{stream}", headers=headers) as response:
                    # Closed by now, or about to be; the body ends long before the generation would.
                    said = b"".join(response.iter_bytes())
            self.assertIn(b"cancelled", said)


if __name__ == "__main__":
    unittest.main()

"""Plain SDKs and plain HTTP clients through ``everline shim``, which `EVERLINE_BIN` names."""

import os
import subprocess
import unittest

from support import HEADERS, MODULES, CuttingProxy, WithCluster, chat_text, datas, random_cuts
from test_sdks import FAULTS, has, pieces_of

BINARY = os.environ.get("EVERLINE_BIN")


@unittest.skipUnless(BINARY, "set EVERLINE_BIN to the everline binary")
class ShimTest(WithCluster):
    def shim(self, upstream, *arguments):
        command = [BINARY, "--exit-with-parent", "shim", "--listen", "127.0.0.1:0", "--upstream", upstream]
        process = subprocess.Popen(
            [*command, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.addCleanup(process.communicate)
        self.addCleanup(process.terminate)
        return process, process.stdout.readline().strip().rpartition(" ")[2]

    def plain(self, module, url, body, headers=HEADERS):
        with module.Client(timeout=20) as client:
            with client.stream("POST", f"{url}/v1/chat/completions", json=body, headers=headers) as response:
                return b"".join(response.iter_bytes())

    def test_plain_http(self):
        _, url = self.shim(self.cluster.url)
        for module in MODULES:
            for how in ("fin", "rst", "end"):
                for at in range(0, 700, 97):
                    self.cluster.streams.clear()
                    body = self.plain(module, url, self.chat(events=4, faults=[{"at": at, "how": how}]))
                    self.assertEqual(chat_text(body), pieces_of(self.cluster))

    def test_a_line_is_logged_for_each_resumption(self):
        process, url = self.shim(self.cluster.url)
        self.plain(MODULES[0], url, self.chat(events=9, faults=[{"at": 300, "how": "rst"}, {"at": 90, "how": "end"}]))
        process.terminate()
        _, said = process.communicate(timeout=20)
        self.assertEqual(said.count("a stream goes on"), 2, said)
        self.assertEqual(process.returncode, 0)
        # It was terminated already; there is nothing left to clean up.
        self._cleanups = [one for one in self._cleanups if one[0] not in (process.communicate, process.terminate)]

    def test_streams_cut_on_their_way(self):
        upstream = os.environ.get("EVERLINE_URL", self.cluster.url).rstrip("/")
        headers = {"authorization": f"Bearer {os.environ.get('EVERLINE_API_KEY', 'unused')}"}
        for number in range(3):
            body = {"model": os.environ.get("EVERLINE_MODEL", "everline-demo"), "stream": True, "max_tokens": 120}
            body["messages"] = [{"role": "user", "content": f"Tell me story number {number}"}]
            if "EVERLINE_URL" not in os.environ:
                body["fake"] = {"events": 120, "interval": 0.001, "dribble": 1 + number}
            proxy = CuttingProxy(upstream, random_cuts(number, 6, ("fin", "rst", "stall")))
            self.addCleanup(proxy.close)
            _, url = self.shim(proxy.url, "--stall-timeout-ms", "300")
            cut = self.plain(MODULES[0], url, body, headers)
            straight = self.plain(MODULES[0], upstream, body, headers)
            self.assertEqual(chat_text(cut), chat_text(straight))
            self.assertGreater(proxy.count, 0, "it was cut")

    @unittest.skipUnless(has("openai"), "pip install openai")
    def test_openai(self):
        import openai

        _, url = self.shim(self.cluster.url)
        extra = {"fake": {"events": 20, "faults": FAULTS, "dribble": 11}}
        with openai.OpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0) as client:
            messages = [{"role": "user", "content": "x"}]
            chunks = client.chat.completions.create(model="m", messages=messages, stream=True, extra_body=extra)
            self.assertEqual("".join(one.choices[0].delta.content or "" for one in chunks), pieces_of(self.cluster))
            self.cluster.streams.clear()
            events = client.responses.create(model="m", input="x", stream=True, extra_body=extra)
            said = "".join(one.delta for one in events if one.type == "response.output_text.delta")
            self.assertEqual(said, pieces_of(self.cluster))
            for lost in ({"status": 410, "code": "stream_lost"}, {"status": 204}):
                extra = {"fake": {"faults": [{"at": 300, "how": "fin"}, lost]}}
                with self.assertRaisesRegex(openai.APIError, "as the test wants it|without the event"):
                    list(client.chat.completions.create(model="m", messages=messages, stream=True, extra_body=extra))
                with self.assertRaisesRegex(openai.APIError, "as the test wants it|without the event"):
                    list(client.responses.create(model="m", input="x", stream=True, extra_body=extra))

    @unittest.skipUnless(has("anthropic"), "pip install anthropic")
    def test_anthropic(self):
        import anthropic

        _, url = self.shim(self.cluster.url)
        asked = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "x"}]}
        with anthropic.Anthropic(base_url=url, api_key="k", max_retries=0) as client:
            extra = {"fake": {"events": 20, "faults": FAULTS, "dribble": 11}}
            events = client.messages.create(**asked, stream=True, extra_body=extra)
            said = "".join(one.delta.text for one in events if one.type == "content_block_delta")
            self.assertEqual(said, pieces_of(self.cluster))
            extra = {"fake": {"faults": [{"at": 300, "how": "fin"}, {"status": 410, "code": "stream_lost"}]}}
            with self.assertRaisesRegex(anthropic.APIError, "as the test wants it"):
                list(client.messages.create(**asked, stream=True, extra_body=extra))

    def test_its_own_events_are_not_touched(self):
        _, url = self.shim(self.cluster.url)
        body = self.plain(MODULES[0], url, self.chat(events=5))
        (stream,) = self.cluster.streams.values()
        self.assertEqual(datas(body), [data for _, data in stream.frames])
        self.assertEqual(body, b"".join(stream.event(seq) for seq in range(len(stream.frames))))


if __name__ == "__main__":
    unittest.main()

"""Unmodified SDK code over streams that break."""

import asyncio
import importlib.util
import unittest

from support import MODULES, WithCluster, everline

FAULTS = [{"at": 350, "how": "rst"}, {"at": 20, "how": "fin"}, {"status": 503}, {"at": 600, "how": "end"}]
OPTIONS = everline.Options(backoff_min=0.001, backoff_max=0.02)


def has(name):
    return importlib.util.find_spec(name) is not None


def pieces_of(cluster):
    (stream,) = cluster.streams.values()
    return "".join(stream.pieces)


class SdkTest(WithCluster):
    extra = {"fake": {"events": 20, "faults": FAULTS, "dribble": 11}}

    def check(self, text):
        self.assertEqual(text, pieces_of(self.cluster))
        self.assertEqual([said["method"] for said in self.cluster.log], ["POST"] + ["GET"] * len(FAULTS))
        self.cluster.streams.clear()
        self.cluster.log.clear()

    @unittest.skipUnless(has("openai"), "pip install openai")
    def test_openai(self):
        messages = [{"role": "user", "content": "x"}]
        with everline.openai_client(
            options=OPTIONS, base_url=f"{self.cluster.url}/v1", api_key="k", max_retries=0
        ) as client:
            chunks = client.chat.completions.create(
                model="m", messages=messages, stream=True, extra_body=self.extra
            )
            self.check("".join(chunk.choices[0].delta.content or "" for chunk in chunks))
            chunks = client.completions.create(model="m", prompt="x", stream=True, extra_body=self.extra)
            self.check("".join(chunk.choices[0].text for chunk in chunks))
            events = client.responses.create(model="m", input="x", stream=True, extra_body=self.extra)
            self.check("".join(one.delta for one in events if one.type == "response.output_text.delta"))

    @unittest.skipUnless(has("openai"), "pip install openai")
    def test_openai_async(self):
        async def run():
            async with everline.async_openai_client(
                options=OPTIONS, base_url=f"{self.cluster.url}/v1", api_key="k", max_retries=0
            ) as client:
                chunks = await client.chat.completions.create(
                    model="m", messages=[{"role": "user", "content": "x"}], stream=True, extra_body=self.extra
                )
                self.check("".join([chunk.choices[0].delta.content or "" async for chunk in chunks]))

        asyncio.run(run())

    @unittest.skipUnless(has("openai"), "pip install openai")
    def test_openai_with_a_client_of_either_library(self):
        import openai

        for module in MODULES:
            http = module.Client(transport=everline.EverlineTransport(module=module, options=OPTIONS))
            try:
                client = openai.OpenAI(
                    http_client=http, base_url=f"{self.cluster.url}/v1", api_key="k", max_retries=0
                )
            except TypeError as refused:
                # An SDK of before httpx2 knows httpx only.
                self.assertNotEqual(module.__name__, "httpx", refused)
                continue
            with client:
                chunks = client.chat.completions.create(
                    model="m", messages=[{"role": "user", "content": "x"}], stream=True, extra_body=self.extra
                )
                self.check("".join(chunk.choices[0].delta.content or "" for chunk in chunks))

    @unittest.skipUnless(has("openai"), "pip install openai")
    def test_openai_raises_where_a_stream_is_lost(self):
        import openai

        fake = {"fake": {"faults": [{"at": 300, "how": "fin"}, {"status": 410, "code": "stream_lost"}]}}
        with everline.openai_client(
            options=OPTIONS, base_url=f"{self.cluster.url}/v1", api_key="k"
        ) as client:
            chunks = client.chat.completions.create(
                model="m", messages=[{"role": "user", "content": "x"}], stream=True, extra_body=fake
            )
            # SDKs of before 2 let httpx's own error through.
            kinds = (openai.APIConnectionError, everline.StreamError)
            with self.assertRaises(kinds) as raised:
                list(chunks)
            cause = raised.exception.__cause__ or raised.exception
            self.assertEqual(cause.code, "stream_lost")

    @unittest.skipUnless(has("openai"), "pip install openai")
    def test_leaving_an_openai_stream_cancels_it(self):
        with everline.openai_client(
            options=OPTIONS, base_url=f"{self.cluster.url}/v1", api_key="k"
        ) as client:
            fake = {"fake": {"events": 500, "interval": 0.02}}
            messages = [{"role": "user", "content": "x"}]
            with client.chat.completions.create(
                model="m", messages=messages, stream=True, extra_body=fake
            ) as chunks:
                next(iter(chunks))
        (stream,) = self.cluster.streams.values()
        self.assertTrue(stream.cancelled.is_set())

    @unittest.skipUnless(has("anthropic"), "pip install anthropic")
    def test_anthropic(self):
        asked = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "x"}]}
        with everline.anthropic_client(
            options=OPTIONS, base_url=self.cluster.url, api_key="k", max_retries=0
        ) as client:
            events = client.messages.create(**asked, stream=True, extra_body=self.extra)
            self.check("".join(one.delta.text for one in events if one.type == "content_block_delta"))
            with client.messages.stream(**asked, extra_body=self.extra) as stream:
                self.check("".join(stream.text_stream))

        async def run():
            async with everline.async_anthropic_client(
                options=OPTIONS, base_url=self.cluster.url, api_key="k", max_retries=0
            ) as client:
                events = await client.messages.create(**asked, stream=True, extra_body=self.extra)
                deltas = [one.delta.text async for one in events if one.type == "content_block_delta"]
                self.check("".join(deltas))

        asyncio.run(run())


if __name__ == "__main__":
    unittest.main()

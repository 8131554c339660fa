"""Streams that break in every way, under httpx and httpx2, sync and async."""

import asyncio
import socket
import time
import unittest

from support import HEADERS, MODULES, QUICK, WithCluster, chat_text, datas, everline

STREAMS = "/v1/streams/"


def text_of(cluster):
    """What the only stream of a cluster says."""
    (stream,) = cluster.streams.values()
    return "".join(stream.pieces)


class TransportTest(WithCluster):
    def same(self, module, how, fake, **options):
        """Fetches a stream, which must be whole, and returns what was asked."""
        self.cluster.streams.clear()
        response, body = self.fetch(module, self.chat(**fake), how, **options)
        self.assertEqual(response.status_code, 200)
        self.assertEqual(chat_text(body), text_of(self.cluster))
        return self.cluster.log

    def test_a_stream_that_is_not_cut_is_asked_for_once(self):
        for module, how in self.everywhere():
            (post,) = self.same(module, how, {"events": 30})
            self.assertEqual(post["headers"]["everline-resume"], "1")
            self.assertTrue(post["headers"]["idempotency-key"].startswith("everline-client-"))

    def test_cut_anywhere_in_any_way_the_events_are_the_same(self):
        for module, how in self.everywhere():
            for kind in ("fin", "rst", "end"):
                for at in range(0, 700, 41):
                    log = self.same(module, how, {"events": 4, "faults": [{"at": at, "how": kind}]})
                    self.assertEqual([said["method"] for said in log], ["POST", "GET"], (kind, at))
                    log.clear()

    def test_many_cuts_of_one_stream_dribbled_byte_by_byte(self):
        faults = [{"at": at, "how": how} for at in (300, 1, 333, 0, 517, 250) for how in ("rst", "end", "fin")]
        for module, how in self.everywhere():
            log = self.same(module, how, {"events": 40, "dribble": 3, "faults": faults})
            self.assertEqual(len(log), 1 + len(faults))
            # Each over a connection of its own, with the key of the first.
            self.assertEqual(len({said["peer"] for said in log}), len(log))
            self.assertTrue(all(said["headers"]["authorization"] == "Bearer k" for said in log))

    def test_a_silent_connection_is_given_up(self):
        for module, how in self.everywhere():
            began = time.monotonic()
            self.same(module, how, {"events": 9, "faults": [{"at": 400, "how": "stall"}]}, stall_timeout=0.2)
            self.assertLess(time.monotonic() - began, 3)

    def test_heartbeats_keep_a_slow_stream(self):
        for module, how in self.everywhere():
            log = self.same(module, how, {"events": 2, "interval": 0.6, "ping": 0.05}, stall_timeout=0.3)
            self.assertEqual(len(log), 1)

    def test_a_request_that_died_before_its_head_is_sent_again_with_the_same_key(self):
        for module, how in self.everywhere():
            log = self.same(module, how, {"events": 5, "faults": [{"how": "dead"}, {"status": 503}]})
            self.assertEqual([said["method"] for said in log], ["POST"] * 3)
            self.assertEqual(len({said["headers"]["idempotency-key"] for said in log}), 1)
            self.assertEqual(len(self.cluster.streams), 1)

    def test_a_head_that_does_not_come_is_waited_for_as_long_as_was_said(self):
        for module, how in self.everywhere():
            log = self.same(module, how, {"events": 5, "faults": [{"how": "mute"}]}, head_timeout=0.2)
            self.assertEqual([said["method"] for said in log], ["POST"] * 2)
            self.assertEqual(len({said["headers"]["idempotency-key"] for said in log}), 1)

    def test_a_name_that_could_lead_elsewhere_is_not_asked_for(self):
        for module, how in self.everywhere():
            self.cluster.streams.clear()
            self.cluster.log.clear()
            fault = {"at": 300, "how": "end", "name": "../models?x="}
            with self.assertRaises(everline.StreamError) as raised:
                self.fetch(module, self.chat(faults=[fault]), how)
            self.assertEqual((raised.exception.code, len(self.cluster.log)), ("not_resumable", 1))

    def test_a_key_of_the_callers_is_kept(self):
        headers = {**HEADERS, "idempotency-key": "mine"}
        for module, how in self.everywhere():
            self.cluster.streams.clear()
            self.fetch(module, self.chat(faults=[{"how": "dead"}]), how, headers=headers)
            self.assertEqual({said["headers"]["idempotency-key"] for said in self.cluster.log}, {"mine"})

    def test_answers_that_may_pass_are_waited_out(self):
        faults = [{"at": 300, "how": "rst"}, {"status": 503}, {"status": 429}, {"status": 502}, {"how": "dead"}]
        for module, how in self.everywhere():
            self.assertEqual(len(self.same(module, how, {"events": 9, "faults": faults})), 6)

    def test_a_first_answer_is_the_callers_whatever_it_is(self):
        for module, how in self.everywhere():
            for status in (401, 429, 503):
                self.cluster.streams.clear()
                self.cluster.log.clear()
                response, _ = self.fetch(module, self.chat(faults=[{"status": status}]), how)
                self.assertEqual((response.status_code, len(self.cluster.log)), (status, 1))

    def test_final_answers_are_told_at_once(self):
        for module, how in self.everywhere():
            for status in (204, 400, 401, 403, 404, 410, 412):
                self.cluster.streams.clear()
                self.cluster.log.clear()
                fault = {"status": status, "code": "stream_expired"}
                with self.assertRaises(module.RemoteProtocolError) as raised:
                    self.fetch(module, self.chat(faults=[{"at": 300, "how": "fin"}, fault]), how)
                error = raised.exception
                self.assertIsInstance(error, everline.StreamError)
                self.assertEqual(error.code, "incomplete" if status == 204 else "stream_expired")
                self.assertEqual(error.status, status)
                self.assertIn(error.stream, str(error))
                self.assertEqual(len(self.cluster.log), 2, "asked once, and not cancelled")

    def test_no_progress_within_the_budget_is_an_error(self):
        faults = [{"at": 400, "how": "rst"}] + [{"at": 0, "how": "end"}, {"how": "dead"}] * 500
        for module, how in self.everywhere():
            self.cluster.streams.clear()
            began = time.monotonic()
            with self.assertRaises(module.RemoteProtocolError) as raised:
                self.fetch(module, self.chat(events=9, faults=faults), how, retry_budget=0.4)
            self.assertLess(time.monotonic() - began, 3)
            self.assertEqual(raised.exception.code, "unreachable")
            self.assertGreater(len(self.cluster.log), 8)

    def test_a_missing_event_is_never_passed_over_and_a_repeated_one_never_passed_on(self):
        for module, how in self.everywhere():
            cut = {"at": 400, "how": "rst"}
            self.same(module, how, {"events": 9, "faults": [cut, {"skip": 1}, {"again": 1}]})
            self.cluster.streams.clear()
            with self.assertRaises(everline.StreamError) as raised:
                faults = [cut] + [{"skip": 1}] * 500
                self.fetch(module, self.chat(events=9, faults=faults), how, retry_budget=0.2)
            self.assertIn("was expected", str(raised.exception))

    def test_other_routes_end_with_their_own_events(self):
        for module, how in self.everywhere():
            for path in ("/v1/responses", "/v1/messages", "/v1/completions"):
                self.cluster.streams.clear()
                faults = [{"at": at, "how": "end"} for at in (200, 700, 900)]
                _, body = self.fetch(module, self.chat(events=9, faults=faults), how, path=path)
                (stream,) = self.cluster.streams.values()
                self.assertEqual(datas(body), [data for _, data in stream.frames])

    def test_an_early_close_cancels_the_generation(self):
        options = everline.Options(**QUICK)
        for module, how in self.everywhere():
            self.cluster.streams.clear()
            url, body = f"{self.cluster.url}/v1/chat/completions", self.chat(events=500, interval=0.02)
            if how == "sync":
                with everline.http_client(module=module, options=options) as client:
                    with client.stream("POST", url, json=body, headers=HEADERS) as response:
                        next(response.iter_bytes())
            else:

                async def run():
                    async with everline.async_http_client(module=module, options=options) as client:
                        async with client.stream("POST", url, json=body, headers=HEADERS) as response:
                            async for _ in response.aiter_bytes():
                                break

                asyncio.run(run())
            (stream,) = self.cluster.streams.values()
            self.assertTrue(stream.cancelled.is_set())
            (cancel,) = self.asked("/cancel")
            self.assertEqual(cancel["headers"]["authorization"], "Bearer k")

    def test_a_cancelled_task_cancels_the_generation(self):
        for module in MODULES:
            self.cluster.streams.clear()

            async def run(module=module):
                async with everline.async_http_client(module=module) as client:
                    url, body = f"{self.cluster.url}/v1/chat/completions", self.chat(events=9, interval=9)
                    first = asyncio.Event()

                    async def read():
                        async with client.stream("POST", url, json=body, headers=HEADERS) as response:
                            async for _ in response.aiter_bytes():
                                first.set()

                    task = asyncio.create_task(read())
                    await first.wait()
                    task.cancel()
                    with self.assertRaises(asyncio.CancelledError):
                        await task

            asyncio.run(run())
            (stream,) = self.cluster.streams.values()
            self.assertTrue(stream.cancelled.is_set())

    def test_a_whole_answer_passes_untouched(self):
        for module, how in self.everywhere():
            response, body = self.fetch(module, {"model": "m", "fake": {"events": 3}}, how)
            self.assertIn(b"pieces", body)
            (post,) = self.cluster.log
            self.assertNotIn("idempotency-key", post["headers"])
            self.assertNotIn("everline-resume", post["headers"])

    def test_a_client_that_resumes_by_itself_is_left_alone(self):
        headers = {**HEADERS, "everline-resume": "1"}
        for module, how in self.everywhere():
            self.cluster.streams.clear()
            fake = self.chat(events=9, faults=[{"at": 300, "how": "end"}])
            self.fetch(module, fake, how, headers=headers)
            self.assertEqual(len(self.cluster.log), 1)

    def test_an_address_nobody_listens_at_is_tried_again_and_then_an_error(self):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            nobody = f"http://127.0.0.1:{taken.getsockname()[1]}"
        for module, how in self.everywhere():
            for body in (self.chat(), {"model": "m"}):
                began = time.monotonic()
                with self.assertRaises(module.ConnectError):
                    self.fetch(module, body, how, base=nobody, connect_budget=0.2)
                self.assertGreater(time.monotonic() - began, 0.15)

    def test_further_addresses_are_tried_in_turn(self):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            nobody = f"http://127.0.0.1:{taken.getsockname()[1]}"
        for module, how in self.everywhere():
            urls = [self.cluster.url, nobody]
            faults = [{"at": 300, "how": "rst"}, {"at": 300, "how": "fin"}]
            log = self.same(module, how, {"events": 9, "faults": faults}, base=nobody, base_urls=urls)
            self.assertEqual([said["method"] for said in log], ["POST", "GET", "GET"])

    def test_addresses_that_are_none_are_refused(self):
        for wrong in ("r2.example:8080", "ftp://x", "http://x/v1"):
            with self.assertRaisesRegex(ValueError, "base_urls"):
                everline.Options(base_urls=[wrong])

    def test_another_servers_stream_is_not_touched(self):
        import threading

        with socket.create_server(("127.0.0.1", 0)) as listener:

            def serve():
                while True:
                    try:
                        peer, _ = listener.accept()
                    except OSError:
                        return
                    peer.recv(65536)
                    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: 9\r\n\r\n"
                    peer.sendall(head + b"data: x\n\n")
                    peer.close()

            threading.Thread(target=serve, daemon=True).start()
            for module, how in self.everywhere():
                base = f"http://127.0.0.1:{listener.getsockname()[1]}"
                _, body = self.fetch(module, self.chat(), how, base=base)
                self.assertEqual(body, b"data: x\n\n")


if __name__ == "__main__":
    unittest.main()

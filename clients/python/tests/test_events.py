"""From bytes to whole events, cut everywhere."""

import unittest

import support  # noqa: F401 - finds the package
from everline._events import MAX_EVENT_BYTES, Events

NAME = "st_abcdefghijklmnopqrstuvwxyz"


def event(seq, data, name=None, extra=b""):
    named = b"event: " + name + b"\n" if name else b""
    # What the second attempt says has that in its id.
    number = b"%d" % seq if seq < 2 else b"%d.2" % seq
    lines, last = named + b"data: " + data + b"\n" + extra, b"id: %s.%s\n" % (NAME.encode(), number)
    # The cluster writes the id last; to a reader it is the same wherever it stands.
    return (last + lines if seq == 1 else lines + last) + b"\n"


EVENTS = [
    event(0, b'{"a":1}', extra=b"retry: 500\n"),
    event(1, '{"ü":"🦀"}'.encode()),
    event(2, b"x\ndata: y"),
    event(3, b"[DONE]"),
]
#: What a server may send for them: heartbeats and notes between events.
SENT = [EVENTS[0], b": ping\n", EVENTS[1], b": everline attempt=2\n", EVENTS[2], EVENTS[3]]


def after(last_event_id):
    """What a server sends to whoever has this event."""
    seq = -1 if last_event_id is None else int(last_event_id.split(".")[1])
    return b"".join(EVENTS[seq + 1 :])


class EventsTest(unittest.TestCase):
    def test_whatever_is_cut_once_or_twice_the_events_are_the_same(self):
        whole = b"".join(SENT)
        for first in range(len(whole) + 1):
            for second in range(0, len(whole), 7):
                events = Events("chat/completions")
                out = events.feed(whole[:first])
                events.reconnected()
                out += events.feed(after(events.last_event_id)[:second])
                events.reconnected()
                out += events.feed(after(events.last_event_id))
                kept = out.replace(b": ping\n", b"").replace(b": everline attempt=2\n", b"")
                self.assertEqual(kept, b"".join(EVENTS), (first, second))
                self.assertTrue(events.ended)
                self.assertIsNone(events.fault)

    def test_single_bytes_and_all_at_once_give_the_same(self):
        whole = b"".join(SENT)
        for size in (1, 2, 3, 50, len(whole)):
            events = Events("chat/completions")
            pieces = [events.feed(whole[at : at + size]) for at in range(0, len(whole), size)]
            self.assertEqual(b"".join(pieces), whole)
            # Nothing is handed on that is not whole lines.
            self.assertTrue(all(not piece or piece.endswith(b"\n") for piece in pieces))

    def test_carriage_returns_end_lines_too(self):
        whole = b"".join(EVENTS).replace(b"\n", b"\r\n")
        for cut in range(len(whole)):
            events = Events("chat/completions")
            out = events.feed(whole[:cut]) + events.feed(whole[cut:])
            self.assertEqual(out, whole)
            self.assertEqual((events.ended, events.last_event_id), (True, f"{NAME}.3.2"))

    def test_an_error_in_place_of_a_stream_is_handed_on_and_ends_it(self):
        # What comes when the head was given early: one event with a number, and the route's own end.
        error = b'data: {"error":{"code":"workers_saturated"}}\nretry: 500\nid: %s.0\n\n' % NAME.encode()
        for route, whole in [
            ("chat/completions", error + b"data: [DONE]\n\n"),
            ("messages", b"event: error\n" + error),
            ("responses", b"event: error\n" + error),
        ]:
            for cut in range(len(whole)):
                events = Events(route)
                out = events.feed(b": ping\n" + whole[:cut]) + events.feed(whole[cut:])
                self.assertEqual(out, b": ping\n" + whole)
                self.assertEqual((events.ended, events.fault, events.count > 0), (True, None, True), route)

    def test_a_heartbeat_is_handed_on_at_once(self):
        events = Events("chat/completions")
        self.assertEqual(events.feed(b": ping\n"), b": ping\n")
        self.assertEqual(events.count, 0)

    def test_events_that_were_had_are_dropped_and_a_missing_one_is_a_fault(self):
        events = Events("chat/completions")
        events.feed(EVENTS[0] + EVENTS[1])
        events.reconnected()
        self.assertEqual(events.feed(EVENTS[0] + EVENTS[1] + EVENTS[2]), EVENTS[2])
        events = Events("chat/completions")
        self.assertEqual(events.feed(EVENTS[0] + EVENTS[2] + EVENTS[1]), EVENTS[0])
        self.assertIn("event 2 came where 1 was expected", events.fault)
        self.assertEqual(events.feed(EVENTS[1]), b"")
        events.reconnected()
        self.assertEqual(events.feed(EVENTS[1]), EVENTS[1])

    def test_an_event_of_another_stream_is_a_fault(self):
        for strange in (b"id: st_other.1\ndata: x\n\n", b"id: 7\ndata: x\n\n", b"id: a.b\ndata: x\n\n"):
            events = Events("chat/completions")
            self.assertEqual(events.feed(EVENTS[0] + strange), EVENTS[0])
            self.assertIsNotNone(events.fault)

    def test_what_closes_a_stream_depends_on_the_route(self):
        for route, data, name, closes in (
            ("chat/completions", b"[DONE]", None, True),
            ("chat/completions", b'{"error":{"code":"stream_lost"}}', None, False),
            ("completions", b'"[DONE]"', None, False),
            ("responses", b"{}", b"response.completed", True),
            ("responses", b"{}", b"response.failed", True),
            ("responses", b'{"type":"response.incomplete"}', None, True),
            ("responses", b'{"type":"response.output_text.delta","delta":"response.completed"}', None, False),
            ("responses", b"{}", b"response.output_text.done", False),
            ("messages", b"{}", b"message_stop", True),
            ("messages", b"{}", b"message_delta", False),
            ("messages", b"[DONE]", None, True),
        ):
            events = Events(route)
            events.feed(event(0, data, name))
            self.assertEqual(events.ended, closes, (route, data, name))

    def test_an_event_without_a_number_is_passed_and_remembered(self):
        events = Events("chat/completions")
        self.assertEqual(events.feed(b"data: x\n\n"), b"data: x\n\n")
        self.assertTrue(events.unnumbered)

    def test_what_is_held_back_is_bounded(self):
        events = Events("chat/completions")
        events.feed(b"data: " + b"x" * MAX_EVENT_BYTES)
        self.assertIn("larger than", events.fault)


if __name__ == "__main__":
    unittest.main()

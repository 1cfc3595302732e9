#!/usr/bin/env python3
"""Chats with paho-mqtt: 1:1 both ways, read marks, a group, offline and back, two devices, MQTT 3.1.1. Exits 1 on a violation.

With --resume 5 or 3.1.1 one person writes to another until a line comes on standard input; meanwhile gateways may die.

The server must run with insecure authentication (the HTTP calls act as `insecure:USER`).
"""

import argparse
import json
import queue
import secrets
import sys
import threading
import urllib.request

import paho.mqtt.client as mqtt
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

PATIENCE_SECONDS = 15
RESUME_PATIENCE_SECONDS = 30


class Violation(Exception):
    """The system did not do what it promises."""


def expect(condition, text):
    if not condition:
        raise Violation(text)


class Device:
    """One device of one person; messages that come in wait in `inbox`, read marks in `marks`."""

    def __init__(self, args, user, device, version=mqtt.MQTTv5):
        self.user, self.version = user, version
        self.inbox, self.acks, self.subacks = queue.Queue(), queue.Queue(), queue.Queue()
        self.connacks, self.ends, self.marks = queue.Queue(), queue.Queue(), queue.Queue()
        clean = {} if version == mqtt.MQTTv5 else {"clean_session": False}
        self.client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, client_id=device, protocol=version, **clean)
        self.client.username_pw_set(user, "any")
        self.client.on_connect = lambda _c, _u, flags, code, _p: self.connacks.put((flags.session_present, code))
        self.client.on_disconnect = lambda *_: self.ends.put(None)
        self.client.reconnect_delay_set(1, 2)
        self.client.on_message = lambda _c, _u, message: self.sort(message)
        self.client.on_publish = lambda _c, _u, _mid, code, props: self.acks.put((code, props))
        self.client.on_subscribe = lambda _c, _u, _mid, codes, _p: self.subacks.put(codes)
        self.args = args

    def connect(self, session_present):
        extra = {}
        if self.version == mqtt.MQTTv5:
            properties = Properties(PacketTypes.CONNECT)
            properties.SessionExpiryInterval = 3600
            extra = {"clean_start": False, "properties": properties}
        self.client.connect(self.args.host, self.args.port, keepalive=30, **extra)
        self.client.loop_start()
        present, code = self.connacks.get(timeout=PATIENCE_SECONDS)
        expect(not code.is_failure, f"{self.user} can't log in: {code}")
        expect(present == session_present, f"{self.user}: Session Present is {present}")
        if not session_present:
            self.client.subscribe("inbox/#", qos=1)
            codes = self.subacks.get(timeout=PATIENCE_SECONDS)
            expect(codes[0].value == 1, f"SUBSCRIBE inbox/# was granted {codes}")
        return self

    def sort(self, message):
        (self.marks if message.topic.startswith("inbox/read/") else self.inbox).put(message)

    def disconnect(self):
        self.client.disconnect()
        self.ends.get(timeout=PATIENCE_SECONDS)
        self.client.loop_stop()

    def send(self, topic, text):
        """Publishes with QoS 1, waits for the PUBACK and gives its seq (None in 3.1.1)."""
        properties = None
        if self.version == mqtt.MQTTv5:
            properties = Properties(PacketTypes.PUBLISH)
            properties.UserProperty = ("id", secrets.token_hex(8))
        self.client.publish(topic, text, qos=1, properties=properties)
        code, answer = self.acks.get(timeout=RESUME_PATIENCE_SECONDS)
        expect(not code.is_failure, f"{topic} was refused: {code}")
        if self.version != mqtt.MQTTv5:
            return None
        found = dict(getattr(answer, "UserProperty", []))
        expect("seq" in found and ("ts" in found or topic.startswith("read/")), f"the PUBACK has no seq or ts: {found}")
        return int(found["seq"])

    def hear_read(self, topic, seq):
        """Waits until somebody has read a conversation up to `seq`; marks before that are of no more interest."""
        found = None
        while found != (topic, str(seq)):
            try:
                message = self.marks.get(timeout=PATIENCE_SECONDS)
            except queue.Empty:
                raise Violation(f"{self.user} was not told {seq} on {topic}, last of all {found}") from None
            found = (message.topic, message.payload.decode())

    def receive(self, topic, text):
        """Waits for the next chat message, which must be this one, and gives its seq."""
        try:
            message = self.inbox.get(timeout=PATIENCE_SECONDS)
        except queue.Empty:
            raise Violation(f"{self.user} did not get {text!r} on {topic}") from None
        found, seq = message.topic, None
        if self.version == mqtt.MQTTv5:
            seq = dict(getattr(message.properties, "UserProperty", [])).get("seq")
        else:
            found, _, seq = found.rpartition("/")
        got = (found, message.payload.decode())
        if isinstance(text, dict):
            got = (found, json.loads(got[1]))
        expect(got == (topic, text), f"{self.user} got {got} instead of {(topic, text)}")
        expect(seq is not None, f"{topic} came without seq")
        return int(seq)

    def expect_nothing_unread(self):
        expect(self.inbox.empty(), f"{self.user} got more than was sent: {self.inbox.queue and self.inbox.queue[0].topic}")


def http(args, method, path, user, body=None):
    data = None if body is None else json.dumps(body).encode()
    headers = {"Authorization": f"Bearer insecure:{user}", "Content-Type": "application/json"}
    request = urllib.request.Request(f"http://{args.host}:{args.http_port}{path}", data, headers, method=method)
    with urllib.request.urlopen(request, timeout=PATIENCE_SECONDS) as answer:
        return answer.status


def chat(args, version):
    tag = secrets.token_hex(3)
    alice, bob, group = f"alice.{tag}", f"bob.{tag}", f"team.{tag}"
    phone = Device(args, alice, "phone", version).connect(False)
    laptop = Device(args, alice, "laptop", version).connect(False)
    bobs = Device(args, bob, "phone", version).connect(False)

    print("1:1 both ways, the other device sees both")
    expect(phone.send(f"u/{bob}", "hello") in (1, None), "the first message is not number 1")
    expect(bobs.receive(f"inbox/u/{alice}/{alice}", "hello") == 1, "wrong seq")
    expect(laptop.receive(f"inbox/u/{bob}/{alice}", "hello") == 1, "wrong seq on the other device")
    expect(bobs.send(f"u/{alice}", "hi") in (2, None), "the second message is not number 2")
    for device in (phone, laptop):
        expect(device.receive(f"inbox/u/{bob}/{bob}", "hi") == 2, "wrong seq")

    print("offline, and all that was missed in order")
    bobs.disconnect()
    for number in range(3, 103):
        phone.send(f"u/{bob}", f"missed {number}")
    bobs.connect(True)
    for number in range(3, 103):
        expect(bobs.receive(f"inbox/u/{alice}/{alice}", f"missed {number}") == number, "wrong seq")
        expect(laptop.receive(f"inbox/u/{bob}/{alice}", f"missed {number}") == number, "wrong seq")

    print("read marks: both devices of the peer hear of them; they only grow, and not beyond the head")
    for asked, marked, is_new in ((50, 50, True), (10, 50, False), (1000, 102, True)):
        expect(bobs.send(f"read/u/{alice}", str(asked)) in (marked, None), f"read up to {asked} is not {marked}")
        for device in (phone, laptop) if is_new else ():
            device.hear_read(f"inbox/read/u/{bob}", marked)

    print("a group: joins and leaves are messages, read marks are for one's other devices")
    http(args, "PUT", f"/v1/groups/{group}", alice, {"members": [alice, bob]})
    created = {"event": "created", "users": [alice, bob], "by": alice}
    for device in (phone, laptop, bobs):
        expect(device.receive(f"inbox/g/{group}/$system", created) == 1, "creating is not number 1")
    expect(phone.send(f"g/{group}", "to all") in (2, None), "the first message is not number 2")
    for device in (bobs, laptop):
        expect(device.receive(f"inbox/g/{group}/{alice}", "to all") == 2, "wrong seq in the group")
    expect(bobs.send(f"g/{group}", "from bob") in (3, None), "the second message is not number 3")
    for device in (phone, laptop):
        expect(device.receive(f"inbox/g/{group}/{bob}", "from bob") == 3, "wrong seq in the group")
    expect(phone.send(f"read/g/{group}", "3") in (3, None), "read up to 3 is something else")
    laptop.hear_read(f"inbox/read/g/{group}", 3)
    http(args, "DELETE", f"/v1/groups/{group}/members/{bob}", alice)
    left = {"event": "left", "users": [bob], "by": alice}
    for device in (phone, laptop, bobs):
        expect(device.receive(f"inbox/g/{group}/$system", left) == 4, "leaving is not number 4")
    phone.send(f"g/{group}", "without bob")
    expect(laptop.receive(f"inbox/g/{group}/{alice}", "without bob") == 5, "wrong seq in the group")
    for device in (phone, laptop, bobs):
        device.expect_nothing_unread()
        device.disconnect()


def resume(args, version):
    """Alice writes to Bob while their gateways die under them: both come back by themselves, and Bob has all of it."""
    tag = secrets.token_hex(3)
    alice, bob = f"alice.{tag}", f"bob.{tag}"
    bobs = Device(args, bob, "phone", version).connect(False)
    phone = Device(args, alice, "phone", version).connect(False)
    go_on = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.readline(), go_on.set()), daemon=True).start()
    print(f"ready {alice} {bob}", flush=True)
    sent = 0
    # Each is acknowledged before the next: what paho itself does to the order of its resends is not what is tested.
    while not go_on.wait(0.02):
        sent += 1
        phone.send(f"u/{bob}", f"number {sent}")
        print(f"sent {sent}", flush=True)
    text_by_seq, last = {}, None
    while last != f"number {sent}":
        try:
            message = bobs.inbox.get(timeout=RESUME_PATIENCE_SECONDS)
        except queue.Empty:
            raise Violation(f"{bob} has {last!r} as the last of {sent}") from None
        if version == mqtt.MQTTv5:
            seq = int(dict(message.properties.UserProperty)["seq"])
        else:
            seq = int(message.topic.rpartition("/")[2])
        last = message.payload.decode()
        expect(text_by_seq.setdefault(seq, last) == last, f"seq {seq} came with two texts")
        expect(seq == 1 or seq - 1 in text_by_seq, f"seq {seq} came before {seq - 1}")
    texts = [text_by_seq[seq] for seq in sorted(text_by_seq)]
    # MQTT 3.1.1 has no message id: what was sent again over another gateway may be stored twice, but not elsewhere.
    stored_once = [text for before, text in zip([None, *texts], texts) if text != before]
    expect(stored_once == [f"number {number}" for number in range(1, sent + 1)], f"not in order: {texts}")
    expect(version != mqtt.MQTTv5 or stored_once == texts, "a message with an id was stored twice")
    for device in (phone, bobs):
        expect(not device.ends.empty(), f"{device.user} was never cut off: nothing was tested")
        while not device.connacks.empty():
            present, code = device.connacks.get()
            expect(present and not code.is_failure, f"{device.user} came back without its session: {code}")
        device.client.disconnect()
        device.client.loop_stop()
    print(f"resumed after {sent} messages")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=1883)
    parser.add_argument("--http-port", type=int, default=8080)
    parser.add_argument("--resume", choices=("5", "3.1.1"))
    args = parser.parse_args()
    try:
        if args.resume:
            resume(args, mqtt.MQTTv5 if args.resume == "5" else mqtt.MQTTv311)
            print("good")
            return 0
        for name, version in (("MQTT 5", mqtt.MQTTv5), ("MQTT 3.1.1", mqtt.MQTTv311)):
            print(f"-- {name}")
            chat(args, version)
    except (Violation, queue.Empty, OSError) as error:
        print(f"VIOLATION: {error!r}", file=sys.stderr)
        return 1
    print("good")
    return 0


if __name__ == "__main__":
    sys.exit(main())

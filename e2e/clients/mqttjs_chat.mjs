// Chats with the npm package mqtt, over TCP or WebSocket as the URL says: 1:1 both ways, a group, offline and back, two
// devices. Exits 1 on a violation. Usage: node mqttjs_chat.mjs mqtt://127.0.0.1:1883 http://127.0.0.1:8080 [4|5] [resume]
// With `resume` one person writes to another until a line comes on standard input; meanwhile gateways may die.
// The server must run with insecure authentication.
import { randomBytes } from "node:crypto";
import mqtt from "mqtt";

const [url, http, level = "5", mode = "chat"] = process.argv.slice(2);
if (!http) {
  console.error("usage: mqttjs_chat.mjs MQTT_OR_WS_URL HTTP_URL [4|5] [resume]");
  process.exit(2);
}
const protocolVersion = Number(level);
const patienceMillis = 15_000;
const tag = randomBytes(3).toString("hex");
const [alice, bob, group] = [`alice.${tag}`, `bob.${tag}`, `team.${tag}`];

function expect(condition, text) {
  if (!condition) throw new Error(text);
}

function within(promise, what) {
  let timer;
  const late = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new Error(`too late: ${what}`)), patienceMillis);
  });
  return Promise.race([promise, late]).finally(() => clearTimeout(timer));
}

class Device {
  constructor(user, device) {
    Object.assign(this, { user, device, queue: [], waiting: null, comebacks: [] });
  }

  async connect(sessionPresent, reconnectPeriod = 0) {
    const v5 = protocolVersion === 5 ? { properties: { sessionExpiryInterval: 3600 } } : {};
    this.client = mqtt.connect(url, {
      protocolVersion, clientId: this.device, username: this.user, password: "any", clean: false,
      reconnectPeriod, keepalive: 30, resubscribe: false, ...v5,
    });
    this.client.on("message", (topic, payload, packet) => {
      this.queue.push({ topic, text: payload.toString(), properties: packet.properties?.userProperties ?? {} });
      this.waiting?.();
    });
    const connack = await within(new Promise((resolve, reject) => {
      this.client.once("connect", resolve);
      this.client.once("error", reject);
      this.client.once("close", () => reject(new Error("the connection was closed")));
    }), `${this.user} logs in`);
    expect(Boolean(connack.sessionPresent) === sessionPresent, `Session Present is ${connack.sessionPresent}`);
    this.client.on("connect", (again) => this.comebacks.push(Boolean(again.sessionPresent)));
    this.client.on("error", () => {});
    if (!sessionPresent) {
      const granted = await within(this.client.subscribeAsync("inbox/#", { qos: 1 }), "SUBACK");
      expect(granted[0].qos === 1, `SUBSCRIBE inbox/# was granted ${granted[0].qos}`);
    }
    return this;
  }

  disconnect() {
    return within(this.client.endAsync(), "good-bye");
  }

  async send(topic, text) {
    const properties = protocolVersion === 5 ? { userProperties: { id: randomBytes(8).toString("hex") } } : undefined;
    const packet = await within(new Promise((resolve, reject) => {
      this.client.publish(topic, text, { qos: 1, properties }, (error, sent) => (error ? reject(error) : resolve(sent)));
    }), `PUBACK for ${topic}`);
    if (packet?.cmd === "puback" && protocolVersion === 5) {
      expect(packet.properties?.userProperties?.seq, "the PUBACK has no seq");
    }
  }

  async receive(topic, text) {
    for (;;) {
      if (this.queue.length === 0) {
        await within(new Promise((resolve) => { this.waiting = resolve; }), `${this.user} gets ${text} on ${topic}`);
        this.waiting = null;
        continue;
      }
      const message = this.queue.shift();
      // Read marks and joins come in between and are no chat messages.
      if (message.topic.startsWith("inbox/read/") || message.topic.includes("/$system")) continue;
      let [found, seq] = [message.topic, message.properties.seq];
      if (protocolVersion !== 5) {
        const cut = found.lastIndexOf("/");
        [found, seq] = [found.slice(0, cut), found.slice(cut + 1)];
      }
      expect(found === topic && message.text === text, `${this.user} got ${message.topic} ${message.text}, not ${topic} ${text}`);
      expect(/^[0-9]+$/.test(seq ?? ""), `${topic} came without seq`);
      return Number(seq);
    }
  }
}

async function chat() {
  const phone = await new Device(alice, "phone").connect(false);
  const laptop = await new Device(alice, "laptop").connect(false);
  const bobs = await new Device(bob, "phone").connect(false);

  console.log("1:1 both ways, the other device sees both");
  await phone.send(`u/${bob}`, "hello");
  expect(await bobs.receive(`inbox/u/${alice}/${alice}`, "hello") === 1, "the first message is not number 1");
  expect(await laptop.receive(`inbox/u/${bob}/${alice}`, "hello") === 1, "wrong seq on the other device");
  await bobs.send(`u/${alice}`, "hi");
  for (const device of [phone, laptop]) {
    expect(await device.receive(`inbox/u/${bob}/${bob}`, "hi") === 2, "wrong seq");
  }

  console.log("offline, and all that was missed in order");
  await bobs.disconnect();
  for (let number = 3; number < 53; number++) await phone.send(`u/${bob}`, `missed ${number}`);
  await bobs.connect(true);
  for (let number = 3; number < 53; number++) {
    expect(await bobs.receive(`inbox/u/${alice}/${alice}`, `missed ${number}`) === number, "wrong seq");
    expect(await laptop.receive(`inbox/u/${bob}/${alice}`, `missed ${number}`) === number, "wrong seq");
  }

  console.log("a group");
  const answer = await fetch(`${http}/v1/groups/${group}`, {
    method: "PUT",
    headers: { authorization: `Bearer insecure:${alice}`, "content-type": "application/json" },
    body: JSON.stringify({ members: [alice, bob] }),
  });
  expect(answer.ok, `PUT group: HTTP ${answer.status} ${await answer.text()}`);
  await phone.send(`g/${group}`, "to all");
  const first = await bobs.receive(`inbox/g/${group}/${alice}`, "to all");
  expect(await laptop.receive(`inbox/g/${group}/${alice}`, "to all") === first, "two numbers for one message");
  for (const device of [phone, laptop, bobs]) await device.disconnect();
}

async function resume() {
  const bobs = await new Device(bob, "phone").connect(false, 300);
  const phone = await new Device(alice, "phone").connect(false, 300);
  let goOn = false;
  process.stdin.once("data", () => { goOn = true; });
  console.log(`ready ${alice} ${bob}`);
  let sent = 0;
  while (!goOn) {
    await phone.send(`u/${bob}`, `number ${++sent}`);
    console.log(`sent ${sent}`);
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
  const texts = new Map();
  while (texts.get(texts.size) !== `number ${sent}`) {
    if (bobs.queue.length === 0) {
      await within(new Promise((resolve) => { bobs.waiting = resolve; }), `${bob} has ${texts.size} of ${sent}`);
      continue;
    }
    const { topic, text, properties } = bobs.queue.shift();
    if (topic.startsWith("inbox/read/")) continue;
    const seq = Number(protocolVersion === 5 ? properties.seq : topic.slice(topic.lastIndexOf("/") + 1));
    expect((texts.get(seq) ?? text) === text, `seq ${seq} came with two texts`);
    expect(seq === 1 || texts.has(seq - 1), `seq ${seq} came before ${seq - 1}`);
    texts.set(seq, text);
  }
  // MQTT 3.1.1 has no message id: what was sent again over another gateway may be stored twice, but not elsewhere.
  const stored = [...texts.values()].filter((text, index, all) => protocolVersion === 5 || text !== all[index - 1]);
  stored.forEach((text, index) => expect(text === `number ${index + 1}`, `${text} is at place ${index + 1}`));
  expect(stored.length === sent, `${stored.length} of ${sent} were stored`);
  for (const device of [phone, bobs]) {
    expect(device.comebacks.length > 0, `${device.user} was never cut off: nothing was tested`);
    expect(device.comebacks.every(Boolean), `${device.user} came back without its session`);
    await device.disconnect();
  }
  console.log(`resumed after ${sent} messages`);
}

try {
  await (mode === "resume" ? resume() : chat());
  console.log("good");
  process.exit(0);
} catch (error) {
  console.error(`VIOLATION: ${error.message}`);
  process.exit(1);
}

#!/usr/bin/env bash
# An evening on this machine: `imcluster up FILE`, and the load generator as its people. Ends by itself, or with Ctrl-C.
set -euo pipefail
cd "$(dirname "$0")/.."
file="${1:-examples/chat.yaml}"
data="${2:-.run/chat}"
seconds="${SECONDS_OF_EVENING:-150}"
people="${PEOPLE:-300}"
peak="${PEAK:-800}"
programs="${CARGO_TARGET_DIR:-target}/debug"
console=127.0.0.1:8090

mkdir -p "$data"
"$programs/imcluster" up "$file" --data-dir "$data" --console "$console" >"$data/up.log" 2>&1 &
supervisor=$!
stop() {
    kill -INT "$supervisor" 2>/dev/null || true
    wait "$supervisor" 2>/dev/null || true
}
trap stop EXIT

for _ in $(seq 150); do
    curl -sf -o /dev/null http://127.0.0.1:8080/readyz && break
    kill -0 "$supervisor" 2>/dev/null || { cat "$data/up.log" >&2; exit 1; }
    sleep 0.2
done
curl -sf -o /dev/null http://127.0.0.1:8080/readyz || { cat "$data/up.log" >&2; exit 1; }

cat <<TEXT
The cluster runs. Its page: http://$console/   Its status: $programs/imcluster status --data-dir $data
Chat as two people, each line in a terminal of its own:
  mosquitto_sub -V mqttv5 -p 1883 -u bob -i bob-phone -c -x 3600 -q 1 -t 'inbox/#' -F '%t: %p  %P'
  mosquitto_sub -V mqttv5 -p 1883 -u alice -i alice-phone -c -x 3600 -q 1 -t 'inbox/#' -F '%t: %p  %P'
  mosquitto_pub -V mqttv5 -p 1883 -u alice -i alice-laptop -q 1 -t u/bob -m 'hello, bob'

An evening of $seconds s with $people people and up to $peak messages/s begins.
TEXT
"$programs/imload" evening --mqtt 127.0.0.1:1883 --http 127.0.0.1:8080 --people "$people" --peak "$peak" --duration "$seconds" \
    --data-dir "$data" --status-url "http://$console/status"
if [ -t 0 ] && [ -t 1 ]; then
    echo "The evening is over. The cluster goes on: chat with the lines above; Ctrl-C ends it."
    wait "$supervisor"
fi

#!/bin/sh
# Installs the clients that nobody here wrote under target/clients: a virtual environment with paho-mqtt and node modules
# with mqtt. Does nothing when both are there.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
into="${CARGO_TARGET_DIR:-$here/../../target}/clients"
mkdir -p "$into"
into=$(cd "$into" && pwd)
if ! cmp -s "$here/requirements.txt" "$into/requirements.txt"; then
    python3 -m venv "$into/venv"
    "$into/venv/bin/pip" install --quiet --disable-pip-version-check -r "$here/requirements.txt"
    cp "$here/requirements.txt" "$into/requirements.txt"
fi
if ! cmp -s "$here/package-lock.json" "$into/installed-lock.json"; then
    cp "$here/package.json" "$here/package-lock.json" "$into/"
    (cd "$into" && npm ci --silent --no-audit --no-fund)
    cp "$here/package-lock.json" "$into/installed-lock.json"
fi
# The module is found from where the script lies, so that lies there, too.
cp "$here/mqttjs_chat.mjs" "$into/mqttjs_chat.mjs"
echo "$into"

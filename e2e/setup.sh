#!/usr/bin/env bash
# Installs what the tests, demos and benchmarks need and is missing. Runs in a second when nothing is.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"

packages=()
need() { command -v "$1" >/dev/null 2>&1 || packages+=("$2"); }
need cc build-essential
need mosquitto mosquitto
need mosquitto_pub mosquitto-clients
need python3 python3
need curl curl
need pkill procps
# Debian has virtual environments in a package of their own.
python3 -c "import ensurepip" 2>/dev/null || packages+=(python3-venv)
need npm npm
need prometheus prometheus
[ -x /usr/lib/postgresql/15/bin/postgres ] || compgen -G '/usr/lib/postgresql/*/bin/postgres' >/dev/null || packages+=(postgresql)
if [ ${#packages[@]} -gt 0 ]; then
    if ! command -v apt-get >/dev/null || [ "$(id -u)" != 0 ]; then
        echo "missing: ${packages[*]}. Install them with your package manager (as root: apt-get install ${packages[*]}) and run this again." >&2
        exit 1
    fi
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    # Servers are started by whoever tests with them, not by the package.
    policy=/usr/sbin/policy-rc.d
    if [ ! -e "$policy" ]; then
        printf '#!/bin/sh\nexit 101\n' >"$policy"
        chmod +x "$policy"
        trap 'rm -f "$policy"' EXIT
    fi
    apt-get install -qq -y --no-install-recommends "${packages[@]}" >/dev/null
fi
if ! command -v cargo >/dev/null; then
    echo "missing: cargo. Install Rust with rustup (https://rustup.rs) and run this again." >&2
    exit 1
fi
if [ -x "$here/clients/setup.sh" ]; then "$here/clients/setup.sh"; fi

#!/bin/sh
# Chats with mosquitto_pub and mosquitto_sub: 1:1, then offline and back. Exits 1 on a violation.
# Usage: mosquitto_chat.sh HOST PORT [mqttv5|mqttv311]. The server must run with insecure authentication.
set -eu
host=$1 port=$2 version=${3:-mqttv5}
tag=$(od -An -N3 -tx1 /dev/urandom | tr -d ' \n')
alice="alice.$tag" bob="bob.$tag"
out=$(mktemp)
trap 'rm -f "$out"' EXIT

fail() {
    echo "VIOLATION: $*" >&2
    cat "$out" >&2
    exit 1
}

keep=
[ "$version" = mqttv5 ] && keep='-x 3600'

# -E: subscribe, wait for the SUBACK, leave. The session stays and collects.
# shellcheck disable=SC2086
mosquitto_sub -h "$host" -p "$port" -V "$version" -i phone -u "$bob" -P any -c $keep -q 1 -t 'inbox/#' -E \
    || fail "bob can't subscribe"
number=1
while [ "$number" -le 20 ]; do
    mosquitto_pub -h "$host" -p "$port" -V "$version" -i phone -u "$alice" -P any -q 1 -t "u/$bob" -m "message $number" \
        || fail "message $number was not taken"
    number=$((number + 1))
done
format='%t %p'
[ "$version" = mqttv5 ] && format='%t %P %p'
# shellcheck disable=SC2086
mosquitto_sub -h "$host" -p "$port" -V "$version" -i phone -u "$bob" -P any -c $keep -q 1 -t 'inbox/#' -T 'inbox/read/#' -F "$format" \
    -C 20 -W 20 >"$out" || fail "bob did not get 20 messages"
number=1
while read -r line; do
    case $line in
        "inbox/u/$alice/$alice"*"message $number") ;;
        *) fail "instead of message $number came: $line" ;;
    esac
    if [ "$version" = mqttv5 ]; then
        case $line in *seq:"$number"[!0-9]*) ;; *) fail "message $number has not the seq $number" ;; esac
    else
        case $line in "inbox/u/$alice/$alice/$number "*) ;; *) fail "the topic of message $number does not end with its seq" ;; esac
    fi
    number=$((number + 1))
done <"$out"
[ "$number" -eq 21 ] || fail "bob got $((number - 1)) messages"
echo good

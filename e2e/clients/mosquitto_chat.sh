#!/bin/sh
# Chats with mosquitto_pub and mosquitto_sub: 1:1 and in a group, two devices, offline and back. Exits 1 on a violation.
# Usage: mosquitto_chat.sh HOST PORT HTTP_PORT [mqttv5|mqttv311] [resume]. With `resume` one person writes to another until a line comes on
# standard input; meanwhile gateways may die. The server must run with insecure authentication.
set -eu
host=$1 port=$2 http=http://$1:$3 version=${4:-mqttv5} mode=${5:-chat}
tag=$(od -An -N3 -tx1 /dev/urandom | tr -d ' \n')
alice="alice.$tag" bob="bob.$tag" group="team.$tag"
out=$(mktemp -d)
listener=
trap '[ -z "$listener" ] || kill "$listener" 2>/dev/null; rm -rf "$out"' EXIT

fail() {
    echo "VIOLATION: $*" >&2
    head -n 1000 "$out"/* >&2
    exit 1
}

keep= format='%t %p'
if [ "$version" = mqttv5 ]; then
    keep='-x 3600' format='%t %P %p'
fi

# listen USER DEVICE OPTION...: the inbox of a device, whose session stays behind and collects.
# shellcheck disable=SC2086
listen() {
    user=$1 device=$2
    shift 2
    mosquitto_sub -h "$host" -p "$port" -V "$version" -i "$device" -u "$user" -P any -c $keep -q 1 -t 'inbox/#' "$@"
}

# say USER TOPIC ID TEXT: only MQTT 5 has a place for the id.
say() {
    if [ "$version" = mqttv5 ]; then
        set -- "$@" -D PUBLISH user-property id "$3"
    fi
    user=$1 topic=$2 text=$4
    shift 4
    mosquitto_pub -h "$host" -p "$port" -V "$version" -i phone -u "$user" -P any -q 1 -t "$topic" -m "$text" "$@"
}

# expect FILE TOPIC FIRST LAST: the messages FIRST to LAST, each once, in order and with its seq.
expect() {
    number=$3
    while read -r line; do
        case $line in
            "$2"*"message $number") ;;
            *) fail "instead of message $number on $2 came: $line" ;;
        esac
        if [ "$version" = mqttv5 ]; then
            case $line in *seq:"$number"[!0-9]*) ;; *) fail "message $number has not the seq $number" ;; esac
        else
            case $line in "$2/$number "*) ;; *) fail "the topic of message $number does not end with its seq" ;; esac
        fi
        number=$((number + 1))
    done <"$1"
    [ "$number" -eq $(($4 + 1)) ] || fail "$2: the last message is $((number - 1)), not $4"
}

chat() {
    # -E: subscribe, wait for the SUBACK, leave.
    for device in phone laptop; do
        listen "$bob" "$device" -E || fail "bob's $device can't subscribe"
    done
    for number in $(seq 20); do
        say "$alice" "u/$bob" "one-$number" "message $number" || fail "message $number was not taken"
    done
    curl -fsS -o "$out/group" -X PUT -H "Authorization: Bearer insecure:$alice" -H 'Content-Type: application/json' \
        -d "{\"members\": [\"$bob\"]}" "$http/v1/groups/$group" || fail "no group"
    # Number 1 of a group is that it was created.
    for number in $(seq 2 11); do
        say "$alice" "g/$group" "all-$number" "message $number" || fail "message $number to the group was not taken"
    done
    for device in phone laptop; do
        listen "$bob" "$device" -T 'inbox/read/#' -F "$format" -C 31 -W 20 >"$out/$device" || fail "bob's $device did not get 31 messages"
        grep "^inbox/u/" "$out/$device" >"$out/one" || true
        expect "$out/one" "inbox/u/$alice/$alice" 1 20
        grep "^inbox/g/$group/\\\$system" "$out/$device" | grep -q '"created"' || fail "bob's $device was not told of the group"
        grep "^inbox/g/$group/$alice" "$out/$device" >"$out/all" || true
        expect "$out/all" "inbox/g/$group/$alice" 2 11
    done
}

# Each message is sent until it is taken. mosquitto_sub connects again by itself.
resume() {
    listen "$bob" phone -E || fail "bob can't subscribe"
    listen "$bob" phone -T 'inbox/read/#' -F "$format" >"$out/heard" 2>"$out/complaints" &
    listener=$!
    echo "ready $alice $bob"
    # A shell can't look whether there is a line: somebody else waits for it, whose own input would be empty.
    exec 3<&0
    (read -r _ <&3; : >"$out/enough") &
    sent=0
    while [ ! -e "$out/enough" ]; do
        sent=$((sent + 1))
        tries=0
        until say "$alice" "u/$bob" "one-$sent" "message $sent" 2>>"$out/complaints"; do
            tries=$((tries + 1))
            [ "$tries" -lt 100 ] || fail "message $sent was not taken"
            sleep 0.2
        done
        echo "sent $sent"
    done
    tries=0
    until tail -n 1 "$out/heard" | grep -q " message $sent\$"; do
        tries=$((tries + 1))
        [ "$tries" -lt 150 ] || fail "bob has not got message $sent"
        sleep 0.2
    done
    # After a reconnect messages may come again: each place in the order is looked at once.
    if [ "$version" = mqttv5 ]; then
        sed -E 's/^.*[ ,]?seq:([0-9]+).* message ([0-9]+)$/\1 \2/' "$out/heard" >"$out/pairs"
    else
        sed -E 's/^.*\/([0-9]+) message ([0-9]+)$/\1 \2/' "$out/heard" >"$out/pairs"
    fi
    # Without an id a message that was sent again may be stored twice, but not elsewhere.
    awk -v ids="$version" '
        $1 in text { if (text[$1] != $2) { print "seq " $1 " came with two texts"; bad = 1 } next }
        $1 != last + 1 { print "seq " $1 " came after " last; bad = 1 }
        { text[$1] = $2; last = $1; twice = $2 == before }
        twice && ids == "mqttv5" || !twice && $2 != before + 1 { print "message " $2 " is behind " before; bad = 1 }
        { before = $2 }
        END { exit bad }' "$out/pairs" >"$out/verdict" || fail "$(cat "$out/verdict")"
    echo "resumed after $sent messages"
}

"$mode"
echo good

#!/usr/bin/env bash
# Builds the image of imcluster, im-gateway and im-business.
#
#   build.sh [TAG]            with docker or buildah, by the Dockerfile; where neither answers, a docker-archive with the same
#                             content, .run/images/imcluster.tar. Without TAG it is the image that the chart asks for.
#   build.sh --dev OUT TAG    a docker-archive OUT of the development build that tests share, with the few libraries that its
#                             programs are linked to. It costs no second compilation, and is not for production.
#   build.sh --static OUT TAG a docker-archive OUT of what the Dockerfile builds: the release build, linked statically.
#
# LABEL=NAME=VALUE in the environment adds a label to an archive: other content under another tag.
set -euo pipefail
cd "$(dirname "$0")/.."
programs=(imcluster im-gateway im-business)

# archive OUT TAG FOLDER: the programs of FOLDER, and what they are linked to.
archive() {
    local out="$1" tag="$2" folder="$3" content=() library certificates=/etc/ssl/certs/ca-certificates.crt stripped program
    stripped="$(mktemp -d)"
    # shellcheck disable=SC2064
    trap "rm -rf '$stripped'" EXIT
    for program in "${programs[@]}"; do
        strip --strip-debug -o "$stripped/$program" "$folder/$program"
        content+=("$stripped/$program=/$program")
    done
    # A static program has none; ldd says so and fails.
    for library in $(ldd "${programs[@]/#/$folder/}" 2>/dev/null | awk '$2 == "=>" { print $3 } $1 ~ "^/.*ld-" { print $1 }' | sort -u); do
        content+=("$library=$library")
    done
    [ ! -e $certificates ] || content+=("$certificates=$certificates")
    mkdir -p "$(dirname "$out")"
    python3 images/archive.py "$out" --tag "$tag" --user 65532:65532 --entrypoint '["/imcluster"]' \
        ${LABEL:+--label "$LABEL"} "${content[@]}"
    echo "$out: $tag, $(($(stat -c %s "$out") >> 20)) MiB"
}

# static OUT TAG: what the Dockerfile does.
static() {
    local target
    target="$(rustc -vV | sed -n 's/^host: //p')"
    RUSTFLAGS="-C target-feature=+crt-static" cargo build --locked --release --workspace --bins --target "$target"
    archive "$1" "$2" "${CARGO_TARGET_DIR:-target}/$target/release"
}

if [ "${1:-}" = --static ]; then
    static "$2" "$3"
    exit
fi
if [ "${1:-}" = --dev ]; then
    # With a test of each program, as `make test` builds them: for a plain build the libraries have other features, and all of
    # ours would be compiled once more.
    cargo test --workspace --quiet --no-run --test wire --test commits --test leadership --test kubernetes
    archive "$2" "$3" "${CARGO_TARGET_DIR:-target}/debug"
    exit
fi

tag="${1:-imcluster:$(sed -n 's/^appVersion: "\(.*\)"$/\1/p' charts/imcluster/Chart.yaml)}"
if docker info >/dev/null 2>&1; then
    docker build --file images/Dockerfile --tag "$tag" .
elif command -v buildah >/dev/null; then
    buildah bud --file images/Dockerfile --tag "$tag" .
else
    static .run/images/imcluster.tar "$tag"
fi

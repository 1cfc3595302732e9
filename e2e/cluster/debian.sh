# Sourced after common.sh: images from Debian packages.
# shellcheck shell=bash

# Makes a Debian root file system: `debian_tree FOLDER VARIANT PACKAGE…`. VARIANT `minbase` is a system with its packages
# configured; `extract` only unpacks the packages and what they depend on, which is enough to run one program.
debian_tree() {
    local folder="$1" variant="$2" sources=/etc/apt/sources.list.d/debian.sources packages
    shift 2
    [ -e $sources ] || sources=/etc/apt/sources.list
    packages="$(IFS=,; echo "$*")"
    grep -qs bookworm $sources || fail "images without a registry are made of Debian 12's packages, which $sources doesn't name"
    if [ ! -x "$CACHE/mmdebstrap/usr/bin/mmdebstrap" ]; then
        mkdir -p "$CACHE/mmdebstrap"
        quietly "$CACHE/log/apt.log" apt-get update -qq
        (cd "$CACHE/mmdebstrap" && quietly "$CACHE/log/apt.log" apt-get download mmdebstrap && dpkg -x mmdebstrap_*.deb .)
    fi
    rm -rf "$folder"
    PATH="$CACHE/mmdebstrap/usr/bin:$PATH" quietly "$CACHE/log/tree-$(basename "$folder").log" mmdebstrap \
        --mode=root --variant="$variant" --include="$packages" --aptopt='APT::Install-Recommends "false"' \
        --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
        bookworm "$folder" "$sources"
    # What only package management, translations and scripts in Perl would use.
    rm -rf "$folder"/usr/share/{doc,man,locale,info,perl*} "$folder"/var/cache/* "$folder"/var/lib/apt/* \
        "$folder"/usr/lib/x86_64-linux-gnu/{perl*,gconv}
    if [ "$variant" = extract ]; then
        rm -rf "$folder"/var/lib/dpkg
        mkdir -p "$folder"/{tmp,etc,usr/local/bin}
        chmod 1777 "$folder/tmp"
    fi
}

# A docker-archive (see images/archive.py).
archive() { /usr/bin/env python3 "$REPOSITORY/images/archive.py" "$@"; }

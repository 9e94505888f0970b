#!/bin/sh
# sysroot.sh FOLDER - unpacks into FOLDER the arm64 libraries that the program and its tests link,
# and the C and C++ runtimes.
#
# They come from the package sources that this system is already set up with, verified with the same
# keys, but through separate package lists: nothing is installed, no architecture is added, and root
# is not needed. Debian's sources have arm64 next to the native architecture; where they do not,
# this script says so and exits with 1.
set -eu

folder=$1
packages="libopenblas-pthread-dev libsentencepiece-dev libjansson-dev libxxhash-dev libcmocka-dev"

refuse() {
    echo "sysroot.sh: $1" >&2
    echo "sysroot.sh: the NEON tests are cross-compiled only on Debian;" \
        "on a 64-bit ARM machine, make test runs them" >&2
    exit 1
}

command -v apt-get >/dev/null 2>&1 || refuse "there is no apt-get to fetch the arm64 libraries"

rm -rf "$folder"
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/state/lists/partial" "$work/cache/archives/partial"
# Nothing counts as installed, so the libraries' dependencies are fetched too.
: >"$work/status"

arm64_apt() {
    apt-get -q -o APT::Architecture=arm64 -o APT::Architectures::=arm64 \
        -o APT::Sandbox::User="$(id -un)" -o Dir::State="$work/state" \
        -o Dir::State::status="$work/status" -o Dir::Cache="$work/cache" \
        -o Dir::Log="$work" "$@" >"$work/log" 2>&1
}

echo "sysroot.sh: fetching arm64 packages: $packages" >&2
# A source without arm64 makes update fail; all that matters is whether the packages can be had.
arm64_apt update || true
# shellcheck disable=SC2086 # the words are the list
if ! arm64_apt install -y --no-install-recommends --download-only $packages; then
    cat "$work/log" >&2
    refuse "this system's package sources have no arm64 packages, or cannot be reached"
fi
for package in "$work"/cache/archives/*.deb; do
    dpkg-deb --extract "$package" "$folder"
done

#!/bin/sh
# sysroot.sh FOLDER - unpacks the arm64 libraries that the program and its tests link, and the C and C++ runtimes, into FOLDER.
#
# They come from the package sources that this system has anyway, checked by the same keys, but by way of package lists of
# their own: nothing is installed, no architecture is added, and being root is not needed. Debian's sources have arm64
# beside their own architecture; where they don't, this script says so and exits with 1.
set -eu

folder=$1
packages="libopenblas-pthread-dev libsentencepiece-dev libjansson-dev libxxhash-dev libcmocka-dev"

refuse() {
    echo "sysroot.sh: $1" >&2
    echo "sysroot.sh: the NEON tests are cross-compiled on Debian only; on a 64-bit ARM machine, make test runs them" >&2
    exit 1
}

command -v apt-get >/dev/null 2>&1 || refuse "no apt-get here to fetch arm64 libraries with"

rm -rf "$folder"
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/state/lists/partial" "$work/cache/archives/partial"
: >"$work/status" # nothing is installed: so what the libraries need comes too

arm64_apt() {
    apt-get -q -o APT::Architecture=arm64 -o APT::Architectures::=arm64 -o APT::Sandbox::User="$(id -un)" \
        -o Dir::State="$work/state" -o Dir::State::status="$work/status" -o Dir::Cache="$work/cache" \
        -o Dir::Log="$work" "$@" >"$work/log" 2>&1
}

echo "sysroot.sh: fetching arm64 packages: $packages" >&2
# A source without arm64 makes update complain; whether the packages are there is what counts.
arm64_apt update || true
# shellcheck disable=SC2086 # the words are the list
if ! arm64_apt install -y --no-install-recommends --download-only $packages; then
    cat "$work/log" >&2
    refuse "this system's package sources have no arm64 packages, or cannot be reached"
fi
for package in "$work"/cache/archives/*.deb; do
    dpkg-deb --extract "$package" "$folder"
done

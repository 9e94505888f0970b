#!/bin/sh
# setup.sh [--hint] GROUP... - checks for missing packages of the groups and installs them.
#
#   build        compiler, pkg-config and libraries: enough for make and make demo
#   test         cmocka, for the C tests
#   python       Python 3.11 or newer that can make a venv
#   lint         clang-format, clang-tidy, cppcheck, shellcheck
#   sanitizers   the compiler's sanitizer runtimes
#   scale        GNU parallel
#   cross        a compiler for 64-bit ARM and an emulator of it; Debian and its relatives only
#
# If nothing is missing, nothing is done or printed. Checks and demo call this each time, so it must
# be fast. Otherwise the command is printed, then run, with sudo if the user is not root. Where that
# cannot work, the script prints the command to run by hand and exits with 1. CC, CXX, PKG_CONFIG
# and PYTHON are respected.
#
# --hint is for a recipe whose compiler has just failed: it installs nothing, names what is missing,
# if anything, and always exits with 1.
set -u

CC=${CC:-cc}
CXX=${CXX:-c++}
PKG_CONFIG=${PKG_CONFIG:-pkg-config}
PYTHON=${PYTHON:-python3}

have() {
    command -v "$1" >/dev/null 2>&1
}

# A library is there if pkg-config knows it; or, for builds of it without a .pc file, if its header
# is found.
have_library() {
    "$PKG_CONFIG" --exists "$1" 2>/dev/null ||
        printf '#include <%s>\n' "$2" | "$CXX" -x c++ -E - >/dev/null 2>&1
}

# Other BLAS libraries have a cblas.h too, but only OpenBLAS's declares openblas_get_config.
have_openblas() {
    "$PKG_CONFIG" --exists openblas 2>/dev/null ||
        printf '#include <cblas.h>\n' | "$CXX" -x c++ -E - 2>/dev/null | grep -q openblas_get_config
}

have_python() {
    "$PYTHON" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

# Some systems package the sanitizer runtimes separately, so the only sure check is to link them.
have_sanitizers() {
    for sanitizer in address,undefined thread; do
        echo 'int main(void) { return 0; }' |
            "$CC" -x c -fsanitize=$sanitizer -o /dev/null - >/dev/null 2>&1 || return 1
    done
}

# What a group lacks, by names of our own; package_name() gives the packages for each.
missing_of() {
    case $1 in
    build)
        have "$CC" || echo cc
        have "$CXX" || echo cxx
        have "$PKG_CONFIG" || echo pkg-config
        have_openblas || echo openblas
        have_library sentencepiece sentencepiece_processor.h || echo sentencepiece
        have_library jansson jansson.h || echo jansson
        have_library libxxhash xxhash.h || echo xxhash
        ;;
    test) have_library cmocka cmocka.h || echo cmocka ;;
    python) have_python || echo python ;;
    lint)
        have clang-format || echo clang-format
        have clang-tidy || echo clang-tidy
        have cppcheck || echo cppcheck
        have shellcheck || echo shellcheck
        ;;
    sanitizers) have_sanitizers || echo sanitizers ;;
    scale) parallel --version 2>/dev/null | grep -q GNU || echo parallel ;;
    cross)
        have aarch64-linux-gnu-gcc || echo cross-cc
        have aarch64-linux-gnu-g++ || echo cross-cxx
        have qemu-aarch64 || echo cross-emulator
        ;;
    *)
        echo "setup.sh: unknown group '$1'" >&2
        exit 2
        ;;
    esac
}

# package_name MANAGER THING
package_name() {
    case $1:$2 in
    apt:cc | apt:sanitizers) echo gcc libc6-dev ;;
    apt:cxx) echo g++ ;;
    apt:pkg-config) echo pkg-config ;;
    apt:openblas) echo libopenblas-dev ;;
    apt:sentencepiece) echo libsentencepiece-dev ;;
    apt:jansson) echo libjansson-dev ;;
    apt:xxhash) echo libxxhash-dev ;;
    apt:cmocka) echo libcmocka-dev ;;
    apt:python) echo python3 python3-venv ;;
    apt:cross-cc) echo gcc-aarch64-linux-gnu ;;
    apt:cross-cxx) echo g++-aarch64-linux-gnu ;;
    apt:cross-emulator) echo qemu-user ;;

    dnf:cc) echo gcc ;;
    dnf:cxx) echo gcc-c++ ;;
    dnf:pkg-config) echo pkgconf-pkg-config ;;
    dnf:openblas) echo openblas-devel ;;
    dnf:sentencepiece) echo sentencepiece-devel ;;
    dnf:jansson) echo jansson-devel ;;
    dnf:xxhash) echo xxhash-devel ;;
    dnf:cmocka) echo libcmocka-devel ;;
    dnf:python) echo python3 ;;
    dnf:clang-format | dnf:clang-tidy) echo clang-tools-extra ;;
    dnf:shellcheck) echo ShellCheck ;;
    dnf:sanitizers) echo libasan libubsan libtsan ;;

    pacman:cc | pacman:cxx | pacman:sanitizers) echo gcc ;;
    pacman:pkg-config) echo pkgconf ;;
    pacman:clang-format | pacman:clang-tidy) echo clang ;;

    brew:cc | brew:cxx | brew:sanitizers) echo gcc ;;
    brew:pkg-config) echo pkgconf ;;
    brew:clang-tidy) echo llvm ;;

    *) echo "$2" ;;
    esac
}

# Homebrew keeps OpenBLAS and LLVM out of the default search paths.
if have brew; then
    PKG_CONFIG_PATH=$(brew --prefix)/opt/openblas/lib/pkgconfig:${PKG_CONFIG_PATH:-}
    PATH=$PATH:$(brew --prefix)/opt/llvm/bin
    export PKG_CONFIG_PATH PATH
fi

# Sets missing to what the groups lack.
find_missing() {
    missing=
    for group in $groups; do
        missing="$missing $(missing_of "$group")" || exit 2
    done
    # shellcheck disable=SC2086 # the words are the list
    set -- $missing
    missing=$*
}

hint=
if [ "${1:-}" = --hint ]; then
    hint=yes
    shift
fi
groups=$*
find_missing
if [ -n "$hint" ]; then
    [ -n "$missing" ] && echo "missing: $missing: run \`make setup\` to install what is missing" >&2
    exit 1
fi
[ -z "$missing" ] && exit 0

if have apt-get; then
    manager=apt
    install="apt-get install -y --no-install-recommends"
elif have dnf; then
    manager=dnf
    install="dnf install -y"
elif have pacman; then
    manager=pacman
    install="pacman -S --needed --noconfirm"
elif have brew; then
    manager=brew
    install="brew install"
else
    echo "setup.sh: missing: $missing" >&2
    echo "setup.sh: found none of apt-get, dnf, pacman, brew; install these by hand" >&2
    exit 1
fi

# Other systems have a cross compiler, but not the libraries for it.
case $manager:$missing in
apt:*) ;;
*cross-*)
    echo "setup.sh: 64-bit ARM programs are built and emulated only on Debian and its relatives" >&2
    exit 1
    ;;
esac

packages=
for thing in $missing; do
    for package in $(package_name $manager "$thing"); do
        case " $packages " in *" $package "*) ;; *) packages="$packages $package" ;; esac
    done
done
command="$install$packages"

# Debian: a fresh system has no package lists yet, and old lists name files that are gone.
recent_lists() {
    find /var/lib/apt/lists -name '*Packages*' -mtime -7 2>/dev/null | grep -q .
}
if [ $manager = apt ] && ! recent_lists; then
    command="apt-get update && $command"
fi

by_hand() {
    echo "setup.sh: $1" >&2
    echo "setup.sh: run this command as a user who may install packages, then try again:" >&2
    echo "    $command" >&2
    exit 1
}

# Each of the two commands needs sudo. Many sudoers files refuse -E, so env sets the variable.
as_root=
if [ $manager != brew ] && [ "$(id -u)" != 0 ]; then
    have sudo || by_hand "missing: $missing (not root, and no sudo)"
    as_root="sudo "
fi
[ $manager = apt ] && as_root="${as_root}env DEBIAN_FRONTEND=noninteractive "
command=$(printf '%s' "$command" | sed "s/^/$as_root/; s/ && / \&\& $as_root/")

echo "setup.sh: missing: $missing; installing:" >&2
echo "    $command" >&2
# The installer's output goes to stderr: stdout belongs to the target that called this.
sh -c "$command" >&2 || {
    # The lists may be recent and still too old for the mirror: try again with new ones.
    case $manager:$command in
    apt:*"apt-get update"*) by_hand "the installation failed" ;;
    apt:*)
        echo "setup.sh: trying again with new package lists" >&2
        command="${as_root}apt-get update && $command"
        sh -c "$command" >&2 || by_hand "the installation failed"
        ;;
    *) by_hand "the installation failed" ;;
    esac
}

find_missing
[ -z "$missing" ] && exit 0
case " $missing " in
*" python "*)
    found=$("$PYTHON" --version 2>/dev/null || echo none)
    echo "setup.sh: '$PYTHON' is not Python 3.11 or newer with venv and pip (found: $found)" >&2
    echo "setup.sh: if a newer one is installed, name it: make PYTHON=python3.12 test" >&2
    ;;
*) echo "setup.sh: still missing after the installation: $missing" >&2 ;;
esac
exit 1

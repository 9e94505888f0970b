#!/bin/sh
# c_tests.sh PROGRAM... - runs cmocka programs. Prints one line for each and a total, and the whole
# output of those that fail. Exits with 1 if any test failed. The output of each program is kept in
# PROGRAM.log. $BPO_EMULATOR, if set, is a command that runs programs for another CPU. A program
# that hangs is killed after 10 minutes, if the system has the timeout command.
set -u

within=
if command -v timeout >/dev/null 2>&1; then
    within='timeout -k 10 600'
fi

# The number in a line of cmocka's summary: "[  PASSED  ] 12 test(s)."
count() {
    sed -n "s/^\[  $1 *\] \([0-9]*\) test(s).*/\1/p" "$2" | head -n 1
}

# The engine's tests use the CPU, even on a machine with a GPU; tests/cuda_library.h finds its
# library without this variable.
export BPO_CUDA_SO=none

passed=0 failed=0 skipped=0
for program in "$@"; do
    name=$(basename "$program")
    # shellcheck disable=SC2086 # split into words, or empty
    $within ${BPO_EMULATOR:-} "$program" >"$program.log" 2>&1
    code=$?
    p=$(count PASSED "$program.log")
    f=$(count FAILED "$program.log")
    s=$(count SKIPPED "$program.log")
    p=${p:-0} f=${f:-0} s=${s:-0}
    # A crash prints no summary; cmocka's exit code is the number of failures.
    if [ "$code" != 0 ] && [ "$f" = 0 ]; then
        f=1
    fi
    if [ "$code" = 0 ] && [ "$p" = 0 ] && [ "$s" = 0 ]; then
        echo "$name: no cmocka summary in its output" >>"$program.log"
        f=1
    fi
    if [ "$f" != 0 ]; then
        cat "$program.log"
        if [ -n "$within" ] && { [ "$code" = 124 ] || [ "$code" = 137 ]; }; then
            echo "$name: killed after 600 s"
        fi
        echo "$name: exit code $code"
    fi
    # A test says why it skips with print_message("skipped: ...").
    sed -n 's/^skipped: /    skipped: /p' "$program.log" | sort -u
    echo "$name: $p passed, $f failed, $s skipped"
    passed=$((passed + p)) failed=$((failed + f)) skipped=$((skipped + s))
done
echo "C tests: $passed passed, $failed failed, $skipped skipped"
[ "$failed" = 0 ]

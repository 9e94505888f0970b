#!/bin/sh
# cuda_build.sh BPO LIBRARY - what can be said of the real bpo_cuda.so without a GPU: it holds code for every architecture, it opens,
# and bpo says in the driver's own words that there is no device (or, on a machine with one, works).
set -eu
bpo=$1 library=$2
PATH=$PATH:/usr/local/cuda/bin

if command -v cuobjdump >/dev/null 2>&1; then
    cuobjdump --list-elf --list-ptx "$library" | sed -n 's/.*\.\(sm_[0-9a-z]*\)\..*/\1/p' | sort -u | tr '\n' ' '
    echo
fi
code=0
message=$(BPO_CUDA_SO=$library "$bpo" -p hello --greedy --max-new-tokens 1 --device cuda -q 2>&1 >/dev/null) || code=$?
printf '%s\n' "$message"
case "$code:$message" in
0:*) echo "cuda: there is a GPU; make gpu-check tests it" ;;
5:*"no CUDA device: "*) echo "cuda: it opens, and there is no device here" ;;
*)
    echo "cuda: exit code $code; expected 5 and a message that there is no CUDA device" >&2
    exit 1
    ;;
esac

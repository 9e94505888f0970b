#!/bin/sh
# cuda_build.sh BPO LIBRARY - checks what can be checked of the real bpo_cuda.so without a GPU: it
# contains code for every architecture, it can be opened, and bpo reports, in the driver's own
# words, that there is no device. On a machine that has one, bpo has to work.
set -eu
bpo=$1 library=$2
PATH=$PATH:/usr/local/cuda/bin

if command -v cuobjdump >/dev/null 2>&1; then
    cuobjdump --list-elf --list-ptx "$library" | sed -n 's/.*\.\(sm_[0-9a-z]*\)\..*/\1/p' |
        sort -u | tr '\n' ' '
    echo
fi
code=0
message=$(BPO_CUDA_SO=$library "$bpo" -p hello --greedy --max-new-tokens 1 --device cuda -q \
    2>&1 >/dev/null) || code=$?
printf '%s\n' "$message"
case "$code:$message" in
0:*) echo "cuda: this machine has a GPU; make gpu-check tests it" ;;
5:*"no CUDA device: "*) echo "cuda: the library can be opened; this machine has no device" ;;
*)
    echo "cuda: exit code $code; expected 5 and a message that there is no CUDA device" >&2
    exit 1
    ;;
esac

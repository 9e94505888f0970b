#!/bin/bash
# merge.sh PREFIX N - prints the records of PREFIX.0.jsonl ... PREFIX.(N-1).jsonl in the order of the
# input. Line k of the input is in shard k mod N, so the shards' lines are taken in turn, from shard
# 1 on, with shard 0 last.
set -eu
prefix=$1 shards=$2
files=()
for i in $(seq 1 "$shards"); do
    file=$prefix.$((i % shards)).jsonl
    if [ ! -f "$file" ]; then
        echo "merge.sh: $file is missing" >&2
        exit 1
    fi
    files+=("$file")
done
lines() { wc -l <"$1"; }
first=$(lines "${files[0]}") previous=$first
for file in "${files[@]}"; do
    n=$(lines "$file")
    if [ "$n" -gt "$previous" ] || [ "$n" -lt $((first - 1)) ]; then
        echo "merge.sh: $file has $n records, ${files[0]} has $first: a shard is incomplete" >&2
        exit 1
    fi
    previous=$n
done
paste -d '\n' "${files[@]}" | sed '/^$/d' # a shard with one record less adds an empty line at the end

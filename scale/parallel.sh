#!/bin/bash
# parallel.sh IN.jsonl PREFIX N BPO_OPTIONS... - rewrites a data set in N shards with GNU parallel.
# Shard I goes to PREFIX.I.jsonl:
#
#     scale/parallel.sh in.jsonl out/part 4 -m bpo.bin --seed 1 -t 8
#     scale/merge.sh out/part 4 >out.jsonl
#
# $PARALLEL holds options for parallel itself: PARALLEL="--jobs 1 --sshloginfile hosts --workdir ."
# runs one shard at a time on each of the hosts, which must have the files under the same paths.
# Called again, it continues where the files end.
set -eu
if [ $# -lt 3 ]; then
    echo "usage: $0 IN.jsonl PREFIX N BPO_OPTIONS..." >&2
    exit 2
fi
input=$1 prefix=$2 shards=$3
shift 3
case " $* " in
*" --seed"*) ;;
*)
    echo "parallel.sh: --seed N is missing; without it each shard would choose a seed itself" >&2
    exit 2
    ;;
esac

# A shard that was killed is started again and resumes.
seq 0 $((shards - 1)) | parallel --will-cite --quote --retries 3 "${BPO:-bpo}" -i "$input" -o "$prefix.{}.jsonl" \
    --shard "{}/$shards" --resume "$@"

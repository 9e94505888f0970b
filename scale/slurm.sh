#!/bin/bash
# slurm.sh IN.jsonl PREFIX N BPO_OPTIONS... - rewrites a data set in N shards, as a Slurm array job.
# Shard I goes to PREFIX.I.jsonl:
#
#     sbatch --array=0-15 scale/slurm.sh in.jsonl out/part 16 -m bpo.bin --seed 1
#     scale/merge.sh out/part 16 >out.jsonl
#
# A task that is requeued, or submitted again (sbatch --array=3,7 with the same arguments), continues
# where its file ends.
#SBATCH --job-name=bpo
#SBATCH --cpus-per-task=16
#SBATCH --mem=32G
#SBATCH --requeue
#SBATCH --signal=B:TERM@60
set -eu
if [ $# -lt 3 ]; then
    echo "usage: sbatch --array=0-15 $0 IN.jsonl PREFIX 16 BPO_OPTIONS..." >&2
    exit 2
fi
input=$1 prefix=$2 shards=$3
shift 3
case " $* " in
*" --seed"*) ;;
*)
    echo "slurm.sh: --seed N is missing; without it each shard would choose a seed itself" >&2
    exit 2
    ;;
esac
shard=${SLURM_ARRAY_TASK_ID:?is not set; submit with sbatch --array=0-$((shards - 1))}

# exec: Slurm's signal before the time limit then goes to bpo, which writes what is done and exits.
exec "${BPO:-bpo}" -i "$input" -o "$prefix.$shard.jsonl" --shard "$shard/$shards" --resume \
    --threads "${SLURM_CPUS_PER_TASK:-1}" "$@"

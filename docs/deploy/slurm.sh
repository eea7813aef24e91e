#!/usr/bin/env bash
# One search over the nodes of a Slurm job: sbatch docs/deploy/slurm.sh search.yaml first
#
# Submitted again with the same name it goes on where the run stopped. Five minutes before the time limit the
# driver is told to stop, and saves; with MEIOSIS_REQUEUE=1 the job then goes back into the queue.
# Adapt: the lines below, and the environment that holds Meiosis (the same path on every node).
#SBATCH --job-name=meiosis
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
set -euo pipefail

config=${1:?usage: sbatch slurm.sh CONFIG [NAME [options of meiosis search ...]]}
name=${2:-meiosis-$SLURM_JOB_ID}
results=${MEIOSIS_RESULTS:-results}
source "${MEIOSIS_ENV:-$HOME/meiosis/.venv}/bin/activate"

# A token for this job alone. srun hands the environment on; nobody but you can read it on the nodes.
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_TOKEN

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
head_ip=$(srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" hostname -I | awk '{print $1}') # or that of the fast network
port=$((20000 + SLURM_JOB_ID % 10000)) # two jobs on one node do not meet
threads=${SLURM_CPUS_PER_TASK:-1}
gpus=${SLURM_GPUS_ON_NODE:-0}
common=(--num-cpus="$threads" --num-gpus="$gpus" --object-store-memory=200000000 --disable-usage-stats --block)

steps=()
cleanup() {
  if ((${#steps[@]})); then
    kill "${steps[@]}" 2>/dev/null || true
    wait "${steps[@]}" 2>/dev/null || true
  fi
}
trap cleanup EXIT

srun --overlap --nodes=1 --ntasks=1 --cpus-per-task="$threads" --nodelist="$head" \
  ray start --head --node-ip-address="$head_ip" --port="$port" --include-dashboard=false "${common[@]}" &
steps+=($!)

for _ in $(seq 120); do
  (exec 3<>"/dev/tcp/$head_ip/$port") 2>/dev/null && break
  kill -0 "${steps[0]}" || { echo "the head of the Ray cluster did not start on $head" >&2; exit 1; }
  sleep 1
done

others=$((${#nodes[@]} - 1))
if ((others > 0)); then
  srun --overlap --nodes="$others" --ntasks="$others" --ntasks-per-node=1 --cpus-per-task="$threads" \
    --exclude="$head" ray start --address="$head_ip:$port" "${common[@]}" &
  steps+=($!)
fi

if [ -e "$results/$name/run.yaml" ]; then
  if (($# > 2)); then
    echo "$name goes on with the options of its start; without effect here: ${*:3}" >&2
  fi
  meiosis resume "$name" --results "$results" --address "$head_ip:$port" &
else
  meiosis search "$config" --run "$name" --set results="$results" --address "$head_ip:$port" "${@:3}" &
fi
driver=$!
trap 'kill -TERM "$driver" 2>/dev/null || true' TERM INT
status=0
wait "$driver" || status=$?
while kill -0 "$driver" 2>/dev/null; do # the first wait ended because of a signal: let the driver save
  status=0
  wait "$driver" || status=$?
done
if [ "$status" -eq 130 ] && [ "${MEIOSIS_REQUEUE:-0}" = 1 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"

#!/usr/bin/env bash
# One experiment on a Ray cluster inside a Slurm job. From the checkout, in which `make setup` was run and which all nodes see:
#
#     sbatch --nodes 2 infra/deploy/slurm.sh something_v1 --workdir "$SCRATCH/work" --set dataset.root=/data/something_v1
#
# The arguments are those of `sagsm run`. Time limit, preemption or a lost node end the job; Slurm queues it again (--requeue),
# and the same command goes on from the last checkpoint (train.checkpoint_every_steps says how many steps that may cost).
# Nodes must be whole ones (--exclusive): Ray takes all their CPUs and GPUs, and other users of a node could reach its ports.
#SBATCH --job-name=sagsm
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --open-mode=append
#SBATCH --output=sagsm-%j.log
set -euo pipefail
umask 077

: "${SLURM_JOB_ID:?start this script with sbatch}"
if [[ $# -eq 0 ]]; then
    echo "expected what \`sagsm run\` takes: sbatch infra/deploy/slurm.sh EXPERIMENT [OPTION]..." >&2
    exit 2
fi
checkout=${SLURM_SUBMIT_DIR:?}
if [[ ! -x $checkout/.venv/bin/sagsm ]]; then
    echo "found no .venv/bin/sagsm in $checkout; run \`make setup\` there, and sbatch from there" >&2
    exit 2
fi
export PATH=$checkout/.venv/bin:$PATH

# A token for this job alone, in a file that only you can read: in the environment or a command line others could see it.
token=$checkout/.ray-token-$SLURM_JOB_ID
trap 'rm -f "$token"' EXIT
python -c 'import secrets; print(secrets.token_hex(32))' > "$token"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$token
# As infra/cluster.py has it for a cluster of its own.
export RAY_task_oom_retries=3 RAY_worker_niceness=0 RAY_USAGE_STATS_ENABLED=0
# Closes the ports of Ray's metrics, which ask for no token.
export RAY_enable_metrics_collection=0 DASHBOARD_METRIC_PORT=-1 AUTOSCALER_METRIC_PORT=-1
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=300 # of a cold shared disk; Ray's own 30 s are short
export RAY_TMPDIR=/tmp/ray-$SLURM_JOB_ID          # on the node's own disk, and short: sockets have names of 107 characters

read -r head < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
address=$head:$((20000 + SLURM_JOB_ID % 10000))

# Slurm's warning before the time limit reaches this shell only. It ends the job in good order and asks for another turn; what
# ends it otherwise (scancel, preemption) is a TERM, after which Slurm itself knows whether to queue it again.
requeue() {
    echo "the time is over; the job is queued again" >&2
    kill -TERM "$step" 2> /dev/null || true
    wait "$step" || true
    scontrol requeue "$SLURM_JOB_ID"
}
trap requeue USR1
trap 'exit 143' TERM

# Starts Ray on every node, runs the command on the first, and stops Ray.
srun --kill-on-bad-exit=1 ray symmetric-run --address "$address" --min-nodes "$SLURM_JOB_NUM_NODES" \
    --dashboard-host 127.0.0.1 -- sagsm run "$@" --address "$address" &
step=$!
wait "$step"

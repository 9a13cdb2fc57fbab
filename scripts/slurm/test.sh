#!/usr/bin/env bash
# What `make test-slurm` runs, as root on a Debian or Ubuntu without SLURM: installs it, trains with two tasks, signals
# the job in the middle, sees it requeued and finished with the weights of the uninterrupted job, and removes SLURM.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
bin=$(cd "${1:-.venv/bin}" && pwd)
export PATH="$bin:$PATH" OMP_NUM_THREADS=1

fail() {
    echo "test-slurm: $*" >&2
    exit 1
}

installed() { dpkg-query --show --showformat '${Package}\n' | sort -u; }

[ "$(id -u)" = 0 ] || fail "needs root, to install SLURM"
! command -v srun >/dev/null || fail "there is a SLURM on this machine already; it is left alone"

folder=$(mktemp --directory)
installed >"$folder/before"

clean_up() {
    status=$?
    scripts/slurm/one_host.sh stop "$folder/slurm" || true
    sleep 2
    # Exactly what was added, dependencies included.
    installed | comm -13 "$folder/before" - >"$folder/added"
    xargs --no-run-if-empty --arg-file="$folder/added" apt-get purge --yes >"$folder/purge.log" 2>&1 || true
    if command -v srun >/dev/null; then echo "test-slurm: SLURM could not be removed" >&2; fi
    [ "$status" = 0 ] && rm -rf "$folder" || echo "test-slurm: failed, see $folder" >&2
    exit "$status"
}
trap clean_up EXIT

echo "== installing SLURM"
export DEBIAN_FRONTEND=noninteractive
{ apt-get update && apt-get install --yes --no-install-recommends slurmctld slurmd slurm-client munge; } \
    >"$folder/apt.log" 2>&1 </dev/null || fail "apt could not install SLURM, see $folder/apt.log"

echo "== starting it"
scripts/slurm/one_host.sh start "$folder/slurm"
export SLURM_CONF="$folder/slurm/slurm.conf"
sinfo

# Two tasks on the CPU; the options of the script for GPUs are taken back.
submit() {
    sbatch --parsable --ntasks-per-node=2 --gpus-per-node=0 --cpus-per-task=1 --time=10 --job-name="$1" \
        --output="$folder/$1.out" scripts/slurm/one_node.sbatch --trainer.default_root_dir "$folder/$1" \
        --trainer.accelerator cpu --trainer.max_epochs 40 --trainer.enable_progress_bar false --seed_everything 1 \
        --model.architecture '{name: MLP, in_features: 64, hidden: [64, 32], num_classes: 10, dropout: 0.2}' \
        --model.lr 0.05 --data DigitsDataModule --data.batch_size 8 --data.augment true
}

field() { scontrol show job "$1" | grep --only-matching --perl-regexp "(?<=\b$2=)\S+"; }

wait_until() { # SECONDS COMMAND...: until the command succeeds
    local end=$((SECONDS + $1))
    shift
    until "$@"; do
        [ $SECONDS -lt $end ] || { scontrol show job >&2; tail --lines 30 "$folder"/*.out >&2 || true; fail "waited in vain for: $*"; }
        sleep 0.5
    done
}

finished() { [[ $(field "$1" JobState) =~ ^(COMPLETED|FAILED|CANCELLED|TIMEOUT)$ ]]; }
restarted() { [ "$(field "$1" Restarts)" -ge 1 ]; }
succeeded() { [ "$(field "$1" JobState)" = COMPLETED ] || { cat "$folder"/*.out >&2; fail "job $1: $(field "$1" JobState)"; }; }

echo "== an uninterrupted job"
whole=$(submit whole)
wait_until 240 finished "$whole"
succeeded "$whole"
echo "job $whole: $(field "$whole" JobState), $(field "$whole" Restarts) restarts, $(field "$whole" NumTasks) tasks"

echo "== a job that is signalled while it trains"
cut=$(submit cut)
wait_until 120 test -f "$folder/cut/last.ckpt"
scancel --signal=USR1 "$cut"
wait_until 60 restarted "$cut"
cp "$folder/cut/last.ckpt" "$folder/interrupted.ckpt"
echo "job $cut: $(field "$cut" JobState), $(field "$cut" Restarts) restart"
# SLURM waits two minutes before it starts a requeued job again.
wait_until 150 scontrol update JobId="$cut" StartTime=now 2>/dev/null
wait_until 300 finished "$cut"
succeeded "$cut"
echo "job $cut: $(field "$cut" JobState), $(field "$cut" Restarts) restart, $(field "$cut" NumTasks) tasks"

echo "== comparing"
python - "$folder/whole/last.ckpt" "$folder/cut/last.ckpt" "$folder/interrupted.ckpt" <<'PYTHON'
import sys

import torch

whole, cut, interrupted = (torch.load(path, weights_only=True) for path in sys.argv[1:])
print("interrupted after step", interrupted["global_step"], "of", whole["global_step"])
assert 0 < interrupted["global_step"] < whole["global_step"] == cut["global_step"]
for name, tensor in whole["state_dict"].items():
    assert torch.equal(tensor, cut["state_dict"][name]), f"{name} differs"
print("equal bit for bit:", len(whole["state_dict"]), "tensors")
PYTHON
echo "== passed"

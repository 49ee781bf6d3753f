#!/usr/bin/env bash
# Trains on one or several nodes of a SLURM cluster. Arguments are those of
# launch.py; README.md says how to adapt the lines below.
#   sbatch experiments/launching/slurm.sh --config=configs/fsq_888.py
#   sbatch --nodes=4 experiments/launching/slurm.sh --config=...

# One process per GPU: JAX gives the process of local id i the i-th GPU of its
# node, so each process has to see all of them.
#SBATCH --job-name=fsq_jax
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
# SIGTERM three minutes before the time limit: the run saves and exits with 75.
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
set -euo pipefail

# SLURM runs a copy of this file; the checkout is where sbatch was called.
cd "${SLURM_SUBMIT_DIR:?start this file with sbatch}"
# shellcheck source=/dev/null
source "${VENV:-.venv}/bin/activate"

# A process that has saved and left must not get the others killed: process 0
# may still be writing.
status=0
srun --kill-on-bad-exit=0 --wait=300 python launch.py --distributed "$@" ||
  status=$?

# 75: stopped by a signal after a save. The same job resumes the run.
if [[ $status -eq 75 ]]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"

#!/usr/bin/env bash
# Trains on a Cloud TPU slice of one or several hosts, requested as a queued
# resource, and again after each preemption. Arguments are those of launch.py.
# The machine that runs this file needs gcloud and has to stay up.
#   NAME=fsq ZONE=us-central1-a TPU=v5litepod-16 NFS=10.0.0.2:/share \
#     experiments/launching/tpu_pod.sh --config=configs/fsq_888.py \
#     --workdir=/mnt/share/runs/fsq_888
set -euo pipefail

: "${NAME:?name of the queued resource and of its TPU}"
: "${ZONE:?zone, such as us-central1-a}"
: "${TPU:?accelerator type, such as v5litepod-16}"
: "${NFS:?HOST:/SHARE of images and runs, mounted at /mnt/share}"
# Extras of setup.py to install, such as gcs,wandb.
EXTRAS="${EXTRAS:-}"
# Software version of the TPU VMs; TIER is --spot, or empty for on-demand.
RUNTIME="${RUNTIME:-v2-alpha-tpuv5-lite}"
TIER="${TIER---spot}"
POLL_SECONDS="${POLL_SECONDS:-60}"

resources() {
  local verb="$1"
  shift
  gcloud compute tpus queued-resources "$verb" "$NAME" --zone="$ZONE" "$@"
}

# Prints ACTIVE and so on; ABSENT without such a resource, UNKNOWN after another
# error, as of the network.
state() {
  local answer
  if answer="$(resources describe --format='value(state.state)' 2>&1)"; then
    echo "$answer"
  elif [[ "$answer" == *NOT_FOUND* ]]; then
    echo ABSENT
  else
    echo UNKNOWN
  fi
}

on_all_workers() {
  gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all \
    --command="$1"
}

# Returns when the slice is up; one that was preempted is requested again.
acquire() {
  while true; do
    case "$(state)" in
      ACTIVE) return ;;
      ABSENT)
        resources create --node-id="$NAME" --accelerator-type="$TPU" \
          --runtime-version="$RUNTIME" ${TIER:+"$TIER"}
        ;;
      FAILED | SUSPENDED) resources delete --force --quiet ;;
      *) sleep "$POLL_SECONDS" ;;
    esac
  done
}

set_up() {
  gcloud compute tpus tpu-vm scp --recurse --zone="$ZONE" --worker=all \
    configs fsq_jax launch.py pyproject.toml setup.py "$NAME:fsq_jax_code/" &&
    on_all_workers "
      set -e
      sudo apt-get -q install -y nfs-common python3-venv
      sudo mkdir -p /mnt/share
      mountpoint -q /mnt/share || sudo mount $(printf %q "$NFS") /mnt/share
      cd fsq_jax_code
      python3 -m venv .venv
      .venv/bin/pip install -q -U 'jax[tpu]'
      .venv/bin/pip install -q -e $(printf %q ".${EXTRAS:+[$EXTRAS]}")
    "
}

arguments="$(printf '%q ' "$@")"
while true; do
  acquire
  if on_all_workers 'mkdir -p fsq_jax_code' && set_up; then
    # JAX finds the other hosts in the metadata of the TPU.
    if on_all_workers "cd fsq_jax_code && .venv/bin/python launch.py \
        --distributed $arguments"; then
      resources delete --force --quiet
      exit 0
    fi
  fi
  # gcloud does not pass exit codes of workers on, so the state decides.
  sleep "$POLL_SECONDS"
  if [[ "$(state)" == ACTIVE ]]; then
    echo "The run has failed; its TPU $NAME is up, for a look at the logs." >&2
    exit 1
  fi
done

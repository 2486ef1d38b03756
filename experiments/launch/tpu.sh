#!/usr/bin/env bash
# One run on a Cloud TPU slice of one or many hosts, from a machine that has gcloud:
#
#   export NAME=resnet50 ZONE=us-east5-b TYPE=v6e-16 VERSION=v2-alpha-tpuv6e
#   experiments/launch/tpu.sh keep -m experiments.imagenet_resnet --data.data-dir /mnt/tfds \
#     --workdir runs/resnet50 --checkpoint.directory gs://BUCKET/resnet50
#
# keep: creates the slice if it is not there, installs this checkout's last commit on all hosts, and
# runs the command on all; again when it ends with 75 (saved and stopped), when the connection is
# lost, and on a new slice when this one is preempted, at most RESTARTS times. Each part alone:
# create, install, run COMMAND, stop (the run saves and ends), delete. Slices cost until deleted.
#
# Disks of a spot slice are gone with it: checkpoints belong in a bucket. Change: the four variables;
# SPOT= for a slice on demand; in install(), what the hosts need besides, such as mounting the data.
# PROJECT is gcloud's own unless set (CLOUDSDK_CORE_PROJECT).
set -euo pipefail

readonly EXIT_BAD_INPUT=2 EXIT_PREEMPTED=75 # flax_resnet/hosts.py, flax_resnet/preemption.py
readonly LOST=255                           # some host has not said how it ended, as of ssh
: "${RESTARTS=100}" "${SPOT=--spot}" "${POLL_SECONDS=20}"
: "${GRACE_SECONDS=120}" "${PYTHON=$HOME/venv/bin/python}" "${PID_FILE=/dev/shm/flax_resnet.pid}"
readonly CHECKOUT=flax_resnet # in the home directory of each host

main() {
  (($#)) || fail "expected keep, create, install, run, stop or delete; see the head of $0"
  local action=$1
  shift
  case $action in
    worker) worker "$@" ;;
    keep | run)
      (($#)) || fail "$action: no command, such as -m experiments.digits"
      check_variables
      "$action" "$@"
      ;;
    create | install | stop | delete) check_variables && "$action" ;;
    *) fail "$action: expected keep, create, install, run, stop or delete" ;;
  esac
}

fail() {
  echo "error: $*" >&2
  exit "$EXIT_BAD_INPUT"
}

check_variables() {
  local name
  for name in NAME ZONE TYPE VERSION; do
    [[ -n ${!name:-} ]] || fail "\$$name is not set"
  done
}

queued() { gcloud compute tpus queued-resources "$1" "$NAME" --zone="$ZONE" "${@:2}"; }

on_all() { gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$1"; }

# ACTIVE, FAILED, SUSPENDED (preempted), ...; nothing where there is no such slice.
state() { queued describe --format='value(state.state)' 2>/dev/null || true; }

create() {
  local now
  # shellcheck disable=SC2086 # $SPOT is a flag or nothing
  queued create --node-id="$NAME" --accelerator-type="$TYPE" --runtime-version="$VERSION" $SPOT
  while now=$(state) && [[ $now != ACTIVE ]]; do
    case $now in
      FAILED | SUSPENDING | SUSPENDED) return 1 ;; # preempted already, or not to be had
    esac
    sleep "$POLL_SECONDS"
  done
}

install() {
  local packed
  packed=$(mktemp -d)
  git archive --output="$packed/$CHECKOUT.tar" HEAD &&
    gcloud compute tpus tpu-vm scp "$packed/$CHECKOUT.tar" "$NAME:" --zone="$ZONE" --worker=all &&
    on_all "set -e; mkdir -p $CHECKOUT; tar -xf $CHECKOUT.tar -C $CHECKOUT
      python3 -m pip install --quiet --user uv
      python3 -m uv venv --quiet --allow-existing --python 3.12 venv
      python3 -m uv pip install --quiet --python venv/bin/python 'jax[tpu]>=0.10' -e $CHECKOUT gcsfs"
  local status=$?
  rm -r "$packed"
  return "$status"
}

# The command on all hosts. gcloud says that some host failed, not how: each prints its status.
run() {
  local said status=0
  said=$(mktemp)
  on_all "cd $CHECKOUT && bash experiments/launch/tpu.sh worker ${*@Q}" 2>&1 | tee "$said" ||
    status=$LOST
  # The first that is neither 0 nor 75 counts, then 75.
  local each
  for each in $(sed -n 's/.*flax_resnet ended with status \([0-9]*\)$/\1/p' "$said" | sort -n); do
    ((each == 0 || status != 0 && status != LOST && status != EXIT_PREEMPTED)) || status=$each
  done
  rm "$said"
  return "$status"
}

# On each host: ends what a lost connection has left there, and runs Python.
worker() {
  local status=0 i
  end_last
  for ((i = 0; i < GRACE_SECONDS; i++)); do
    runs || break
    sleep 1
  done
  "$PYTHON" -u "$@" &
  echo "$!" >"$PID_FILE"
  wait "$!" || status=$?
  rm -f "$PID_FILE"
  echo "flax_resnet ended with status $status"
}

runs() { [[ -f $PID_FILE ]] && kill -0 "$(<"$PID_FILE")" 2>/dev/null; }

end_last() { if runs; then kill -TERM "$(<"$PID_FILE")"; fi; }

stop() { on_all "kill -TERM \$(cat $PID_FILE)"; }

delete() { queued delete --force --quiet; }

keep() {
  local restart status=0
  for ((restart = 0; restart <= RESTARTS; restart++)); do
    case $(state) in
      ACTIVE) ;;
      "") create || continue ;;
      *) delete && create || continue ;;
    esac
    install || continue
    status=0
    run "$@" || status=$?
    case $status in
      "$EXIT_PREEMPTED" | "$LOST") echo "status $status: starts again ($((RESTARTS - restart)) left)" ;;
      *) return "$status" ;;
    esac
  done
  return "$status"
}

main "$@"

#!/usr/bin/env bash
# One run on a Cloud TPU slice of one or many hosts, from a checkout on a machine that has gcloud:
#
#   export NAME=resnet50 ZONE=us-east5-b TYPE=v6e-16 VERSION=v2-alpha-tpuv6e
#   experiments/launch/tpu.sh keep -m experiments.imagenet_resnet --data.data-dir /mnt/tfds \
#     --workdir runs/resnet50 --checkpoint.directory gs://BUCKET/resnet50
#
# keep: asks for the slice if it is not there, installs the checkout's last commit on all hosts, and
# runs the command on all of them. It starts again after status 75 (saved and stopped), a lost
# connection, and on a new slice when this one was preempted, at most RESTARTS times. Its parts are
# actions too: create, install, run COMMAND, stop (the run saves and ends), delete. A slice costs
# until it is deleted, and Ctrl-C here ends nothing there.
#
# Change: the four variables; SPOT= for a slice on demand; in install what hosts need besides, such
# as mounting the data. A spot slice's disks go with it: keep checkpoints in a bucket.
set -euo pipefail

readonly EXIT_BAD_INPUT=2 EXIT_PREEMPTED=75 # flax_resnet/errors.py, flax_resnet/distributed/preemption.py
readonly LOST=255                           # as of ssh: how the hosts ended is not known
readonly CHECKOUT=flax_resnet               # in the home directory of each host
readonly ACTIONS="keep, create, install, run, stop or delete"
: "${SPOT=--spot}" "${RESTARTS=100}" "${POLL_SECONDS=20}"
# On the hosts:
: "${PYTHON=$HOME/venv/bin/python}" "${GRACE_SECONDS=120}" "${PID_FILE=/dev/shm/flax_resnet.pid}"

main() {
  (($#)) || fail "expected $ACTIONS; the head of $0 explains them"
  local action=$1
  shift
  case $action in
    worker) ;;
    keep | run) (($#)) || fail "$action: no command, such as -m experiments.digits" ;;
    create | install | stop | delete) ;;
    *) fail "$action: expected $ACTIONS" ;;
  esac
  local variable
  for variable in NAME ZONE TYPE VERSION; do
    [[ $action == worker || -n ${!variable:-} ]] || fail "\$$variable is not set"
  done
  "$action" "$@"
}

fail() {
  echo "error: $*" >&2
  exit "$EXIT_BAD_INPUT"
}

queued() { gcloud compute tpus queued-resources "$1" "$NAME" --zone="$ZONE" "${@:2}"; }

on_all() { gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$1"; }

# ACTIVE, SUSPENDED (preempted), FAILED, ...; nothing where there is no such slice.
state() { queued describe --format='value(state.state)' 2>/dev/null || true; }

# Asks for the slice where it is not there or was preempted, and waits for it.
create() {
  local now
  now=$(state)
  case $now in
    FAILED | SUSPENDING | SUSPENDED) delete && now="" || return ;;
  esac
  if [[ -z $now ]]; then
    # shellcheck disable=SC2086 # a flag or nothing
    queued create --node-id="$NAME" --accelerator-type="$TYPE" --runtime-version="$VERSION" $SPOT ||
      return
  fi
  while now=$(state) && [[ $now != ACTIVE ]]; do
    case $now in
      "" | FAILED | SUSPENDING | SUSPENDED) return 1 ;;
    esac
    sleep "$POLL_SECONDS"
  done
}

install() {
  local packed status=0 here
  here=$(dirname "${BASH_SOURCE[0]}")
  packed=$(mktemp -d)
  { git -C "$here/../.." archive --output="$packed/$CHECKOUT.tar" HEAD &&
    gcloud compute tpus tpu-vm scp "$packed/$CHECKOUT.tar" "$NAME:" --zone="$ZONE" --worker=all &&
    on_all "set -e; mkdir -p $CHECKOUT; tar -xf $CHECKOUT.tar -C $CHECKOUT
      python3 -m pip install --quiet --user uv
      python3 -m uv venv --quiet --allow-existing --python 3.12 venv
      python3 -m uv pip install --quiet --python venv/bin/python \\
        'jax[tpu]>=0.10' gcsfs -e $CHECKOUT"; } || status=$?
  rm -r "$packed"
  return "$status"
}

# Runs the command on all hosts. gcloud says that some host failed, not how: each prints its status.
run() {
  local said each status=0 lost=0
  said=$(mktemp)
  on_all "cd $CHECKOUT && bash experiments/launch/tpu.sh worker ${*@Q}" 2>&1 | tee "$said" || lost=1
  while read -r each; do
    case $each in
      0) ;;
      "$EXIT_BAD_INPUT") status=$each && break ;;
      "$EXIT_PREEMPTED") ((status)) || status=$each ;;
      *) status=$each ;;
    esac
  done < <(sed -n 's/.*flax_resnet ended with status \([0-9]*\).*/\1/p' "$said" | sort -n)
  rm "$said"
  ((lost == 0 || status == EXIT_BAD_INPUT)) || status=$LOST
  return "$status"
}

# On each host: ends what a lost connection has left there, and runs Python.
worker() {
  local status=0 i
  for ((i = 0; i < GRACE_SECONDS; i++)); do
    if [[ ! -f $PID_FILE ]] || ! kill -0 "$(<"$PID_FILE")" 2>/dev/null; then break; fi
    ((i > 0)) || kill -TERM "$(<"$PID_FILE")"
    sleep 1
  done
  "$PYTHON" -u "$@" &
  echo "$!" >"$PID_FILE"
  wait "$!" || status=$?
  rm -f "$PID_FILE"
  echo "flax_resnet ended with status $status"
}

stop() { on_all "kill -TERM \$(cat $PID_FILE)"; }

delete() { queued delete --force --quiet; }

keep() {
  local left status=$LOST installed=""
  for ((left = RESTARTS; left >= 0; left--)); do
    if [[ -z $installed || $(state) != ACTIVE ]]; then
      installed=""
      if create && install; then installed=1; fi
    fi
    if [[ -n $installed ]]; then
      status=0
      run "$@" || status=$?
      case $status in
        0 | "$EXIT_BAD_INPUT") return "$status" ;;
        "$EXIT_PREEMPTED" | "$LOST") ;;
        *) [[ $(state) != ACTIVE ]] || return "$status" ;; # a host that was lost fails the others
      esac
    fi
    echo "status $status: starts again ($left times left)"
    sleep "$POLL_SECONDS"
  done
  return "$status"
}

main "$@"

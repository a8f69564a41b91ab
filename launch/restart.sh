#!/usr/bin/env bash
# Runs a command again for as long as it says that it was preempted.
#
#   launch/restart.sh python -m posttrain train --config=... --workdir=...
#
# Exit status 75 means "preempted, state saved": the same command goes on from
# there. Any other status is final and is passed on. SIGTERM is passed to the
# command and ends the restarts. POSTTRAIN_EXIT_FILE names a file that gets the
# final status.
set -uo pipefail

if [[ $# -eq 0 ]]; then
  echo "usage: launch/restart.sh COMMAND [ARGUMENT...]" >&2
  exit 2
fi

readonly PREEMPTED=75
stopped=0
child=""
trap 'stopped=1; [[ -z "$child" ]] || kill -TERM "$child" 2>/dev/null' TERM INT

while true; do
  "$@" &
  child=$!
  wait "$child"
  status=$?
  # A trapped signal interrupts `wait`; the command may still be saving.
  while kill -0 "$child" 2>/dev/null; do
    wait "$child"
    status=$?
  done
  if [[ $status -ne $PREEMPTED || $stopped -eq 1 ]]; then
    [[ -z "${POSTTRAIN_EXIT_FILE:-}" ]] || echo "$status" > "$POSTTRAIN_EXIT_FILE"
    exit "$status"
  fi
  echo "launch/restart.sh: preempted, state saved; starting again" >&2
  sleep "${POSTTRAIN_RESTART_SECONDS:-10}"
done

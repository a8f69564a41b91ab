#!/usr/bin/env bash
# Runs a command again for as long as it was preempted or has lost a host.
#
#   launch/restart.sh python -m posttrain train --config=... --workdir=...
#
# Exit status 75 means "preempted, state saved": the same command goes on from
# there. So does it after 69, "another host is lost", if that one comes back; if
# not, the roll call at the start says so and fails. 143 is SIGTERM before Python
# could handle it, or after the last line: preempted too, and passed on as 75.
# Any other status is final. SIGTERM is passed to the command and ends the
# restarts. POSTTRAIN_EXIT_FILE names a file that gets the final status.
set -uo pipefail

if [[ $# -eq 0 ]]; then
  echo "usage: launch/restart.sh COMMAND [ARGUMENT...]" >&2
  exit 2
fi

readonly PREEMPTED=75 LOST=69 TERMINATED=143
stopped=0
child=""
trap 'stopped=1; [[ -z "$child" ]] || kill -TERM "$child" 2>/dev/null' TERM INT

finish() {
  [[ -z "${POSTTRAIN_EXIT_FILE:-}" ]] || echo "$status" > "$POSTTRAIN_EXIT_FILE"
  exit "$status"
}

while true; do
  "$@" &
  child=$!
  # SIGTERM may have come when the trap did not know of this one yet.
  [[ $stopped -eq 0 ]] || kill -TERM "$child" 2>/dev/null
  wait "$child"
  status=$?
  # A trapped signal interrupts `wait`; the command may still be saving.
  while kill -0 "$child" 2>/dev/null; do
    wait "$child"
    status=$?
  done
  [[ $status -ne $TERMINATED ]] || status=$PREEMPTED
  why=""
  [[ $status -ne $PREEMPTED ]] || why="preempted"
  [[ $status -ne $LOST ]] || why="another host is lost"
  if [[ -z "$why" || $stopped -eq 1 ]]; then
    finish
  fi
  echo "launch/restart.sh: $why; starting again from what is saved" >&2
  # In the background: Bash runs no trap before a command has ended.
  sleep "${POSTTRAIN_RESTART_SECONDS:-10}" &
  child=$!
  [[ $stopped -eq 1 ]] || wait "$child"
  [[ $stopped -eq 0 ]] || finish
done

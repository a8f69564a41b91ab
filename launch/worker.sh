#!/usr/bin/env bash
# Actions of launch/tpu_vm.py on every worker of a slice, in ~/posttrain.
#
#   worker.sh install            a virtual environment with this checkout
#   worker.sh start ARGUMENT...  `posttrain ARGUMENT...`, in the background
#   worker.sh status             prints "worker HOST: running", "none", "exit N"
#   worker.sh stop               SIGTERM, which saves the state
#   worker.sh log                the log, until the run ends
#   worker.sh tail               its last lines, each with the host's name
#
# Next to the checkout are setup.sh, run before each start, and secrets.sh, which
# exports variables and is readable by its owner alone.
set -euo pipefail
cd "$(dirname "$0")/../.."

fail() {
  echo "launch/worker.sh: $1" >&2
  exit 1
}

alive() {
  [[ -f run.pid ]] && kill -0 "$(cat run.pid)" 2>/dev/null
}

action="${1:-}"
shift || true
case "$action" in
  install)
    [[ ! -f secrets.sh ]] || chmod 600 secrets.sh
    [[ -d venv ]] || "${PYTHON:-python3}" -m venv venv
    venv/bin/pip install --quiet --upgrade pip
    venv/bin/pip install --quiet --editable 'checkout[tpu]'
    ;;
  start)
    alive && fail "a run is under way on $(hostname); stop it first"
    rm -f run.exit
    # Its own session, and nohup: it outlives the connection.
    setsid nohup bash checkout/launch/worker.sh run "$@" \
      >> run.log 2>&1 < /dev/null &
    echo $! > run.pid
    ;;
  run)
    export POSTTRAIN_EXIT_FILE="$PWD/run.exit"
    trap 'echo $? > "$POSTTRAIN_EXIT_FILE"' EXIT
    if [[ -f secrets.sh ]]; then
      # shellcheck source=/dev/null
      source secrets.sh
    fi
    [[ ! -f setup.sh ]] || bash setup.sh
    cd checkout
    export POSTTRAIN_COORDINATOR=auto
    exec bash launch/restart.sh ../venv/bin/python -m posttrain "$@"
    ;;
  status)
    if alive; then state="running"
    elif [[ -f run.exit ]]; then state="exit $(cat run.exit)"
    elif [[ -f run.pid ]]; then state="exit 137"  # No time to say more.
    else state="none"; fi
    echo "worker $(hostname): $state"
    ;;
  stop)
    if alive; then kill -TERM "$(cat run.pid)"; fi
    ;;
  log)
    tail -n +1 --pid="$(cat run.pid)" -F run.log
    ;;
  tail)
    tail -n 30 run.log | sed "s/^/[$(hostname)] /"
    ;;
  *)
    fail "unknown action '$action'"
    ;;
esac

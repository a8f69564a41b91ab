#!/usr/bin/env bash
# Runs posttrain on every worker of a TPU VM slice.
#
#   launch/tpu_vm.sh --name=my-slice --zone=us-central2-b -- \
#       train --config=configs/quickstart.py --workdir=/mnt/runs/quickstart
#
# Copies this checkout (tracked files, those that git does not ignore, and the
# commit) to each worker, installs it there with the TPU extra, and starts the
# same `posttrain` command on all of them; JAX finds the other workers by
# itself. The run outlives the connection. A worker that was preempted (exit
# status 75: state saved) is started again. The workdir must be a directory
# that every worker sees under the same name, such as a bucket mounted with
# gcsfuse or a Filestore share: that is where the run goes on from.
#
#   --name=NAME       the slice                              (required)
#   --zone=ZONE       where it is                            (required)
#   --project=ID      gcloud's current project by default
#   --directory=DIR   on the workers, under the home folder  (posttrain)
#   --python=PYTHON   on the workers                         (python3)
#   --logs            follow the log of worker 0, and do nothing else
#   --status          say what runs on each worker, and do nothing else
#   --stop            send SIGTERM, which saves the state, and nothing else
#   --dry-run         print every command instead of running it
set -euo pipefail

usage() {
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"
}

fail() {
  echo "launch/tpu_vm.sh: $1" >&2
  exit 2
}

name="" zone="" project="" directory="posttrain" python="python3"
action="start" dry_run=0
while [[ $# -gt 0 ]]; do
  case "$1" in
    --name=*) name="${1#*=}" ;;
    --zone=*) zone="${1#*=}" ;;
    --project=*) project="${1#*=}" ;;
    --directory=*) directory="${1#*=}" ;;
    --python=*) python="${1#*=}" ;;
    --logs | --status | --stop) action="${1#--}" ;;
    --dry-run) dry_run=1 ;;
    -h | --help) usage; exit 0 ;;
    --) shift; break ;;
    *) fail "unknown argument '$1'. posttrain's own come after --" ;;
  esac
  shift
done
[[ -n "$name" ]] || fail "--name is missing: the name of the TPU VM slice"
[[ -n "$zone" ]] || fail "--zone is missing: gcloud compute tpus tpu-vm list"
[[ "$directory" =~ ^[A-Za-z0-9._-]+$ ]] \
  || fail "--directory='$directory': letters, digits, '.', '_' and '-' only"
if [[ "$action" == start && $# -eq 0 ]]; then
  fail "nothing to run: put -- train --config=... --workdir=... at the end"
fi

where=(--zone="$zone")
[[ -z "$project" ]] || where+=(--project="$project")

quoted() {  # The arguments as one line that a shell reads back, and people too.
  local word line=""
  for word in "$@"; do
    [[ "$word" =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]] || word="'${word//\'/\'\\\'\'}'"
    line+="${line:+ }$word"
  done
  printf '%s\n' "$line"
}

run() {
  if [[ $dry_run -eq 1 ]]; then quoted "$@"; else "$@"; fi
}

on_workers() {  # on_workers WORKER COMMAND
  run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" \
    --worker="$1" --command="$2"
}

# `launch/restart.sh` is in a session of its own; its id is in run.pid.
alive="test -f $directory/run.pid && kill -0 \$(cat $directory/run.pid) 2>/dev/null"

case "$action" in
  logs)
    on_workers 0 "tail -n 200 -F $directory/run.log"
    exit ;;
  status)
    on_workers all "if $alive; then echo running; else echo not running; fi; tail -n 3 $directory/run.log"
    exit ;;
  stop)
    on_workers all "if $alive; then kill -TERM \$(cat $directory/run.pid); else echo not running; fi"
    exit ;;
esac

root="$(git -C "$(dirname "$0")" rev-parse --show-toplevel)"
if [[ $dry_run -eq 1 ]]; then
  scratch="/tmp/posttrain.XXXXXX"
else
  scratch="$(mktemp -d -t posttrain.XXXXXX)"
  trap 'rm -rf "$scratch"' EXIT
fi
archive="$scratch/checkout.tar"
command_line="$(quoted "$@")"

# 1. The checkout. The last commit goes along, so that a run's environment.json
# names it there; a file that was deleted but not committed is left out.
run git clone --quiet --depth=1 --no-checkout "file://$root" "$scratch/clone"
run tar -C "$scratch/clone" -cf "$archive" .git
pack="set -o pipefail; cd $(quoted "$root") && git ls-files -z --cached --others --exclude-standard --deduplicate | while IFS= read -r -d '' f; do [[ ! -e \$f ]] || printf '%s\\0' \"\$f\"; done | tar --null --files-from=- -rf $archive"
run bash -c "$pack"
on_workers all "if $alive; then echo 'a run is under way: --stop it first' >&2; exit 1; fi; mkdir -p $directory"
run gcloud compute tpus tpu-vm scp "$archive" "$name:$directory/checkout.tar" \
  "${where[@]}" --worker=all

# 2. Installed in a virtual environment that later runs reuse.
on_workers all "set -e; cd $directory; rm -rf checkout; mkdir checkout; tar -xf checkout.tar -C checkout; git -C checkout reset --quiet; test -d venv || $python -m venv venv; venv/bin/pip install --quiet --upgrade pip; venv/bin/pip install --quiet --editable 'checkout[tpu]'"

# 3. Started; setsid and nohup keep it when the connection closes.
on_workers all "cd $directory/checkout || exit 1; POSTTRAIN_COORDINATOR=auto setsid nohup bash launch/restart.sh ../venv/bin/python -m posttrain $command_line > ../run.log 2>&1 < /dev/null & echo \$! > ../run.pid"
[[ $dry_run -eq 1 ]] || echo "started; follow with: launch/tpu_vm.sh --name=$name --zone=$zone --logs"

"""Stand-ins for the clouds' tools, and folders for the workers' homes.

`gcloud` treats folders as the homes of workers, so that what a launcher sends
is really run there: unpacked, installed (by a stand-in for pip) and started,
with its log, its process id and its restarts. `taken` in the cloud's folder
means that the slices were preempted: workers cannot be reached, and the state
is SUSPENDED until they are deleted.
"""

import os
import pathlib
import shutil
import subprocess

from launch import job as job_lib

ROOT = pathlib.Path(__file__).parents[2]
SCRIPTS = [ROOT / "launch" / name for name in (
    "worker.sh", "restart.sh", "pack.sh")]

GCLOUD = r"""#!/usr/bin/env bash
set -eu
printf '%s\n' "$*" >> "$CLOUD/calls"
[[ "$1 $2 $3" == "compute tpus queued-resources" ]]
verb="$4"; shift 4
positional=() worker="" node="" command="" nodes=1
for word in "$@"; do
  case "$word" in
    --worker=*) worker="${word#*=}" ;;
    --node=*) node="${word#*=}" ;;
    --node-count=*) nodes="${word#*=}" ;;
    --command=*) command="${word#*=}" ;;
    -*) ;;
    *) positional+=("$word") ;;
  esac
done
cd "$CLOUD"
case "$verb" in
  create)
    [[ ! -e state ]]
    echo "${FIRST_STATE:-WAITING_FOR_RESOURCES}" > state
    for ((n = 0; n < nodes; n++)); do mkdir -p "home/$n-0" "home/$n-1"; done
    exit ;;
  describe)
    [[ -e state ]] || { echo NOT_FOUND >&2; exit 1; }
    if [[ -e taken ]]; then echo SUSPENDED; exit; fi
    cat state
    [[ "$(cat state)" == FAILED ]] || echo ACTIVE > state
    exit ;;
  delete) rm -rf state taken home; exit ;;
esac
[[ -e state && ! -e taken ]] || { echo "cannot connect" >&2; exit 255; }
[[ "$node" == all ]] && node='*'
[[ "$worker" == all ]] && worker='*'
for home in home/$node-$worker; do
  export WORKER_NAME="${home#home/}"
  if [[ "$verb" == ssh ]]; then (cd "$home" && bash -c "$command")
  else
    last=$((${#positional[@]} - 1))
    cp --preserve=mode "${positional[@]:0:$last}" \
      "$home/${positional[$last]#*:}"
  fi
done
"""

PYTHON3 = r"""#!/usr/bin/env bash
[[ "$*" == "-m venv venv" ]] || exit 1
mkdir -p venv/bin
cp "$CLOUD/program" venv/bin/python
printf '#!/bin/sh\necho "$@" >> pip.log\n' > venv/bin/pip
chmod +x venv/bin/*
"""

RECORDER = r"""#!/usr/bin/env bash
printf '%s\n' "$(basename "$0") $*" >> "$CLOUD/calls"
cat >> "$CLOUD/input"
if [[ "$*" == *terminalState* ]]; then
  head -n 1 "$CLOUD/answers"
  [[ $(wc -l < "$CLOUD/answers") == 1 ]] || sed -i 1d "$CLOUD/answers"
fi
"""


def executable(path, text):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text)
  path.chmod(0o755)


class Cloud:
  """A folder with the tools on PATH, and what they were called with."""

  def __init__(self, path, monkeypatch):
    self.path = path
    for name, text in dict(
        gcloud=GCLOUD, python3=PYTHON3, kubectl=RECORDER, xpk=RECORDER,
        sky=RECORDER, hostname='#!/bin/sh\necho "$WORKER_NAME"\n').items():
      executable(path / "bin" / name, text)
    monkeypatch.setenv("PATH", f"{path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("CLOUD", str(path))
    # `make test PYTHON=...` sets it, and the workers' Python is the one here.
    monkeypatch.delenv("PYTHON", raising=False)
    monkeypatch.setenv("POSTTRAIN_RESTART_SECONDS", "0")
    monkeypatch.chdir(ROOT)  # Where configs are.
    self._monkeypatch = monkeypatch

  def calls(self, word=""):
    file = self.path / "calls"
    lines = file.read_text().splitlines() if file.exists() else []
    return [line for line in lines if word in line]

  def program(self, text):
    """Sets the program that workers run in place of Python."""
    executable(self.path / "program", f"#!/usr/bin/env bash\n{text}")

  def answer(self, *lines):
    """Sets kubectl's answers about a JobSet; the last one stays."""
    (self.path / "answers").write_text("".join(f"{x}\n" for x in lines))

  def checkout(self):
    """A small repository, from which the launchers then pack."""
    repository = self.path / "checkout"
    (repository / "launch").mkdir(parents=True)
    for script in SCRIPTS:
      shutil.copy(script, repository / "launch")
    (repository / "a file.txt").write_text("tracked")
    (repository / "gone.txt").write_text("deleted below, but in the index")
    (repository / ".gitignore").write_text("ignored.txt\n")
    (repository / "ignored.txt").write_text("ignored")
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@localhost", "-C",
           str(repository)]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "first"], check=True)
    (repository / "gone.txt").unlink()
    self._monkeypatch.setattr(job_lib, "ROOT", repository)
    return repository

#!/usr/bin/env bash
# Packs this checkout into a tar archive: launch/pack.sh ARCHIVE
#
# Tracked files and those that git does not ignore, as they are now, and the last
# commit, so that a run's environment.json names it there. A file that was
# deleted but not committed is left out.
set -euo pipefail

archive="$(realpath -m "$1")"
root="$(git -C "$(dirname "$0")" rev-parse --show-toplevel)"
clone="$(mktemp -d)"
trap 'rm -rf "$clone"' EXIT
git clone --quiet --depth=1 --no-checkout "file://$root" "$clone/clone"
tar -C "$clone/clone" -cf "$archive" .git
cd "$root"
git ls-files -z --cached --others --exclude-standard --deduplicate \
  | while IFS= read -r -d '' file; do
      [[ ! -e $file ]] || printf '%s\0' "$file"
    done \
  | tar --null --files-from=- -rf "$archive"

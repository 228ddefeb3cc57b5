#!/usr/bin/env bash
# Resolve the exact versions that the scripts install, anew, into scripts/locks/. It needs uv (pip install uv).
#
#   py3.11.txt py3.12.txt py3.13.txt   the newest release of everything within the ranges of setup.py
#   lowest.txt                         the lowest one of what setup.py names, on Python 3.11
set -euo pipefail
cd "$(dirname "$0")/.."
command -v uv >/dev/null || { echo "uv is needed: pip install uv" >&2 && exit 2; }

# resolve NAME PYTHON OPTIONS: locks hold every extra, and no address of a package index
resolve() {
  local lock=scripts/locks/$1.txt python=$2
  shift 2
  {
    echo "# Made by scripts/lock.sh on $(date -u +%F) for Python $python. Do not edit."
    printf '%s\n' 'setuptools>=77' 'wheel>=0.45' |
      uv pip compile --quiet setup.py - --all-extras --python-version "$python" --no-header --no-emit-index-url \
        --no-emit-find-links --no-annotate "$@"
  } >"$lock.new"
  mv "$lock.new" "$lock"
  echo "$lock: $(grep -c == "$lock") packages"
}

mkdir -p scripts/locks
# Python 3.11 keeps a torch that has a small build for the CPU where these tests run most.
resolve py3.11 3.11 --constraint <(echo "torch==2.13.0")
resolve py3.12 3.12
resolve py3.13 3.13
resolve lowest 3.11 --resolution lowest-direct

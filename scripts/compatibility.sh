#!/usr/bin/env bash
# Run the compatibility tier: the tests that touch other packages, at the ends of their tested ranges. Each end has
# an environment of its own, which stays for the next time. docs/compatibility.md says what ran where.
#
#   scripts/compatibility.sh newest    Python 3.12 and the newest of everything (.venv-newest, 8 GB)
#   scripts/compatibility.sh lowest    Python 3.11 and the lowest of everything (.venv-lowest)
#
# Options after the end pass through to pytest. Where the Python or the packages cannot be had it says so and ends
# with 0: nothing was tested.
set -euo pipefail
end=${1:-}
shift || true
case $end in
  newest) version=3.12 lock=py3.12 ;;
  lowest) version=3.11 lock=lowest ;;
  *) echo "compatibility.sh: '$end' is no end of a range. Valid: newest, lowest." >&2 && exit 2 ;;
esac
skip() { echo "compatibility tier, $end: SKIPPED: $1" && exit 0; }

python=
for candidate in "${PYTHON:-}" "python$version" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version".*/bin/python; do
  if [ "$("$candidate" -c 'import sys, venv; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" = "$version" ]; then
    python=$candidate
    break
  fi
done
[ -n "$python" ] || skip "there is no Python $version, neither python$version nor one of pyenv's"

export PYTHON=$python HELIX_VENV=.venv-$end HELIX_LOCK=$lock
unset HELIX_TORCH
source "$(dirname "$0")/environment.sh"
[ -x "$HELIX_VENV/bin/python" ] || "$python" -m pip download --quiet --no-deps --dest "$(mktemp -d)" pluggy ||
  skip "no package index can be reached"
helix_environment test
python - <<'PY'
from helix_megatron.versions import TESTED, found_version
print(f"compatibility tier: {', '.join(f'{name} {found_version(name)}' for name in TESTED)}")
PY
exec python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --compatibility --durations=5 "$@"

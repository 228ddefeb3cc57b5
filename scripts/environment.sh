# Sourced by the scripts: a virtual environment with exactly the versions of a lock, made and filled when it is
# missing or out of date.
#
#   PYTHON       the Python to make it with (3.11, 3.12 or 3.13); python3 by default
#   HELIX_LOCK   the lock in scripts/locks/; by default that of the Python
#   HELIX_VENV   the folder of the environment; .venv by default
#   HELIX_TORCH  what to install as torch in place of the locked one: for another CUDA, or a CPU build

cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" PYTHONWARNINGS="${PYTHONWARNINGS:-ignore}"

# helix_environment EXTRAS: EXTRAS is what setup.py calls them, or empty
helix_environment() {
  local extras=$1 python=${PYTHON:-python3} venv=${HELIX_VENV:-.venv} version lock wanted
  version=$(python_version "$python") || version=unknown
  lock=scripts/locks/${HELIX_LOCK:-py$version}.txt
  if [ ! -f "$lock" ]; then
    echo "There is no $lock, and '$python' is Python $version. Valid Pythons: 3.11, 3.12, 3.13." \
      "Install one of them and try again with PYTHON=/path/to/python3.11." >&2
    exit 2
  fi
  wanted=$({ cat setup.py scripts/environment.sh "$lock" && echo "$version ${HELIX_TORCH:-}"; } | sha256sum)
  # The environment of the tests has everything that the others have.
  if ! grep -qsxF "$wanted" "$venv/installed-${extras:-base}" "$venv/installed-test"; then
    echo "Installing into $venv what $lock names ..."
    [ "$(python_version "$venv/bin/python")" = "$version" ] || "$python" -m venv --clear "$venv"
    # Another torch needs other CUDA libraries than the locked one.
    grep -vE "${HELIX_TORCH:+^(torch|triton|nvidia-.*|cuda-.*)==|}^#" "$lock" >"$venv/constraints.txt"
    # These first and by themselves: what is built from source then takes its tools from here, locked, too.
    helix_pip setuptools wheel "${HELIX_TORCH:-torch}"
    helix_pip --no-build-isolation --editable ".${extras:+[$extras]}"
    echo "$wanted" >"$venv/installed-${extras:-base}"
  fi
  PATH="$(cd "$venv/bin" && pwd):$PATH"
}

python_version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

helix_pip() {
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --constraint "$venv/constraints.txt" "$@"
}

# pretrain_preset NAME [--preset small|full] OPTIONS: the training script on this machine, or on several by torchrun
pretrain_preset() {
  local name=$1 size=small
  shift
  if [ "${1:-}" = --preset ]; then
    size=${2:-}
    shift 2 || shift
  fi
  case $size in
    small) exec python scripts/pretrain_gpt.py --preset "$name-small" --nproc-per-node 4 "$@" ;;
    full)
      WORLD_SIZE=$((${NNODES:-2} * ${GPUS_PER_NODE:-8})) \
        python scripts/pretrain_gpt.py --preset "$name" "$@" --check
      case " $* " in *" --check "*) exit 0 ;; esac
      exec python -m torch.distributed.run --nnodes "${NNODES:-2}" --nproc-per-node "${GPUS_PER_NODE:-8}" \
        --node-rank "${NODE_RANK:-0}" --master-addr "${MASTER_ADDR:-localhost}" \
        --master-port "${MASTER_PORT:-29500}" scripts/pretrain_gpt.py --preset "$name" "$@"
      ;;
    *)
      echo "--preset '$size' is unknown. Valid: small, full." >&2
      exit 2
      ;;
  esac
}

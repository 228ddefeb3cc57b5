# Sourced by the scripts: a virtual environment in .venv, made and filled when it is missing or out of date.
#
#   PYTHON       the Python to make it with (3.11 or newer); python3 by default
#   HELIX_TORCH  what to install as torch; for a GPU machine with another CUDA, or a CPU build

cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" PYTHONWARNINGS="${PYTHONWARNINGS:-ignore}"

# helix_environment EXTRAS: EXTRAS is what setup.py calls them, or empty
helix_environment() {
  local extras=$1 python=${PYTHON:-python3} stamp wanted
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "Python 3.11 or newer is needed, and '$python' is $("$python" --version 2>&1 || true)." \
      "Install one and try again with PYTHON=/path/to/python3.11." >&2
    exit 2
  fi
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  stamp=".venv/installed-${extras:-base}"
  wanted=$(cat setup.py scripts/environment.sh | sha256sum)
  if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "Installing into .venv ..."
    # First and by version, so that nothing else draws another torch in.
    .venv/bin/python -m pip install --quiet --disable-pip-version-check "${HELIX_TORCH:-torch==2.13.0}"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".${extras:+[$extras]}"
    echo "$wanted" >"$stamp"
  fi
  PATH="$PWD/.venv/bin:$PATH"
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

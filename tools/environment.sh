# Sourced by quickstart.sh and test.sh: makes or reuses .venv at the top of the repository, and puts it on PATH.
# usage: . tools/environment.sh EXTRAS          (EXTRAS as pip takes them, as in: static,dev)

find_python() {
  local name
  for name in python3.11 python3.12 python3; do
    if "$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
      echo "$name"
      return
    fi
  done
  echo "error: no Python 3.11 or 3.12 on PATH: install one" >&2
  return 1
}

make_environment() {
  local extras=$1 wanted stamp python
  stamp=.venv/installed-$extras
  wanted=$(cat pyproject.toml setup.py constraints.txt | cksum)
  if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    if [ ! -x .venv/bin/python ]; then
      python=$(find_python)
      echo "== making .venv with $("$python" --version)"
      "$python" -m venv .venv
    fi
    # torch first and by its exact version: left to the resolver, a machine without a GPU may get gigabytes of CUDA.
    echo "== installing torch"
    .venv/bin/python -m pip install -q --disable-pip-version-check "$(grep '^torch==' constraints.txt)"
    echo "== installing megatron_specialm[$extras] and what it needs"
    .venv/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[$extras]"
    echo "$wanted" >"$stamp"
  fi
  export PATH="$PWD/.venv/bin:$PATH"
}

make_environment "$1"

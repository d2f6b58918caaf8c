#!/usr/bin/env bash
# All tests on this machine: environment, lint, pytest. `--slow` adds the slow set; further arguments go to pytest.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
venv="${VENV:-$root/.venv}"
marks="not slow"
if [[ "${1:-}" == "--slow" ]]; then
    marks=""
    shift
fi
bash tools/setup_env.sh
"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
"$venv/bin/codespell" --toml pyproject.toml
"$venv/bin/mypy" --no-error-summary
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$venv/bin/python" -m pytest -m "$marks" "$@"

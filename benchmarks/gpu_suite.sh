#!/usr/bin/env bash
# Measurements that need a GPU, in stages that do not depend on each other: benchmarks/gpu_suite.sh [STAGE ...]
# Without arguments all run. A stage that ended well for the same settings is not repeated, one that fails or takes
# longer than LIMIT_S stops no other one, so that the suite can be called again and again for a few minutes each.
#   OUT          folder of results, of each stage STAGE.log, STAGE.status and what its tool writes
#   MODEL_DIR    Hugging Face directory of the policy
#   DRAFTER_DIR  EAGLE head of it; without one only drafters that look up are measured
#   SOURCES      problems, as --data-train of pretrain_rl.py (default: sums of reasoning-gym)
#   LIMIT_S      seconds of a stage (default 540)
#   REDUCED      1: small counts, to see on a CPU that all of it runs; its figures mean nothing
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
stages=(environment parity lossless step_cost graphs graph_memory rollout sync sleep_wake e2e)
: "${OUT:?set OUT to the folder of results}"
: "${MODEL_DIR:?set MODEL_DIR to the Hugging Face directory of the policy}"
OUT="$(realpath -m "$OUT")"  # relative to where the suite was called
MODEL_DIR="$(realpath -m "$MODEL_DIR")"
[[ -z "${DRAFTER_DIR:-}" ]] || DRAFTER_DIR="$(realpath -m "$DRAFTER_DIR")"
sources="${SOURCES:-reasoning-gym:chain_sum}"
python="${PYTHON:-$root/.venv/bin/python}"
reduced="${REDUCED:-0}"
arms="$([[ -n "${DRAFTER_DIR:-}" ]] && echo eagle || echo suffix)"
drafter=()
[[ -n "${DRAFTER_DIR:-}" ]] && drafter=("$DRAFTER_DIR")
every="$arms:1|$arms:2|$arms:4|$arms:6"
graph_plans=(  # strategies with graphs of one draft length, of each at each batch size, and in buckets
    "single=$arms:6" "naive=beg-mab@1=$every"
    "bucketed=beg-mab@1=$arms:6|$arms:4/5=$arms:4|$arms:2/17=$arms:2|$arms:1/33=$arms:1"
)
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
cd "$root"

if [[ $reduced == 1 ]]; then
    few=(--quick --max-model-len 256 --group-size 2 --dtype float32)
    batches=(2)
    rl=(--train-iters 2 --rl-prompts-per-iteration 2 --rl-group-size 2 --rollout-max-response-tokens 8 --no-bf16)
    parity=(tests/unit/test_losses.py)
    lossless=(tests/unit/test_verification.py)
    engine=(--dtype float32 --max-num-seqs 4 --num-blocks 64)
else
    few=(--max-model-len 8192 --max-tokens 4096)
    batches=(1 2 4 8 16 32)
    rl=(--train-iters 6 --rl-prompts-per-iteration 8 --rl-group-size 8 --rollout-max-response-tokens 1024)
    parity=(tests/megatron tests/engine/test_parity.py)
    lossless=(tests/engine/test_speculation.py tests/engine/test_draft_distribution.py tests/engine/test_engine.py)
    engine=()
fi

bench_rollout() {  # NAME STRATEGIES [FLAGS]
    local name="$1" strategies="$2"
    shift 2
    "$python" tools/bench_rollout.py --model "$MODEL_DIR" ${drafter[0]:+--drafter "${drafter[@]}"} --sources "$sources" \
        --strategies "$strategies" --ranks 1 --json "$OUT/$name.json" "${few[@]}" "$@"
}

environment() {
    nvidia-smi || echo "no nvidia-smi: a machine without GPU"
    "$python" - "$OUT/environment.json" <<'PYTHON'
import json, os, sys
from pathlib import Path
import torch
from tlt.provenance import git_commit, package_versions
gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
found = {
    "commit": git_commit(), "python": sys.version.split()[0], "packages": package_versions(), "cpus": os.cpu_count(),
    "cuda": torch.version.cuda, "gpus": [{"name": gpu.name, "gib": gpu.total_memory / 2**30} for gpu in gpus],
}
Path(sys.argv[1]).write_text(json.dumps(found, indent=1) + "\n")
print(json.dumps(found, indent=1))
PYTHON
}

parity() {  # policy, engine and Hugging Face agree
    "$python" -m pytest -q --junitxml "$OUT/parity.xml" "${parity[@]}"
}

lossless() {  # speculation changes no response
    "$python" -m pytest -q --junitxml "$OUT/lossless.xml" "${lossless[@]}"
}

step_cost() {  # each engine step of fixed drafts by batch size, and the model of costs that is fitted to them
    bench_rollout step_cost "off,$arms:1,$arms:2,$arms:4,$arms:6" --requests-per-rank "${batches[@]}" --group-size 1 \
        --repetitions 2 --record "$OUT/step_cost.jsonl"
    "$python" tools/replay_policies.py --out "$OUT/step_cost_replay" --recording "$OUT/step_cost.jsonl" \
        --iterations 20 --seeds 2 --policies off "$arms:2" "$arms:4" "cost-model@$arms:1|$arms:2|$arms:4|$arms:6"
}

graphs() {  # what would be captured: one strategy, all of them at each batch size, in buckets
    "$python" - "$OUT/graphs.json" "${graph_plans[@]}" <<'PYTHON'
import json, sys
from pathlib import Path
from tlt.spec.graph_plan import capture_sizes, captured_sizes, plan_graphs
from tlt.spec.policy import parse_policy
out, *plans = sys.argv[1:]
found = {}
for name, text in (plan.split("=", 1) for plan in plans):
    policy, _ = parse_policy(text, "--spec-strategy")
    plan = plan_graphs(policy.arms, captured_sizes(64))
    tokens = sum(graph.num_tokens for graph in plan.target)
    found[name] = {
        "strategy": text, "target_graphs": len(plan.target), "drafter_graphs": len(plan.drafter),
        "captured_tokens": tokens, "capture_sizes": capture_sizes(policy, max_num_seqs=64),
    }
Path(out).write_text(json.dumps(found, indent=1) + "\n")
print(json.dumps(found, indent=1))
PYTHON
}

graph_memory() {  # what graphs take beyond an engine without: each engine is a process of its own
    local plan
    for plan in "eager=$arms:6" "${graph_plans[@]}"; do
        "$python" benchmarks/graph_memory.py --model "$MODEL_DIR" --strategy "${plan#*=}" \
            --json "$OUT/graph_memory_${plan%%=*}.json" ${drafter[0]:+--drafter "${drafter[@]}"} \
            $([[ $plan != eager=* ]] || echo --eager) ${engine[0]:+"${engine[@]}"}
    done
    "$python" - "$OUT" <<'PYTHON'
import json, sys
from pathlib import Path
out = Path(sys.argv[1])
used = {
    name: json.loads((out / f"graph_memory_{name}.json").read_text())["used_bytes"]
    for name in ("eager", "single", "naive", "bucketed")
}
found = {"used_bytes": used, "graph_bytes": {name: each - used["eager"] for name, each in used.items()}}
single = found["graph_bytes"]["single"]
if single > 0:  # nothing was captured on a CPU
    found["ratio_to_single"] = {name: each / single for name, each in found["graph_bytes"].items()}
(out / "graph_memory.json").write_text(json.dumps(found, indent=1) + "\n")
print(json.dumps(found, indent=1))
PYTHON
}

rollout() {  # whole rollouts, paired with plain
    bench_rollout rollout "plain,off,$arms:4,adaptive:8" --requests-per-rank "${batches[@]}" --group-size 1
}

sync() {  # RL with Megatron and vLLM on one GPU: seconds of each weight sync, update and rollout; how long a copy takes
    rm -rf "$OUT/sync.run"
    "$python" -m torch.distributed.run --standalone --nproc_per_node 1 pretrain_rl.py --hf-model "$MODEL_DIR" \
        --save "$OUT/sync.run" --data-train "$sources" --eval-num-prompts 2 "${rl[@]}"
    "$python" - "$OUT/sync.run/metrics.jsonl" "$MODEL_DIR" "$OUT/sync.json" <<'PYTHON'
import json, math, sys, time
from pathlib import Path
import torch
from safetensors import safe_open
metrics, model, out = map(Path, sys.argv[1:])
rows = [json.loads(line) for line in metrics.read_text().splitlines()]
names = ("weight_sync/push_s", "policy/update_s", "policy/logprobs_s", "rollout/duration_s")
found = {name: [row[name] for row in rows if name in row] for name in names}
num_weights = 0
for path in model.glob("*.safetensors"):
    with safe_open(path, framework="pt") as file:
        num_weights += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())
found["policy_bytes"] = 2 * num_weights  # bf16
if torch.cuda.is_available():  # the copy bound: the policy's bytes from one place of the GPU to another
    source, copies = torch.zeros(2**30, dtype=torch.uint8, device="cuda"), 20
    target = source.clone()
    torch.cuda.synchronize()
    begin_s = time.perf_counter()
    for _ in range(copies):
        target.copy_(source)
    torch.cuda.synchronize()
    found["copied_bytes_per_s"] = copies * source.numel() / (time.perf_counter() - begin_s)
    found["copy_bound_s"] = found["policy_bytes"] / found["copied_bytes_per_s"]
out.write_text(json.dumps(found, indent=1) + "\n")
print(json.dumps(found, indent=1))
PYTHON
}

sleep_wake() {  # an engine frees its memory, takes it again and loads weights, three times with read-back; same text
    if [[ -z "${DRAFTER_DIR:-}" ]] || ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
        echo "sleep_wake: left out: it needs a GPU and DRAFTER_DIR"
        return
    fi
    "$python" benchmarks/lent_gpu/look.py --model "$MODEL_DIR" --drafter "$DRAFTER_DIR" --strategies off,eagle:4 \
        --batches 8 --sleep --json "$OUT/sleep_wake.json"
}

e2e() {  # whole RL, full (without a head: the suffix drafter) against plain; each commit has runs of its own
    local modes=plain,suffix:8 quick=() flags=(--rollout-max-response-tokens 4096 --rollout-max-model-len 8192) commit
    commit="$(git rev-parse --short HEAD 2>/dev/null || echo no-commit)"
    if [[ -n "${DRAFTER_DIR:-}" ]]; then
        modes=plain,full
    fi
    if [[ $reduced == 1 ]]; then  # --quick has responses of its own length
        quick=(--quick) flags=(--no-bf16)
    fi
    "$python" tools/bench_e2e.py --hf-model "$MODEL_DIR" ${drafter[0]:+--drafter "${drafter[@]}"} --ranks 1 \
        --modes "$modes" --out "$OUT/e2e_$commit" ${quick[0]:+"${quick[@]}"} -- --data-train "$sources" "${flags[@]}"
}

if [[ "${1:-}" == --run-stage ]]; then  # in a shell of its own, so that a time limit and `set -e` hold
    "$2"
    exit
fi
mkdir -p "$OUT"
for stage in "${@:-${stages[@]}}"; do
    if [[ " ${stages[*]} " != *" $stage "* ]]; then
        echo "gpu_suite.sh: error: no stage $stage; allowed are ${stages[*]}" >&2
        exit 2
    fi
done
settings="$(git rev-parse HEAD 2>/dev/null || echo no-commit) $MODEL_DIR ${DRAFTER_DIR:-} $sources $reduced"
failed=()
for stage in "${@:-${stages[@]}}"; do
    if [[ "$(cat "$OUT/$stage.status" 2>/dev/null)" == "0 $settings" ]]; then
        echo "$stage: done before"
        continue
    fi
    begin=$SECONDS status=0
    timeout --kill-after 10 "${LIMIT_S:-540}" bash "$root/benchmarks/gpu_suite.sh" --run-stage "$stage" \
        >"$OUT/$stage.log" 2>&1 || status=$?
    echo "$status $settings" >"$OUT/$stage.status"
    echo "$stage: status $status after $((SECONDS - begin)) s, $OUT/$stage.log"
    [[ $status == 0 ]] || failed+=("$stage")
done
if ((${#failed[@]})); then
    echo "failed: ${failed[*]}" >&2
    exit 1
fi

"""Flags and config are the same thing twice; metrics and traces survive what happens to runs."""

import json
import math

import pytest

from tlt.arguments import build_parser, parse, to_flags
from tlt.config import (
    DataConfig,
    DrafterConfig,
    EvalConfig,
    ModelConfig,
    OptimizerConfig,
    RewardConfig,
    RLConfig,
    RolloutConfig,
    RunConfig,
    SpecConfig,
    SpotConfig,
    TrainingConfig,
    check,
)
from tlt.metrics import MetricsLog, MetricSums
from tlt.trace import Trace

REQUIRED = ["--hf-model", "m", "--save", "s", "--data-train", "a", "b"]
HF = {
    "model_type": "llama",
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_hidden_layers": 6,
    "vocab_size": 96,
    "intermediate_size": 6,
    "max_position_embeddings": 128,
}


def test_config_to_flags_to_config_is_the_same():
    config = RunConfig(
        training=TrainingConfig(save="out", seed=7, dry_run=True),
        model=ModelConfig(hf_model="m", bf16=False, recompute_granularity="full"),
        optimizer=OptimizerConfig(lr=3e-4, lr_decay_style="cosine"),
        rl=RLConfig(dual_clip=3.0, importance_sampling_cap=1.5, advantage_std=False, loss_aggregation="dr-grpo"),
        rollout=RolloutConfig(temperature=0.9, max_model_len=512),
        spec=SpecConfig(strategy="eagle:4", max_running_requests=8, drafts="one-hot"),
        drafter=DrafterConfig(num_depths=3),
        spot=SpotConfig(training="on", lr=1e-4),
        data=DataConfig(train=("reasoning-gym:gcd", "jsonl:x"), weights=(1.0, 2.5), instruction="\nThink."),
        eval=EvalConfig(sources=("reasoning-gym:lcm",)),
        reward=RewardConfig(workers=3),
    )
    assert parse(to_flags(config), "") == config


def test_every_flag_has_a_sentence():
    for action in build_parser("")._actions:
        assert action.help, action.option_strings
        assert len(action.help) > 15, action.option_strings


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--rl-group-size", "0"], "--rl-group-size must be at least 1, got 0"),
        (["--rl-optimizer-steps", "9"], "--rl-optimizer-steps must be at most --rl-prompts-per-iteration"),
        (["--rl-kl-estimator", "k4"], "--rl-kl-estimator"),
        (["--rollout-top-p", "0"], "--rollout-top-p must be in (0, 1], got 0.0"),
        (["--rollout-max-model-len", "0"], "--rollout-max-model-len must be at least 1, got 0"),
        (["--rollout-max-num-batched-tokens", "-5"], "--rollout-max-num-batched-tokens must be at least 1, got -5"),
        (["--rollout-num-gpu-blocks-override", "0"], "--rollout-num-gpu-blocks-override must be at least 1, got 0"),
        (["--lr", "inf"], "--lr: must be a finite number, got 'inf'"),
        (["--lr", "fast"], "--lr: must be a finite number, got 'fast'"),
        (["--rl-kl-coef", "1e999"], "--rl-kl-coef: must be a finite number, got '1e999'"),
        (["--rl-entropy-coef", "nan"], "--rl-entropy-coef: must be a finite number, got 'nan'"),
        (["--rl-dual-clip", "inf"], "--rl-dual-clip: must be a finite number"),
        (["--distributed-timeout-minutes", "inf"], "--distributed-timeout-minutes: must be a finite number"),
        (["--data-weights", "1", "inf"], "--data-weights: must be a finite number"),
        (["--spec-max-running-requests", "0"], "--spec-max-running-requests must be at least 1, got 0"),
        (["--spec-collapse-frac", "1"], "--spec-collapse-frac must be in [0, 1), got 1.0"),
        (["--data-weights", "1"], "--data-weights must be one number per source"),
        (["--data-weights", "1", "-1"], "--data-weights must be positive numbers"),
        (["--sequence-parallel"], "--sequence-parallel must be off"),
        (["--min-lr", "1"], "--min-lr must be at most --lr"),
        (["--overlap-param-gather"], "--overlap-param-gather must be off without --use-distributed-optimizer"),
        (["--no-such-flag"], "--no-such-flag"),
        (["--rl-group-siz", "2"], "--rl-group-siz"),
    ],
)
def test_a_bad_flag_is_named(flags, part):
    with pytest.raises(ValueError, match=".") as caught:
        parse([*REQUIRED, *flags], "")
    assert part in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "world_size", "part"),
    [
        (["--tensor-model-parallel-size", "3"], 3, "8 attention heads"),
        (["--tensor-model-parallel-size", "8"], 8, "4 key-value heads"),
        (["--pipeline-model-parallel-size", "4"], 4, "6 layers"),
        (["--tensor-model-parallel-size", "2"], 3, "world size (3 ranks)"),
        (["--tensor-model-parallel-size", "4"], 4, "feed-forward width of 6"),
        (["--rollout-tensor-parallel-size", "2"], 3, "world size (3 ranks)"),
        (["--rollout-tensor-parallel-size", "8"], 8, "ranks of a node (4)"),
        (["--rollout-max-response-tokens", "128"], 1, "context length of 128"),
        (["--rollout-max-model-len", "129"], 1, "context of 128"),
        (["--drafter-lr", "1e-3"], 1, "must be left at 0.002: idle ranks train at --spot-lr, got 0.001"),
        (["--drafter-min-lr-frac", "1"], 1, "left at 0.01"),
        (["--drafter-warmup-steps", "5"], 1, "left at 30: idle ranks train after --spot-warmup-steps"),
        (["--drafter-ema-decay", "0.9"], 1, "--spot-ema-decay"),
    ],
)
def test_what_does_not_fit_together_is_named(flags, world_size, part):
    defaults = ["--rollout-max-response-tokens", "16"]
    config = parse([*REQUIRED, *defaults, *flags], "")
    with pytest.raises(ValueError, match=".") as caught:
        check(config, world_size=world_size, ranks_per_node=min(world_size, 4), hf_config=HF)
    assert part in str(caught.value)
    assert flags[0] in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "world_size", "part"),
    [
        (["--expert-model-parallel-size", "3"], 3, "a divisor of the model's 4 experts"),
        (["--expert-model-parallel-size", "4"], 2, "a divisor of the 2 ranks of a pipeline stage"),
        (
            ["--tensor-model-parallel-size", "2", "--expert-model-parallel-size", "2"],
            2,
            "--sequence-parallel must be on",
        ),
        (
            ["--tensor-model-parallel-size", "2", "--sequence-parallel"],
            2,
            "--expert-model-parallel-size must be at least 2",
        ),
        (["--rollout-tensor-parallel-size", "4"], 4, "experts' width of 6"),
    ],
)
def test_what_does_not_fit_experts_is_named(flags, world_size, part):
    experts = {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 6}
    config = parse([*REQUIRED, "--rollout-max-response-tokens", "16", *flags], "")
    with pytest.raises(ValueError, match=part):
        check(config, world_size=world_size, ranks_per_node=world_size, hf_config=HF | experts)
    if flags[0] == "--expert-model-parallel-size":
        with pytest.raises(ValueError, match="a model of type llama has no experts"):
            check(config, world_size=12, ranks_per_node=4, hf_config=HF)


def test_settings_of_the_drafter_that_idle_ranks_follow_pass():
    flags = ["--drafter-num-depths", "3", "--drafter-lr", "2e-3", "--rollout-max-response-tokens", "16"]
    check(parse([*REQUIRED, *flags], ""), world_size=1, ranks_per_node=1, hf_config=HF)


def test_means_are_sums_over_counts_and_maxima_are_maxima():
    total = MetricSums(sums={"a": 1.0}, counts={"a": 1.0}, maxima={"m": -3.0})
    total.add(MetricSums(sums={"a": 5.0, "b": 2.0}, counts={"a": 2.0, "b": 0.0}, maxima={"m": -7.0}))
    total.add(MetricSums())
    assert total.values() == {"a": 2.0, "b": 0.0, "m": -3.0}


def test_metrics_beyond_the_resumed_iteration_are_cut_and_nan_is_null(tmp_path):
    log = MetricsLog(tmp_path, tensorboard_dir=tmp_path / "tb", is_writer=True, resumed_iteration=0)
    for iteration in (1, 2, 3):
        log.log(iteration, {"rl/reward": math.nan if iteration == 2 else 0.5}, train_iters=3)
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 4, "rl/rew')  # a kill in the middle of a line
    MetricsLog(tmp_path, tensorboard_dir=tmp_path / "tb", is_writer=True, resumed_iteration=2).close()
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert records == [{"iteration": 1, "rl/reward": 0.5}, {"iteration": 2, "rl/reward": None}]
    MetricsLog(tmp_path, tensorboard_dir=tmp_path / "tb", is_writer=True, resumed_iteration=0).close()
    assert (tmp_path / "metrics.jsonl").read_text() == "", "a run that begins again writes record 0 again"


def test_a_span_that_ends_by_an_exception_is_written_with_its_type(tmp_path):
    trace = Trace(tmp_path, rank=3)
    with trace.span("outer", iteration=1), pytest.raises(ZeroDivisionError), trace.span("inner"):
        _ = 1 / 0
    trace.close()
    inner, outer = (json.loads(line) for line in (tmp_path / "rank3.jsonl").read_text().splitlines())
    assert (inner["name"], inner["error"]) == ("inner", "ZeroDivisionError")
    assert (outer["name"], outer["iteration"], outer["rank"]) == ("outer", 1, 3)
    assert outer["begin_s"] <= inner["begin_s"] <= inner["end_s"] <= outer["end_s"]

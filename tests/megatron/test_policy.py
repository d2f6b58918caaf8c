"""The policy on real megatron-core: the network of transformers, the same training at every layout and packing."""

from pathlib import Path

import pytest
import torch
from megatron.core.dist_checkpointing import validation
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

from tests.distributed.ranks import run_ranks
from tests.distributed.trainer_cases import make_batch, make_trainer
from tests.tiny_models import EXPERTS, KINDS, write_tiny_model
from tlt.config import OptimizerConfig, RLConfig
from tlt.policy.checkpoint import is_extra_state
from tlt.policy.model import forward_packed
from tlt.rl.packing import pack
from tlt.types import SamplingConfig, TrainSequence
from tlt.weight_sync.gather import HfDirectory

pytestmark = pytest.mark.megatron


def lone_sequences(*sizes: int) -> list[TrainSequence]:
    return [
        TrainSequence(
            token_ids=tuple((11 * i + 17 * n) % 500 for i in range(n)),
            num_prompt_tokens=1,
            advantage=1.0,
            rollout_logprobs=(0.0,) * (n - 1),
            loss_weight=1.0,
        )
        for n in sizes
    ]


def _logits_and_names(rank: int, world_size: int, folder: Path, tp: int, pp: int, **layout) -> None:
    trainer = make_trainer(folder, tp=tp, pp=pp, **layout)
    original = {name: file.get_tensor(name) for name, file in HfDirectory(folder).owner.items()}
    received = dict((name, tensor.clone()) for name, tensor in trainer.named_hf_tensors())
    assert sorted(received) == sorted(original), "names are a bijection"
    assert all(torch.equal(received[name], original[name]) for name in original), "values are bit-exact"

    sequences = lone_sequences(7, 12, 5)
    collected = []

    def keep(micro_batch, logits, non_loss_data):
        return logits

    with torch.no_grad():
        packed = pack(sequences, multiple=tp)  # with sequence parallelism each rank has a part of as many tokens
        collected = trainer._run(trainer.ddp, [packed], keep, forward_only=True)
    if not trainer.parallel.is_last_stage:
        return
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = torch.cat([model(torch.tensor([s.token_ids])).logits[0, :-1] for s in sequences])
    width = expected.shape[1] // tp
    own = expected[:, trainer.parallel.tp_rank * width : (trainer.parallel.tp_rank + 1) * width]
    # fp32, logits up to 5: row-parallel sums are added in another order
    torch.testing.assert_close(collected[0], own, rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_logits_are_those_of_transformers_and_weights_go_both_ways(tiny_models, kind, tp, pp):
    run_ranks(_logits_and_names, tp * pp, tiny_models[kind], tp, pp)


def _experts_logits_and_names(rank: int, world_size: int, folder: Path, layout: dict) -> None:
    _logits_and_names(rank, world_size, folder, **{"tp": 1, "pp": 1, **layout})


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        (1, {}),
        (2, {"ep": 2}),
        (4, {"ep": 2, "pp": 2}),
        (2, {"tp": 2, "sequence_parallel": True}),
        (4, {"tp": 2, "sequence_parallel": True, "ep": 4}),
    ],
)
def test_experts_are_those_of_transformers_wherever_they_are(tiny_models, world_size, layout):
    run_ranks(_experts_logits_and_names, world_size, tiny_models[EXPERTS], layout)


def test_probabilities_of_experts_that_do_not_add_up_to_one(tmp_path):
    folder = write_tiny_model(EXPERTS, tmp_path, norm_topk_prob=False)
    run_ranks(_experts_logits_and_names, 1, folder, {})


def test_sequence_parallel_norms_compute_the_same(tiny_models):
    run_ranks(_experts_logits_and_names, 2, tiny_models["qwen2"], {"tp": 2, "sequence_parallel": True})


def _train(rank: int, world_size: int, folder: Path, out: Path, case: dict) -> None:
    rl = RLConfig(kl_coef=0.05, entropy_coef=0.01, dual_clip=3.0, max_logprob_diff=None)  # no engine sampled this
    trainer = make_trainer(
        folder,
        tp=case.get("tp", 1),
        pp=case.get("pp", 1),
        ep=case.get("ep", 1),
        sequence_parallel=case.get("sequence_parallel", False),
        max_tokens=case.get("max_tokens", 4096),
        recompute=case.get("recompute", "none"),
        rl=rl,
        sampling=SamplingConfig(temperature=0.9, top_k=case.get("top_k", 0), max_response_tokens=64),
        optimizer=OptimizerConfig(
            lr=1e-3,
            clip_grad=0.5,
            use_distributed_optimizer=case.get("use_distributed_optimizer", False),
            overlap_grad_reduce=case.get("overlap", False) or case.get("overlap_grad_reduce", False),
            overlap_param_gather=case.get("overlap", False),
        ),  # fmt: skip
    )
    history = []
    for seed in range(2):
        metrics = trainer.train_step(make_batch(seed=seed, sequences_per_step=case.get("sequences", 6)))
        history.append({name: value for name, value in metrics.items() if not name.endswith("_s")})
    everywhere = trainer.parallel.all_gather_objects(history)
    assert all(other == history for other in everywhere), "metrics are equal on all ranks"
    weights = {name: tensor.clone() for name, tensor in trainer.named_hf_tensors()}
    if rank == 0:
        torch.save((history, weights), out)


@pytest.fixture(scope="module")
def one_rank(tiny_models, tmp_path_factory):
    """Metrics and weights after two iterations on one rank, in one pack."""
    out = tmp_path_factory.mktemp("one_rank") / "result.pt"
    run_ranks(_train, 1, tiny_models["llama"], out, {})
    return torch.load(out)


@pytest.mark.parametrize(
    ("world_size", "case"),
    [
        (1, {"max_tokens": 30}),
        (2, {}),
        (2, {"max_tokens": 40}),
        (2, {"tp": 2}),
        (2, {"pp": 2, "max_tokens": 40}),
        (4, {"tp": 2, "pp": 2, "max_tokens": 60}),
        (4, {"tp": 2}),
        (2, {"tp": 2, "sequence_parallel": True, "max_tokens": 50}),
        (2, {"use_distributed_optimizer": True}),
        (2, {"overlap_grad_reduce": True, "max_tokens": 40}),
        (2, {"use_distributed_optimizer": True, "overlap": True, "max_tokens": 40}),
        (1, {"recompute": "selective"}),
        (1, {"recompute": "full"}),
        (8, {}),  # more ranks than sequences: some have none
    ],
)
def test_training_does_not_depend_on_layout_or_packing(tiny_models, one_rank, tmp_path, world_size, case):
    run_ranks(_train, world_size, tiny_models["llama"], tmp_path / "result.pt", case)
    assert_same_training(torch.load(tmp_path / "result.pt"), one_rank)


def assert_same_training(ours: tuple[list, dict], expected: tuple[list, dict]) -> None:
    """Of two results of `_train`."""
    for metrics, others in zip(ours[0], expected[0], strict=True):
        # fp32 gradients, added in another order; the second iteration starts from weights that differ so
        assert metrics == pytest.approx(others, rel=2e-4, abs=2e-5)
    for name, tensor in expected[1].items():
        # Adam turns a relative difference of a tiny gradient into one of the step (1e-3), so this is a bound on steps
        torch.testing.assert_close(ours[1][name], tensor, rtol=0, atol=4e-4)


@pytest.fixture(scope="module")
def experts_on_one_rank(tiny_models, tmp_path_factory):
    out = tmp_path_factory.mktemp("one_rank") / "experts.pt"
    run_ranks(_train, 1, tiny_models[EXPERTS], out, {})
    return torch.load(out)


@pytest.mark.parametrize(
    ("world_size", "case"),
    [
        (1, {"max_tokens": 30}),
        (2, {}),
        (2, {"ep": 2, "max_tokens": 40}),
        (4, {"ep": 2, "pp": 2, "max_tokens": 60}),
        (4, {"ep": 2, "use_distributed_optimizer": True}),
        (4, {"ep": 2, "use_distributed_optimizer": True, "overlap": True}),
        (4, {"tp": 2, "sequence_parallel": True, "ep": 2}),
        (4, {"tp": 2, "sequence_parallel": True, "ep": 4}),
        (2, {"ep": 2, "recompute": "full"}),
        (8, {"ep": 4}),  # more ranks than sequences: some have none, and experts that others need
    ],
)
def test_training_of_experts_does_not_depend_on_the_layout(
    tiny_models, experts_on_one_rank, tmp_path, world_size, case
):
    run_ranks(_train, world_size, tiny_models[EXPERTS], tmp_path / "result.pt", case)
    assert_same_training(torch.load(tmp_path / "result.pt"), experts_on_one_rank)


def test_truncated_sampling_trains_the_same_on_a_sharded_vocabulary(tiny_models, tmp_path):
    for world_size, case in ((1, {"top_k": 50}), (2, {"top_k": 50, "tp": 2})):
        run_ranks(_train, world_size, tiny_models["llama"], tmp_path / f"{world_size}.pt", case)
    (one, _), (two, _) = (torch.load(tmp_path / f"{n}.pt") for n in (1, 2))
    assert two[0] == pytest.approx(one[0], rel=2e-4, abs=2e-5)


def _packed_gradient(rank: int, world_size: int, folder: Path) -> None:
    """Gradient of a weighted sum of logits: all sequences in one pack against one pack each."""
    trainer = make_trainer(folder)
    sequences = lone_sequences(9, 4, 17)

    def gradient(groups) -> dict[str, torch.Tensor]:
        trainer.stage.zero_grad(set_to_none=True)
        for parameter in trainer.stage.parameters():
            parameter.main_grad.zero_()
        for group in groups:
            logits = forward_packed(trainer.ddp, pack(group))
            (logits * torch.linspace(-1, 1, logits.shape[1])).sum().backward()
        return {name: parameter.main_grad.clone() for name, parameter in trainer.stage.named_parameters()}

    packed, alone = gradient([sequences]), gradient([[sequence] for sequence in sequences])
    for name in alone:
        assert alone[name].abs().max() > 0, name
        torch.testing.assert_close(packed[name], alone[name], rtol=1e-4, atol=1e-4 * float(alone[name].abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_no_gradient_crosses_sequences_of_a_pack(tiny_models, kind):
    run_ranks(_packed_gradient, 1, tiny_models[kind])


def _complains(message: str) -> None:
    raise AssertionError(f"ranks would not write one checkpoint: {message}")


def _unpickles(planner, read_item, value) -> None:
    raise AssertionError(f"{read_item.storage_index.fqn} is no tensor: torch would unpickle it")


def _saves_and_loads(rank: int, world_size: int, folder: Path, checkpoint: Path, case: dict, expected: Path) -> None:
    trainer = make_trainer(
        folder,
        tp=case.get("tp", 1),
        pp=case.get("pp", 1),
        ep=case.get("ep", 1),
        bf16=case.get("bf16", False),
        optimizer=OptimizerConfig(lr=1e-3, lr_decay_style="linear", use_distributed_optimizer=case.get("do", False)),
    )
    if case["save"]:
        trainer.train_step(make_batch(seed=0))
        if rank == 0:
            checkpoint.mkdir()
        trainer.parallel.barrier()
        validation.logger.warning = _complains
        trainer.optimizer_offload.to_host()  # as on a GPU that the engine has
        trainer.save(checkpoint)
        trainer.optimizer_offload.to_device()
    else:
        DefaultLoadPlanner.load_bytes = _unpickles
        trainer.load(checkpoint)
    metrics = trainer.train_step(make_batch(seed=1))
    weights = {name: tensor.clone() for name, tensor in trainer.named_hf_tensors()}
    metrics = {name: value for name, value in metrics.items() if not name.endswith("_s")}
    if rank == 0:
        if case["save"]:
            torch.save((metrics, weights), expected)
        else:
            saved_metrics, saved_weights = torch.load(expected)
            tolerance = case["tolerance"]
            assert metrics == pytest.approx(saved_metrics, rel=tolerance, abs=tolerance), (metrics, saved_metrics)
            for name, tensor in weights.items():
                torch.testing.assert_close(tensor, saved_weights[name], rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [(1, {}), (1, {"bf16": True}), (2, {"tp": 2}), (2, {"pp": 2}), (2, {"bf16": True, "do": True})],
)
def test_training_on_from_a_checkpoint_is_bit_exact(tiny_models, tmp_path, world_size, layout):
    arguments = (tiny_models["llama"], tmp_path / "checkpoint")
    run_ranks(_saves_and_loads, world_size, *arguments, {**layout, "save": True}, tmp_path / "expected.pt")
    loading = {**layout, "save": False, "tolerance": 0.0}
    run_ranks(_saves_and_loads, world_size, *arguments, loading, tmp_path / "expected.pt")


def _refuses_another_optimizer(rank: int, world_size: int, folder: Path, checkpoint: Path) -> None:
    trainer = make_trainer(folder)
    trainer.train_step(make_batch(seed=0))
    checkpoint.mkdir()
    trainer.save(checkpoint)
    common = torch.load(checkpoint / "common.pt")
    own = common["optimizer_class"]
    assert own in ("AdamW", "FusedAdam")
    torch.save(common | {"optimizer_class": "Lion"}, checkpoint / "common.pt")
    with pytest.raises(ValueError, match=f"has the state of the optimizer Lion, this run has {own}"):
        trainer.load(checkpoint)
    del common["optimizer_class"]  # a checkpoint of before it was written
    torch.save(common, checkpoint / "common.pt")
    trainer.load(checkpoint)


def test_a_checkpoint_of_another_optimizer_is_refused(tiny_models, tmp_path):
    run_ranks(_refuses_another_optimizer, 1, tiny_models["llama"], tmp_path / "checkpoint")


def test_extra_states_of_grouped_layers_are_none_of_the_tensors():
    experts = "decoder.layers.0.mlp.experts.linear_fc1"
    names = [f"{experts}.weight0", f"{experts}._extra_state", f"{experts}._extra_state12", "a._extra_state.weight"]
    assert [is_extra_state(name) for name in names] == [False, True, True, False]


def _experts_are_marked(rank: int, world_size: int, folder: Path) -> None:
    stage = make_trainer(folder, tp=2, ep=2).stage
    experts = [name for name, each in stage.named_parameters() if ".experts." in name]
    assert experts
    for name, each in stage.named_parameters():
        if name in experts:
            assert not each.allreduce, name
            assert each.tensor_model_parallel, "counted in the gradient's norm on each tensor-parallel rank"


def test_whole_experts_count_on_every_rank(tiny_models):
    run_ranks(_experts_are_marked, 2, tiny_models[EXPERTS])


@pytest.mark.parametrize("layout", [{"ep": 2}, {"ep": 2, "bf16": True, "do": True}])
def test_training_of_experts_on_from_a_checkpoint_is_bit_exact(tiny_models, tmp_path, layout):
    arguments = (tiny_models[EXPERTS], tmp_path / "checkpoint")
    run_ranks(_saves_and_loads, 2, *arguments, {**layout, "save": True}, tmp_path / "expected.pt")
    loading = {**layout, "save": False, "tolerance": 0.0}
    run_ranks(_saves_and_loads, 2, *arguments, loading, tmp_path / "expected.pt")


@pytest.mark.parametrize(
    ("kind", "saved", "loaded", "num_ranks"),
    [("llama", {"tp": 2}, {"pp": 2}, 2), (EXPERTS, {"ep": 2}, {"pp": 2, "ep": 2}, 4), (EXPERTS, {}, {"pp": 2}, 2)],
)
def test_a_checkpoint_loads_at_another_layout(tiny_models, tmp_path, kind, saved, loaded, num_ranks):
    arguments = (tiny_models[kind], tmp_path / "checkpoint")
    run_ranks(_saves_and_loads, 2, *arguments, {**saved, "save": True}, tmp_path / "expected.pt")
    loading = {**loaded, "save": False, "tolerance": 4e-4}  # as between layouts above
    run_ranks(_saves_and_loads, num_ranks, *arguments, loading, tmp_path / "expected.pt")

"""RunConfig -> components. The only file that knows all classes."""

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch

from megatron_patches import apply_patches
from tlt import parallel as process_groups
from tlt.config import (
    ModelConfig,
    OptimizerConfig,
    RolloutConfig,
    RunConfig,
    TrainingConfig,
    check,
    read_hf_config,
    require,
)
from tlt.data.prompts import PromptBuilder, PromptStream, excluded_questions, held_out_prompts
from tlt.data.source import question_key
from tlt.data.tokenizer import read_tokenizer, stop_token_ids
from tlt.drafter.history import SuffixHistory
from tlt.drafter.learner import HeadLearner
from tlt.drafter.model import EagleHead
from tlt.evaluation import Evaluation
from tlt.faults import Fault, FaultyTrace, parse_faults
from tlt.heartbeat import Heartbeat
from tlt.interrupt import Interrupt
from tlt.loop import Run
from tlt.metrics import MetricsLog
from tlt.policy.model import uses_transformer_engine
from tlt.policy.trainer import MegatronPolicyTrainer
from tlt.progress import Progress
from tlt.protocols import SpeculationMemory, TailWork
from tlt.provenance import write_run_record
from tlt.rewards.pool import RewardPool
from tlt.rl.losses import Objective, PolicyObjective
from tlt.rollout.collector import RolloutCollector
from tlt.rollout.consolidation import Consolidation, NoConsolidation
from tlt.rollout.groups import GroupSampler
from tlt.rollout.handover import HandoverBoard
from tlt.rollout.log import RolloutLog
from tlt.rollout.outlook import NoOutlook, Outlook
from tlt.rollout.vllm.cost_profile import asks_prices, measure_costs
from tlt.rollout.vllm.engine import VLLMRolloutEngine
from tlt.rollout.vllm.engine_args import parse_engine_args
from tlt.rollout.vllm.graph_check import check_graphs
from tlt.rollout.vllm.learned_drafter import shapes
from tlt.rollout.vllm.speculation import LEARNED, read_spec_plan
from tlt.run_state import (
    Checkpoints,
    RunState,
    complete_checkpoints,
    latest_checkpoint,
    read_history,
    read_speculation,
    read_state,
    read_tail_state,
    shared_folder,
)
from tlt.spot.board import TailBoard
from tlt.spot.training import NoSpotTraining, SpotTraining
from tlt.trace import Trace
from tlt.types import Prompt, SamplingConfig
from tlt.weight_sync.gather import PolicyWeights, weight_files
from tlt.weight_sync.sync import StreamedWeightSync

logger = logging.getLogger(__name__)

HEARTBEAT_SHARE = 0.8
"""Of a collective's time-out, which does not know who is missing: the heartbeat, which does, is to come first."""


class Inputs:
    """All that a run reads, checked before any process group or engine exists; equal on all ranks.

    Raises ValueError naming the flag or file.
    """

    def __init__(self, config: RunConfig, *, world_size: int, ranks_per_node: int):
        training, rollout = config.training, config.rollout
        self.hf_config = read_hf_config(config.model.hf_model)
        check(config, world_size=world_size, ranks_per_node=ranks_per_node, hf_config=self.hf_config)
        folder = Path(config.model.hf_model)
        if not training.dry_run:  # whose directory may have no weights yet
            require(bool(weight_files(folder)), "--hf-model", str(folder), "a directory with *.safetensors files")
        self.tokenizer = read_tokenizer(folder)
        context = rollout.max_model_len or self.hf_config["max_position_embeddings"]
        builder = PromptBuilder(
            config.data, tokenizer=self.tokenizer, max_prompt_tokens=context - rollout.max_response_tokens
        )
        excluded = excluded_questions(config.data.exclude or ())
        self.held_out: list[Prompt] = []
        if config.eval.num_prompts > 0:
            self.held_out = held_out_prompts(
                config.eval, config.data, builder, seed=training.seed, excluded=excluded
            )  # fmt: skip
        excluded |= {question_key(prompt.text) for prompt in self.held_out}
        self.prompts = PromptStream(config.data, builder, seed=training.seed, excluded=excluded)
        begin = self.prompts.state_dict()
        first = self.prompts.next_batch(config.rl.prompts_per_iteration)  # a prompt that is too long shows now
        self.prompts.load_state_dict(begin)
        logger.info("first prompt: %r", first[0].text)
        self.stop_token_ids = stop_token_ids(folder, self.hf_config, self.tokenizer)
        parse_engine_args(rollout.engine_args)
        self.spec = read_spec_plan(
            config.spec, target_config=self.hf_config, dtype=torch.bfloat16 if config.model.bf16 else torch.float32,
            tp_size=rollout.tensor_parallel_size, is_trained=config.spot.training == "on",
        )  # fmt: skip
        self.faults = parse_faults(training.fault or (), world_size=world_size)
        self.checkpoint = find_checkpoint(config)
        self.tail_state: dict = {}
        self.learned: dict = {}
        """Of speculation, by the run that is resumed."""
        self.state = RunState(fingerprint=fingerprint(config), prompt_stream=self.prompts.state_dict())
        if self.checkpoint is not None:
            self.state = read_state(self.checkpoint, fingerprint(config))
            self.prompts.load_state_dict(self.state.prompt_stream)
            self.learned = read_speculation(self.checkpoint)
            if config.spot.training == "on":
                self.tail_state = read_tail_state(self.checkpoint)
                check_saved_head(self.tail_state, self.spec.heads, load=config.training.load)


def fingerprint(config: RunConfig) -> dict:
    """Settings that a resumed run shares with the one that saved."""
    data = config.data
    return {
        "--seed": config.training.seed,
        "--data-train": list(data.train),
        "--data-weights": None if data.weights is None else list(data.weights),
        "--data-instruction": data.instruction,
        "--data-exclude": list(data.exclude or ()),
        "--data-chat-template": data.chat_template,
        "--data-max-rejected": data.max_rejected,
        "--eval-sources": list(config.eval.sources or ()),
        "--eval-num-prompts": config.eval.num_prompts,
    }


def check_saved_head(tail_state: Mapping, heads: Mapping[str, EagleHead], *, load: str) -> None:
    """Raises ValueError where a checkpoint's head is of another shape than the one whose place it takes."""
    if tail_state:
        saved, given = shapes(tail_state["live"]), shapes(dict(heads[LEARNED].named_parameters()))
        require(saved == given, "--spec-drafter", given, f"of the shape of the head that --load {load} holds, {saved}")


def find_checkpoint(config: RunConfig) -> Path | None:
    """Checkpoint to resume from. Raises ValueError where --save already holds a run that is not resumed."""
    training = config.training
    found = latest_checkpoint(Path(training.load)) if training.load else None
    if training.load and found is None:
        logger.warning("--load %s holds no complete checkpoint: starting from --hf-model", training.load)
    save = Path(training.save)
    require(not save.exists() or save.is_dir(), "--save", training.save, "a folder")
    if complete_checkpoints(save) and (training.load is None or Path(training.load).resolve() != save.resolve()):
        raise ValueError(f"--save {save} already holds a run: resume it with --load {save}, or choose another folder")
    return found


def build(config: RunConfig, inputs: Inputs) -> Run:
    """Make every component, in the order in which they need each other. Collective over all ranks; all must call."""
    interrupt = Interrupt()
    interrupt.install()
    patches = apply_patches()
    parallel = process_groups.initialize(
        config.model, timeout=timedelta(minutes=config.training.distributed_timeout_minutes)
    )
    save = shared_folder(Path(config.training.save), parallel)
    trace = build_trace(save, inputs.faults, parallel)
    heartbeat = build_heartbeat(config.training, parallel, trace)
    if parallel.rank == 0:
        write_run_record(save, config, patches=patches, world_size=parallel.world_size)

    sampling = training_distribution(config.rollout)
    rewards = RewardPool(config.reward)
    history = SuffixHistory(config.spec.history_mib * 2**20)
    if inputs.checkpoint is not None:
        read_history(inputs.checkpoint, history)
    board = build_board(config.rollout, parallel)
    with trace.span("build_engine"):
        engine = build_engine(config, inputs, interrupt, history, board, parallel)
        tail = build_tail_work(config, engine, parallel, board, interrupt=interrupt, trace=trace)
        engine.sleep()
    with trace.span("build_policy"):
        trainer = build_policy_trainer(
            inputs.hf_config, config.model, config.optimizer, parallel, objective=PolicyObjective(config.rl),
            sampling=sampling, train_iters=config.training.train_iters, trace=trace,
        )  # fmt: skip
        if inputs.checkpoint is not None:
            trainer.load(inputs.checkpoint)
            logger.info("resumed from %s", inputs.checkpoint)

    tail.load_state_dict(inputs.tail_state)
    engine.speculation.load_state_dict(inputs.learned)  # after the head, whose loading casts doubt on what it is worth
    collector = partial(
        RolloutCollector, engine, rewards, parallel, history=history, interrupt=interrupt, trace=trace
    )  # fmt: skip
    rollouts = collector(tail=tail)
    training = config.training
    log = RolloutLog(save / "rollouts", interval=config.rollout.save_interval, is_writer=parallel.rank == 0)
    evaluation = Evaluation(
        inputs.held_out, collector(tail=NoSpotTraining()), sampling=sampling, num_samples=config.eval.num_samples,
        rollout_log=log, interval=config.eval.interval, train_iters=training.train_iters,
    )  # fmt: skip
    checkpoints = build_checkpoints(
        training, trainer, parallel, history=history, tail=tail, speculation=engine.speculation, trace=trace,
        resumed_iteration=inputs.state.iteration,
    )  # fmt: skip
    return Run(
        config=config,
        parallel=parallel,
        prompts=inputs.prompts,
        sampling=sampling,
        rollout_engine=engine,
        rollouts=rollouts,
        group_sampler=GroupSampler(inputs.prompts, rollouts, sampling, rl=config.rl, seed=training.seed),
        rollout_log=log,
        policy_trainer=trainer,
        weight_sync=StreamedWeightSync(trainer, engine, trace=trace),
        evaluation=evaluation,
        checkpoints=checkpoints,
        metrics=build_metrics_log(training, inputs.state, parallel),
        trace=trace,
        interrupt=interrupt,
        heartbeat=heartbeat,
        progress=Progress(is_shown=parallel.rank == 0),
        state=inputs.state,
    )


def training_distribution(rollout: RolloutConfig) -> SamplingConfig:
    """What responses are sampled from and trained on."""
    return SamplingConfig(
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        max_response_tokens=rollout.max_response_tokens,
    )


def build_trace(save: Path, faults: Sequence[Fault], parallel: process_groups.Parallel) -> Trace:
    """The run's trace, which is where things go wrong on request."""
    folder, rank = save / "trace", parallel.rank
    return FaultyTrace(folder, rank, faults) if faults else Trace(folder, rank)


def build_board(rollout: RolloutConfig, parallel: process_groups.Parallel) -> TailBoard:
    """On the job's own store."""
    store = torch.distributed.distributed_c10d._get_default_store()
    return TailBoard(
        store, rank=parallel.rank, world_size=parallel.world_size, replica_size=rollout.tensor_parallel_size
    )  # fmt: skip


def build_heartbeat(training: TrainingConfig, parallel: process_groups.Parallel, trace: Trace) -> Heartbeat:
    """Begins at once: building the engine is a wait for others, too."""
    heartbeat = Heartbeat(
        torch.distributed.distributed_c10d._get_default_store(), rank=parallel.rank, world_size=parallel.world_size,
        deadline_s=60 * training.distributed_timeout_minutes * HEARTBEAT_SHARE, where=trace.where,
        stacks=Path(training.save) / "trace" / f"stacks{parallel.rank}.txt",
    )  # fmt: skip
    heartbeat.start()
    return heartbeat


def build_metrics_log(training: TrainingConfig, state: RunState, parallel: process_groups.Parallel) -> MetricsLog:
    """Written by rank 0."""
    save = Path(training.save)
    return MetricsLog(
        save,
        tensorboard_dir=Path(training.tensorboard_dir or save / "tensorboard"),
        is_writer=parallel.rank == 0,
        resumed_iteration=state.iteration,
    )


def build_checkpoints(
    training: TrainingConfig, trainer: MegatronPolicyTrainer, parallel: process_groups.Parallel, *,
    history: SuffixHistory, tail: TailWork, speculation: SpeculationMemory, trace: Trace, resumed_iteration: int,
) -> Checkpoints:  # fmt: skip
    """Of the run in --save."""
    return Checkpoints(
        Path(training.save),
        trainer=trainer,
        parallel=parallel,
        history=history,
        tail=tail,
        speculation=speculation,
        trace=trace,
        interval=training.save_interval,
        retain=training.save_retain,
        train_iters=training.train_iters,
        resumed_iteration=resumed_iteration,
    )


def build_engine(
    config: RunConfig, inputs: Inputs, interrupt: Interrupt, history: SuffixHistory, board: TailBoard,
    parallel: process_groups.Parallel,
) -> VLLMRolloutEngine:  # fmt: skip
    """This rank's engine. Collective over all ranks; all must call."""
    is_told, is_consolidated = config.spot.training == "on", config.rollout.consolidate_tail == "on"
    outlook: Outlook | NoOutlook = NoOutlook()
    if is_told or is_consolidated:
        outlook = Outlook(history, board.tell_remaining if is_told else lambda seconds: None)
    consolidation: Consolidation | NoConsolidation = NoConsolidation()
    if is_consolidated:
        handover = HandoverBoard(board.store, replica=board.replica, num_replicas=board.num_replicas)
        is_leader = board.rank % board.replica_size == 0
        consolidation = Consolidation(handover, outlook, is_replica_leader=is_leader)
    engine = VLLMRolloutEngine(
        config.rollout,
        hf_model=config.model.hf_model,
        dtype="bfloat16" if config.model.bf16 else "float32",
        seed=config.training.seed,
        stop_token_ids=inputs.stop_token_ids,
        decode=inputs.tokenizer.decode,
        should_stop=interrupt.is_requested,
        spec=inputs.spec,
        history=history,
        outlook=outlook,
        consolidation=consolidation,
    )
    if engine.on_gpu and inputs.spec.max_draft_tokens > 0 and not config.rollout.enforce_eager:
        check_graphs(engine, seed=config.training.seed, is_any=parallel.any)
    if config.spec.startup_profile == "on" and not inputs.learned and asks_prices(inputs.spec.policy):
        measure_costs(engine, temperature=config.rollout.temperature, seed=config.training.seed)
    return engine


def build_tail_work(
    config: RunConfig, engine: VLLMRolloutEngine, parallel: process_groups.Parallel, board: TailBoard, *,
    interrupt: Interrupt, trace: Trace,
) -> TailWork:  # fmt: skip
    """What ranks do while others still decode. Reads weights of the engine, which must be awake."""
    if config.spot.training == "off":
        return NoSpotTraining()
    head = copy.deepcopy(engine.speculation.learned.head).cpu()
    learner = HeadLearner(
        head,
        replace(
            config.drafter, lr=config.spot.lr, min_lr_frac=1.0, warmup_steps=config.spot.warmup_steps,
            ema_decay=config.spot.ema_decay,
        ),
        target=engine.drafter_target, temperature=config.rollout.temperature,
        seed=config.training.seed + parallel.rank,
    )  # fmt: skip
    return SpotTraining(
        learner, engine, board, parallel, config=config.spot, is_stopped=interrupt.is_requested, trace=trace
    )


def build_policy_trainer(
    hf_config: dict, model: ModelConfig, optimizer: OptimizerConfig, parallel: process_groups.Parallel, *,
    objective: Objective, sampling: SamplingConfig, train_iters: int, trace: Trace,
) -> MegatronPolicyTrainer:  # fmt: skip
    """The trainer, with the weights of --hf-model and its Hugging Face names."""

    def weights(stage: torch.nn.Module) -> PolicyWeights:
        return PolicyWeights(stage, hf_config, parallel, transformer_engine=uses_transformer_engine(model))

    return MegatronPolicyTrainer(
        hf_config=hf_config,
        model=model,
        optimizer=optimizer,
        objective=objective,
        sampling=sampling,
        parallel=parallel,
        train_iters=train_iters,
        trace=trace,
        fill=lambda stage: weights(stage).load(Path(model.hf_model)),
        hf_tensors=lambda stage: weights(stage).hf_tensors(),
    )


def close(run: Run) -> None:
    """End what outlives the training loop, whose heartbeat has ended: scoring processes, engine, files."""
    run.parallel.barrier()  # the rank that hosts the store is not the first to go
    run.rollouts.rewards.close()
    run.metrics.close()
    run.trace.close()
    run.rollout_engine.close()  # last: it takes torch.distributed down with it

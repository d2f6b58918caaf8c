"""RolloutEngine on vLLM: one in-process engine per rank, tensor-parallel over neighbouring ranks of the torchrun
world."""

import logging
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from tlt.config import RolloutConfig, read_hf_config
from tlt.config.architecture import experts_of
from tlt.drafter.history import SuffixHistory
from tlt.protocols import OnFinished, RolloutInterrupted
from tlt.rollout.consolidation import Consolidation, NoConsolidation
from tlt.rollout.outlook import NoOutlook, Outlook
from tlt.rollout.placement import longest_first, place_groups
from tlt.rollout.resources import give_back_memory
from tlt.rollout.vllm import experts, readback, shared_memory
from tlt.rollout.vllm.drafting import speculative_config
from tlt.rollout.vllm.engine_args import parse_engine_args
from tlt.rollout.vllm.graph_check import keep_one_schedule
from tlt.rollout.vllm.requests import Requests
from tlt.rollout.vllm.sampling import PositionSampler
from tlt.rollout.vllm.speculation import SpecPlan, make_speculation
from tlt.rollout.vllm.target_weights import EMBEDDING
from tlt.spec.graph_plan import capture_sizes
from tlt.types import EngineStats, HiddenStateSample, Prompt, Rollout, RolloutGroup, SamplingConfig, rollout_name

logger = logging.getLogger(__name__)

STOP_CHECK_STEPS = 8
"""Engine steps between two agreements of a replica's ranks on whether to stop."""
SYNCS_PER_FULL_CHECK = 8
"""Each weight sync reads back the embedding and one weight in this many, another share each time."""


def set_engine_environment(config: RolloutConfig) -> None:
    """What vLLM reads from the environment when it is imported; the user's own settings win."""
    for name, value in {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # engine, scheduler and worker in this process
        "VLLM_CPU_KVCACHE_SPACE": str(config.kv_cache_gib),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # ranks share a machine's cores
        "VLLM_USE_V2_MODEL_RUNNER": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "NUMBA_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }.items():
        os.environ.setdefault(name, value)


def graph_settings(config: RolloutConfig, spec: SpecPlan, given: dict) -> dict:
    """vLLM's compilation config on a GPU; of each setting the user's own choice (`given`) wins. Raises ValueError."""
    sizes = capture_sizes(spec.policy, max_num_seqs=config.max_num_seqs)
    # Drafts of different lengths leave vLLM's graphs of even decode steps; full ones of any step need no compiler.
    graphs = {"mode": 0, "cudagraph_mode": "FULL", "cudagraph_capture_sizes": sizes} if sizes else {}
    graphs |= given
    if graphs.get("cudagraph_mode") == "PIECEWISE" and graphs.get("mode") in (0, "NONE"):
        raise ValueError('--rollout-engine-args: compilation_config with piecewise graphs needs "mode": 3')
    if spec.aux_layers and not config.enforce_eager and graphs.get("mode") not in (0, "NONE"):
        # vLLM decides what a compiled model gives out before its speculation is installed here.
        raise ValueError(
            "--spec-drafter: on a GPU a head that reads three layers needs --rollout-enforce-eager, or "
            'compilation_config {"mode": 0} in --rollout-engine-args'
        )
    return graphs


class VLLMRolloutEngine:
    """Engine of this rank's replica; torch.distributed must be initialised, and all ranks build theirs together."""

    def __init__(
        self, config: RolloutConfig, *, hf_model: str, dtype: str, seed: int, stop_token_ids: Sequence[int],
        decode: Callable[[Sequence[int]], str], should_stop: Callable[[], bool], spec: SpecPlan,
        history: SuffixHistory, outlook: Outlook | NoOutlook, consolidation: Consolidation | NoConsolidation,
    ):  # fmt: skip
        set_engine_environment(config)
        from vllm import LLM

        self.config = config
        self.history = history
        self.outlook = outlook
        self.consolidation = consolidation
        self.should_stop = should_stop
        self.tp_size = config.tensor_parallel_size
        rank, world_size = dist.get_rank(), dist.get_world_size()
        self.num_replicas = world_size // self.tp_size
        self.replica, self.tp_rank = divmod(rank, self.tp_size)
        self.is_replica_leader = self.tp_rank == 0
        self.replica_group = self._make_replica_group() if self.tp_size > 1 else None

        self.on_gpu = torch.cuda.is_available()
        given = parse_engine_args(config.engine_args)
        graphs = given.pop("compilation_config", {})
        if self.on_gpu:
            graphs = graph_settings(config, spec, graphs)
            has_experts = experts_of(read_hf_config(hf_model)) is not None
            if has_experts and "moe_backend" not in given.get("kernel_config", {}):
                # Other kernels permute the experts' weights: no read-back would find what was sent (experts.py).
                given = {"moe_backend": "triton"} | given
        if self.tp_size > 1 and not self.on_gpu:
            shared_memory.name_after(self._agree(secrets.token_hex(8)))
        num_threads = torch.get_num_threads()
        self.llm = LLM(
            model=hf_model,
            dtype=dtype,
            seed=seed,
            tensor_parallel_size=self.tp_size,
            distributed_executor_backend="external_launcher",
            max_model_len=config.max_model_len,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            num_gpu_blocks_override=config.num_gpu_blocks_override,
            gpu_memory_utilization=config.gpu_memory_utilization,
            enforce_eager=config.enforce_eager or not self.on_gpu,
            enable_sleep_mode=self.on_gpu,
            enable_prefix_caching=True,
            async_scheduling=False,  # the strategy of an engine step is decided between steps
            logprobs_mode="processed_logprobs",
            disable_log_stats=True,
            speculative_config=speculative_config(spec.max_draft_tokens),
            compilation_config=graphs or None,
            **given,
        )
        torch.set_num_threads(num_threads)
        self.engine = self.llm.llm_engine
        self.scheduler = self.engine.engine_core.engine_core.scheduler
        self.runner = self.engine.model_executor.driver_worker.worker.model_runner
        keep_one_schedule(self.runner)
        self.speculation = make_speculation(
            spec, self.runner, self.scheduler, agree=self._agree, hf_model=hf_model, history=history
        )  # fmt: skip
        self.sampler = PositionSampler(self.runner, self.speculation.ledger)
        self.requests = Requests(
            self.engine, self.scheduler, self.speculation.ledger, stop_token_ids=stop_token_ids, decode=decode,
            replica=self.replica,
        )  # fmt: skip
        self.policy_version = -1
        self.is_asleep = False
        self._stats = EngineStats()

    def _make_replica_group(self) -> dist.ProcessGroup:
        """Gloo group of this replica's ranks. Collective over all ranks: each creates every group."""
        groups = [
            dist.new_group(list(range(first, first + self.tp_size)), backend="gloo")
            for first in range(0, dist.get_world_size(), self.tp_size)
        ]
        return groups[self.replica]

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingConfig,
        *,
        group_size: int,
        seed: int,
        on_finished: OnFinished,
    ) -> list[RolloutGroup]:
        """Groups of the prompts placed on this replica, in the order of `prompts`; where responses move between
        replicas, of all those that ended on this one, a group of each of their prompts.

        A response is a function of the weights, its prompt and its seed, up to rounding that depends on the batch.
        Raises RolloutInterrupted on all ranks of the replica when told to stop. Collective over the replica's ranks.
        """
        if self.is_asleep:
            raise RuntimeError("generate was called while the engine sleeps; call wake and load_weights before")
        lengths = [self.history.expected_length(prompt.problem_key) for prompt in prompts]
        replicas = place_groups(lengths, self.num_replicas)
        begin_s = time.perf_counter()
        self._stats = EngineStats()
        self.speculation.begin(prompts)
        self.outlook.begin(prompts, max_response_tokens=sampling.max_response_tokens)
        self.consolidation.begin()
        self.requests.begin(prompts, sampling, group_size=group_size, seed=seed, policy_version=self.policy_version)
        for index in longest_first(lengths):
            if replicas[index] == self.replica:
                for sample in range(group_size):
                    self.requests.add(rollout_name(prompts[index].prompt_id, sample))

        finished: dict[str, Rollout] = {}
        for output in self._run():
            prompt, sample = self.requests.named[output.request_id]
            rollout = self.requests.finished(output, drafter_version=self.speculation.drafter_version)
            self.speculation.finished(
                output.request_id, [*prompt.token_ids, *rollout.token_ids],
                num_prompt_tokens=len(prompt.token_ids), policy_version=self.policy_version,
                # Greedy text is not what a drafter is trained for. The ranks of a replica have the same responses:
                # each learns from a part of them.
                is_learned_from=(
                    sampling.temperature > 0 and sampling.is_learned_from and sample % self.tp_size == self.tp_rank
                ),
            )  # fmt: skip
            finished[output.request_id] = rollout
            if self.is_replica_leader:
                on_finished(prompt, sample, rollout)
        self._stats.num_response_tokens = sum(len(rollout.token_ids) for rollout in finished.values())
        self._stats.rollout_s = time.perf_counter() - begin_s
        self.speculation.report(self._stats)
        self._stats.num_adopted = self.consolidation.num_adopted
        return self.requests.groups(finished)

    def _run(self) -> Iterator:
        """Finished outputs as they come, until this replica has nothing left and gets nothing of others."""
        try:
            yield from self._steps()
            while self.consolidation.adopts(self.requests, should_stop=self.should_stop, agree=self._agree):
                yield from self._steps()
        finally:
            self.consolidation.end()

    def _steps(self) -> Iterator:
        """Engine steps until no request is left; finished outputs as they come."""
        preempted: set[str] = set()
        while self.engine.has_unfinished_requests():
            if self._agree_to_stop():
                self.requests.abort()
                self.engine.step()  # lets the scheduler free them
                raise RolloutInterrupted
            num_running = min(self.scheduler.get_num_unfinished_requests(), self.config.max_num_seqs)
            self.speculation.before_step(num_running)
            self.consolidation.before_step(self.requests)
            self._stats.step_begin_s.append(time.time())
            begin_s = time.perf_counter()
            outputs = self.engine.step()
            self._stats.step_s.append(time.perf_counter() - begin_s)
            self.speculation.after_step(self._stats.step_s[-1])
            self._stats.num_engine_steps += 1
            self._stats.running_requests.append(len(self.scheduler.running))
            verified = self.speculation.ledger.take_step()
            self._stats.step_drafts.append(verified.num_drafts)
            self._stats.step_accepted.append(sum(verified.accepted))
            waiting = {request.request_id for request in self.scheduler.waiting if request.status.name == "PREEMPTED"}
            self._stats.num_preemptions += len(waiting - preempted)
            preempted = waiting
            self.outlook.after_step(self.requests.lengths, time.perf_counter())
            yield from (output for output in outputs if output.finished)
            self.consolidation.after_step(
                self.requests, num_running=num_running, seconds=self._stats.step_s[-1], agree=self._agree
            )

    def _agree(self, value: Any) -> Any:
        """The first rank's value (a strategy, or drafts), on all ranks of the replica."""
        if self.replica_group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=self.replica * self.tp_size, group=self.replica_group)
        return box[0]

    def _agree_to_stop(self) -> bool:
        """Whether the replica's first rank was told to stop; asked every few steps so that all leave together."""
        if self.replica_group is None:
            return self.should_stop()
        if self._stats.num_engine_steps % STOP_CHECK_STEPS:
            return False
        flag = torch.tensor(int(self.should_stop()))
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.replica_group)
        return bool(flag)

    def load_drafter(self, tensors: Mapping[str, torch.Tensor], *, drafter_version: int) -> None:
        """Swap the learned drafter's weights in place, between two engine steps; text is not affected.

        All ranks of the replica must call with the same tensors.
        """
        self.speculation.load_drafter(tensors, version=drafter_version)

    @property
    def drafter_version(self) -> int:
        """Of the learned drafter that follows the policy; -1 without one."""
        return self.speculation.drafter_version

    def drafter_tensors(self) -> dict[str, torch.Tensor]:
        """Copies of its weights, on the CPU. RuntimeError without one."""
        return self.speculation.drafter_tensors()

    def drafter_target(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(embedding [V, H], output rows [V_draft, H]) of the policy that the drafter works with, as they are now.

        RuntimeError unless the plan says that it is trained."""
        return self.speculation.drafter_target()

    def hidden_state_samples(self) -> list[HiddenStateSample]:
        """What the buffer of this rank holds, oldest first."""
        return self.speculation.hidden_state_samples()

    def training_samples(self, *, seed: int) -> list[HiddenStateSample]:
        """A function of the buffer and the seed (`HiddenStateBuffer.training_samples`)."""
        return self.speculation.training_samples(seed=seed)

    def load_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]], *, policy_version: int) -> None:
        """Replace the target model's weights from full tensors under Hugging Face names, consumed as a stream.

        A share of them is read back from the live engine and compared bit for bit; RuntimeError where one differs.
        Cached prefixes of the old weights are dropped. Collective over the replica's ranks.
        """
        sample: dict[str, readback.OwnPart] = {}

        def stream() -> Iterator[tuple[str, torch.Tensor]]:
            for index, (name, tensor) in enumerate(named_tensors):
                if name == EMBEDDING or (index + policy_version) % SYNCS_PER_FULL_CHECK == 0:
                    sample.update(self._own_parts(name, tensor))
                self.speculation.renew_target(name, tensor)
                yield name, tensor

        num_threads = torch.get_num_threads()
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": stream()})
        torch.set_num_threads(num_threads)
        self._renew_tied_output_layer()
        experts.pack_again(self.runner.get_model())
        if not self.engine.reset_prefix_cache():
            raise RuntimeError("the engine still holds blocks of unfinished requests: its prefix cache was not reset")
        self._check_parts(sample)
        self.policy_version = policy_version

    def _own_parts(self, name: str, sent: torch.Tensor) -> dict[str, readback.OwnPart]:
        """What this rank's engine is to hold of a full tensor, by the name that it has there; a tied embedding has
        two."""
        model = self.runner.get_model()
        is_tied = model.config.tie_word_embeddings and name == EMBEDDING
        return {
            each: readback.own_part(model, each, sent, tp_rank=self.tp_rank, tp_size=self.tp_size)
            for each in ((name, "lm_head.weight") if is_tied else (name,))
        }

    @torch.inference_mode()
    def _renew_tied_output_layer(self) -> None:
        """vLLM's reload skips a tied output layer, which on CPU computes with a packed copy of the old embedding."""
        model = self.runner.get_model()
        if model.config.tie_word_embeddings:
            model.lm_head.weight = model.model.embed_tokens.weight
            model.lm_head.quant_method.process_weights_after_loading(model.lm_head)

    def check_weights(self, sent: dict[str, torch.Tensor]) -> None:
        """Raise RuntimeError where the live engine's part of a weight is not what was sent."""
        self._check_parts({k: v for name, tensor in sent.items() for k, v in self._own_parts(name, tensor).items()})

    @torch.inference_mode()
    def _check_parts(self, parts: dict[str, readback.OwnPart]) -> None:
        model = self.runner.get_model()
        errors = [readback.mismatch(model, name, part) for name, part in parts.items()]
        errors = [error for error in errors if error]
        if errors:
            raise RuntimeError(f"after the weight sync the engine holds other values than the policy: {errors}")

    def sleep(self) -> None:
        """Free weights and KV cache on GPU (the next sync sends all weights); a CPU shares one memory: nothing moves
        there, and what is unused goes back to the machine."""
        if self.on_gpu and not self.is_asleep:
            self.llm.sleep(level=2)
        give_back_memory()
        self.is_asleep = True

    def wake(self) -> None:
        """Allocate weights and KV cache again on GPU; `load_weights` must follow before `generate`."""
        if self.on_gpu and self.is_asleep:
            self.llm.wake_up()
        self.is_asleep = False

    def stats(self) -> EngineStats:
        """What the last `generate` did."""
        return self._stats

    def close(self) -> None:
        """End the engine while its process groups still exist; it would do so at exit, when they are gone."""
        self.engine.engine_core.shutdown()

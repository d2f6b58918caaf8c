"""PolicyTrainer on Megatron: old and reference logprobs, then the optimizer steps of one iteration."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func

from tlt.config import ModelConfig, OptimizerConfig
from tlt.metrics import MetricSums, reduce_metrics, token_sums
from tlt.parallel import Parallel
from tlt.policy.checkpoint import load_policy, save_policy
from tlt.policy.model import build_policy_model, forward_packed
from tlt.policy.offload import OptimizerOffload
from tlt.policy.optimizer import build_optimizer
from tlt.policy.refusal import StepRefusal
from tlt.rl.logprobs import LogprobOutputs, vocab_parallel_logprobs
from tlt.rl.losses import Objective
from tlt.rl.packing import pack, pack_train_step
from tlt.trace import Trace
from tlt.types import PackedMicroBatch, SamplingConfig, TrainBatch, TrainSequence

logger = logging.getLogger(__name__)


def peak_memory(device: torch.device) -> dict[str, float]:
    """GiB of this rank's GPU that torch gave out at once since the last call, the engine's part included even while it
    sleeps and holds none; nothing on a CPU."""
    if device.type != "cuda":
        return {}
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return {"policy/gpu_peak_gib": peak / 2**30}


class MegatronPolicyTrainer:
    """Trains one Megatron model; `hf_tensors` names its weights, `fill` loads a stage's initial weights."""

    def __init__(
        self, *, hf_config: dict, model: ModelConfig, optimizer: OptimizerConfig, objective: Objective,
        sampling: SamplingConfig, parallel: Parallel, train_iters: int, trace: Trace,
        fill: Callable[[torch.nn.Module], None],
        hf_tensors: Callable[[torch.nn.Module], Iterator[tuple[str, torch.Tensor]]],
    ):  # fmt: skip
        self.model_config = model
        self.objective = objective
        self.sampling = sampling
        self.parallel = parallel
        self.trace = trace
        self._hf_tensors = hf_tensors

        self.stage = build_policy_model(hf_config, model, parallel)
        fill(self.stage)
        self.config = self.stage.config
        self.ddp = DistributedDataParallel(
            self.config,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                use_distributed_optimizer=optimizer.use_distributed_optimizer,
                overlap_grad_reduce=optimizer.overlap_grad_reduce,
                overlap_param_gather=optimizer.overlap_param_gather,
                check_for_nan_in_grad=False,  # StepRefusal looks, and all ranks hear: this one would raise on one
            ),
            self.stage,
        )
        self.gathers_late = optimizer.overlap_param_gather
        self.optimizer, self.scheduler = build_optimizer(
            self.ddp,
            optimizer,
            bf16=model.bf16,
            steps_per_iteration=objective.steps_per_iteration,
            train_iters=train_iters,
        )
        self.optimizer_offload = OptimizerOffload(self.optimizer, self.stage, parallel.device)
        self.refusal = StepRefusal(
            max_logprob_diff=objective.max_logprob_diff, max_in_a_row=optimizer.max_skipped_steps
        )
        self.config.grad_scale_func = self.optimizer.scale_loss
        self.config.finalize_model_grads_func = finalize_model_grads
        self.config.no_sync_func = self.ddp.no_sync
        self.reference = None
        if objective.uses_reference:
            self.reference = build_policy_model(hf_config, model, parallel).eval().requires_grad_(False)
            fill(self.reference)
        self.is_offloaded = False

    def train_step(self, batch: TrainBatch) -> dict[str, float]:
        """Old (and reference) logprobs of the sequences, then each optimizer step; metrics equal on all ranks.

        Collective over all ranks; all must call.
        """
        self.onload()
        steps = [self._micro_batches(sequences) for sequences in batch.optimizer_steps]
        begin_s = time.perf_counter()
        if len(steps) > 1:  # the first step's own forward pass gives its sequences', bit for bit
            with self.trace.span("old_logprobs"):
                for micro_batch, outputs in self._forward_only(self.ddp, sum(steps[1:], [])):
                    micro_batch.old_logprobs = outputs.logprobs
        if self.reference is not None:
            with self.trace.span("ref_logprobs"):
                for micro_batch, outputs in self._forward_only(self.reference, sum(steps, [])):
                    micro_batch.ref_logprobs = outputs.logprobs
        logprobs_s = time.perf_counter() - begin_s

        total, grad_norms = MetricSums(), []  # a norm of each step that was taken
        with self.trace.span("update"):
            for micro_batches in steps:
                metrics, grad_norm = self._optimizer_step(micro_batches)
                total.add(metrics)
                if grad_norm is not None:
                    grad_norms.append(grad_norm)
            if self.gathers_late:  # whoever reads the weights next has no forward pass to wait in
                self.ddp.start_param_sync(force_sync=True)
        metrics = {f"policy/{name}": value for name, value in self._reduce(total).items()}
        metrics["policy/grad_norm"] = sum(grad_norms) / len(grad_norms) if grad_norms else 0.0
        metrics["policy/lr"] = self.optimizer.param_groups[0]["lr"]
        metrics["policy/optimizer_steps"] = float(len(steps))
        metrics["policy/skipped_steps"] = float(len(steps) - len(grad_norms))
        metrics |= peak_memory(self.parallel.device)
        metrics["policy/logprobs_s"] = logprobs_s
        metrics["policy/update_s"] = time.perf_counter() - begin_s - logprobs_s
        return metrics

    def evaluate(self, sequences: Sequence[TrainSequence]) -> dict[str, float]:
        """Mean negative log-likelihood, entropy and probability of the best token over the response tokens.

        Collective over all ranks; all must call.
        """
        self.onload()
        own = MetricSums()
        for _, outputs in self._forward_only(self.ddp, self._micro_batches(tuple(sequences))):
            if self.parallel.tp_rank == 0:
                own.add(token_sums(nll=-outputs.logprobs, entropy=outputs.entropy, max_prob=outputs.max_prob))
        return self._reduce(own)

    def _micro_batches(self, sequences: tuple[TrainSequence, ...]) -> list[PackedMicroBatch]:
        """This data-parallel rank's share of one optimizer step."""
        layout = pack_train_step(
            sequences, dp_size=self.parallel.dp_size, max_tokens=self.model_config.max_tokens_per_micro_batch
        )
        multiple = self.parallel.tp_size if self.model_config.sequence_parallel else 1
        return [
            pack([sequences[index] for index in indices], device=self.parallel.device, multiple=multiple)
            for indices in layout[self.parallel.dp_rank]
        ]

    def _outputs(self, logits: torch.Tensor, micro_batch: PackedMicroBatch) -> LogprobOutputs:
        """Of the distribution that the engine sampled from: temperature, top-k and top-p applied."""
        return vocab_parallel_logprobs(
            logits,
            micro_batch.targets,
            temperature=self.sampling.temperature,
            top_p=self.sampling.top_p,
            top_k=self.sampling.top_k,
            group=parallel_state.get_tensor_model_parallel_group() if self.parallel.tp_size > 1 else None,
        )

    def _run(
        self, model: torch.nn.Module, micro_batches: list[PackedMicroBatch], loss: Callable, *, forward_only: bool
    ) -> list:
        """Megatron's schedule over packed micro-batches; what `loss` reports of each, on the last stage."""

        def forward_step(batches: Iterator[PackedMicroBatch], stage: torch.nn.Module) -> tuple[torch.Tensor, Callable]:
            micro_batch = next(batches)
            return forward_packed(stage, micro_batch), partial(loss, micro_batch)

        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(micro_batches),
            model=[model],
            num_microbatches=len(micro_batches),
            seq_length=self.model_config.max_tokens_per_micro_batch,  # ignored: lengths are variable
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )

    def _forward_only(
        self, model: torch.nn.Module, micro_batches: list[PackedMicroBatch]
    ) -> Iterator[tuple[PackedMicroBatch, LogprobOutputs]]:
        """Logprobs under `model` of each micro-batch, on the last stage; nothing on the others."""

        def outputs(micro_batch: PackedMicroBatch, logits: torch.Tensor, non_loss_data: bool) -> LogprobOutputs:
            return self._outputs(logits, micro_batch)

        if not micro_batches:
            return
        model.eval()
        with torch.no_grad():
            collected = self._run(model, micro_batches, outputs, forward_only=True)
        if self.parallel.is_last_stage:
            yield from zip(micro_batches, collected, strict=True)

    def _optimizer_step(self, micro_batches: list[PackedMicroBatch]) -> tuple[MetricSums, float | None]:
        """Gradients of all micro-batches, one step of the optimizer; this rank's metrics and the global gradient norm,
        None where the step was skipped."""

        def loss(micro_batch: PackedMicroBatch, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, MetricSums]:
            result = self.objective(self._outputs(logits, micro_batch), micro_batch)
            # A token count of 0 tells Megatron that there is nothing left to divide by.
            return result.loss, torch.zeros((), dtype=torch.int, device=logits.device), result.metrics

        self.ddp.train()
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        collected = self._run(self.ddp, micro_batches, loss, forward_only=False)
        metrics = MetricSums()
        if self.parallel.is_last_stage and self.parallel.tp_rank == 0:
            for record in collected:
                metrics.add(record)
        reason = self.refusal.reason(self.ddp, metrics, self.parallel.sum)
        if reason is not None:
            logger.error("rank %d skips an optimizer step: %s", self.parallel.rank, reason)
            return metrics, None
        self.trace.point("optimizer_step")
        succeeded, grad_norm, _ = self.optimizer.step()
        if not succeeded:
            raise RuntimeError("the optimizer refused the step: gradients are not finite")
        self.scheduler.step(increment=1)
        return metrics, float(grad_norm)

    def _reduce(self, own: MetricSums) -> dict[str, float]:
        return reduce_metrics(own, self.parallel.control_group).values()

    def named_hf_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Full weights under Hugging Face names, streamed. Collective over all ranks; all must consume it."""
        return self._hf_tensors(self.stage)

    def offload(self) -> None:
        """Move optimizer state to the host and free gradients (GPU); on a CPU there is one memory: nothing moves."""
        if self.parallel.device.type == "cuda" and not self.is_offloaded:
            self.ddp.offload_grad_buffers()
            self.optimizer_offload.to_host()
            self.is_offloaded = True

    def onload(self) -> None:
        """Undo `offload`."""
        if self.is_offloaded:
            self.ddp.restore_grad_buffers()
            self.optimizer_offload.to_device()
            self.is_offloaded = False

    def checkpoint_bytes(self) -> int:
        """This rank's part of what `save` writes: weights, two moments and, beside bf16, master weights in float32."""
        num_floats = 3 if self.model_config.bf16 else 2
        copies = {True: self.parallel.dp_size, False: parallel_state.get_expert_data_parallel_world_size()}
        return sum(
            each.numel() * (each.element_size() + 4 * num_floats) // copies[getattr(each, "allreduce", True)]
            for each in self.stage.parameters()
        )

    def save(self, folder: Path) -> None:
        """Write model, optimizer and schedule, from wherever they are: an engine that is awake has the device.
        Collective over all ranks; all must call."""
        with self.optimizer_offload.readable():
            save_policy(folder, self.stage, self.optimizer, self.scheduler)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote, at any parallel layout. Collective over all ranks; all must call."""
        self.onload()
        load_policy(folder, self.stage, self.optimizer, self.scheduler)

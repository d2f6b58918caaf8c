"""Supervised fine-tuning (cold start) through the policy trainer of RL.

torchrun --nproc_per_node 2 tools/train_sft.py --hf-model DIR --save DIR --data-train jsonl:examples.jsonl
"""

import hashlib
import logging
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs from any folder

logger = logging.getLogger("train_sft")


class SftInputs:
    """All that a run reads, checked before any process group exists. Raises ValueError naming the flag or file."""

    def __init__(self, config, *, world_size: int):
        from transformers import AutoTokenizer

        from tlt.build import find_checkpoint
        from tlt.config import check_policy_layout, read_hf_config, require
        from tlt.data.prompts import PromptBuilder
        from tlt.data.tokenizer import stop_token_ids
        from tlt.faults import parse_faults
        from tlt.run_state import RunState, read_state
        from tlt.sft.examples import ExampleStream, read_examples

        folder = config.model.hf_model
        self.hf_config = read_hf_config(folder)
        check_policy_layout(config.model, world_size=world_size, hf_config=self.hf_config)
        self.hf_directory = Path(config.sft.out or Path(config.training.save) / "hf")
        require(
            not self.hf_directory.exists(), "--sft-out", str(self.hf_directory), "a folder that does not exist yet"
        )
        tokenizer = AutoTokenizer.from_pretrained(folder)
        context = self.hf_config["max_position_embeddings"]
        builder = PromptBuilder(config.data, tokenizer=tokenizer, max_prompt_tokens=context - 1)

        def read(spec: str, flag: str) -> list:
            stop = stop_token_ids(Path(folder), self.hf_config, tokenizer)[0]
            return read_examples(spec, flag, builder, tokenizer=tokenizer, stop_token_id=stop, max_tokens=context)

        sequences = [sequence for spec in config.data.train for sequence in read(spec, "--data-train")]
        self.held_out = read(config.sft.held_out, "--sft-held-out") if config.sft.held_out else []
        seed = config.training.seed
        self.examples = ExampleStream(sequences, tokens_per_step=config.sft.tokens_per_step, seed=seed)
        num_tokens = sum(len(sequence.token_ids) for sequence in sequences)
        logger.info(
            "%d examples, %d tokens, %d of them in responses; %d iterations are %.2f epochs",
            len(sequences), num_tokens, sum(sequence.num_response_tokens for sequence in sequences),
            config.training.train_iters, config.training.train_iters * config.sft.tokens_per_step / num_tokens,
        )  # fmt: skip
        fingerprint = {
            "--seed": seed,
            "--data-train": hashlib.sha256(str([s.token_ids for s in sequences]).encode()).hexdigest(),
            "--sft-tokens-per-step": config.sft.tokens_per_step,
        }
        self.faults = parse_faults(config.training.fault or (), world_size=world_size)
        self.checkpoint = find_checkpoint(config)
        self.state = RunState(fingerprint=fingerprint, prompt_stream=self.examples.state_dict())
        if self.checkpoint is not None:
            self.state = read_state(self.checkpoint, fingerprint)
            self.examples.load_state_dict(self.state.prompt_stream)


def build(config, inputs: SftInputs):
    """Make every component. Collective over all ranks; all must call."""
    from megatron_patches import apply_patches
    from tlt import parallel as process_groups
    from tlt.build import build_checkpoints, build_heartbeat, build_metrics_log, build_policy_trainer, build_trace
    from tlt.drafter.history import SuffixHistory
    from tlt.interrupt import Interrupt
    from tlt.progress import Progress
    from tlt.provenance import write_run_record
    from tlt.rl.losses import LikelihoodObjective
    from tlt.rollout.vllm.speculation import NoSpeculation
    from tlt.run_state import shared_folder
    from tlt.sft.loop import HeldOut, SftRun
    from tlt.spot.training import NoSpotTraining
    from tlt.types import SamplingConfig

    training = config.training
    interrupt = Interrupt()
    interrupt.install()
    patches = apply_patches()
    parallel = process_groups.initialize(config.model, timeout=timedelta(minutes=training.distributed_timeout_minutes))
    save = shared_folder(Path(training.save), parallel)
    trace = build_trace(save, inputs.faults, parallel)
    if parallel.rank == 0:
        write_run_record(save, config, patches=patches, world_size=parallel.world_size)
    trainer = build_policy_trainer(
        inputs.hf_config, config.model, config.optimizer, parallel, objective=LikelihoodObjective(),
        sampling=SamplingConfig(temperature=1.0, max_response_tokens=1), train_iters=training.train_iters, trace=trace,
    )  # fmt: skip
    if inputs.checkpoint is not None:
        trainer.load(inputs.checkpoint)
        logger.info("resumed from %s", inputs.checkpoint)
    return SftRun(
        train_iters=training.train_iters,
        parallel=parallel,
        examples=inputs.examples,
        held_out=HeldOut(
            sequences=inputs.held_out, interval=config.sft.eval_interval, train_iters=training.train_iters
        ),
        policy_trainer=trainer,
        checkpoints=build_checkpoints(
            training, trainer, parallel, history=SuffixHistory(0), tail=NoSpotTraining(),
            speculation=NoSpeculation(), trace=trace, resumed_iteration=inputs.state.iteration,
        ),
        metrics=build_metrics_log(training, inputs.state, parallel),
        trace=trace,
        interrupt=interrupt,
        heartbeat=build_heartbeat(training, parallel, trace),
        progress=Progress(is_shown=parallel.rank == 0),
        state=inputs.state,
        hf_directory=inputs.hf_directory,
    )  # fmt: skip


def main(argv: Sequence[str]) -> int:
    """Parse, check, build, fine-tune, write. Bad input: one line on each node, status 2 on every rank."""
    from tlt.launch import prepare
    from tlt.sft.config import SftRunConfig

    prepared = prepare(
        argv, program="tools/train_sft.py", description=__doc__, config_class=SftRunConfig,
        read_inputs=lambda config, world_size: SftInputs(config, world_size=world_size),
    )  # fmt: skip
    if isinstance(prepared, int):
        return prepared
    config, inputs = prepared

    import torch.distributed as dist

    from tlt.sft.loop import fine_tune
    from tlt.weight_sync.hf_directory import write_hf_directory

    run = build(config, inputs)
    with run.heartbeat:
        is_complete = fine_tune(run)
    run.parallel.barrier()  # the rank that hosts the store is not the first to go
    if is_complete:
        tensors = run.policy_trainer.named_hf_tensors()
        write_hf_directory(run.hf_directory, tensors, like=Path(config.model.hf_model), parallel=run.parallel)
        logger.info("wrote %s", run.hf_directory)
    run.metrics.close()
    run.trace.close()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

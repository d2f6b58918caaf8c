"""--dry-run: everything about a run that can be checked without its GPUs, at its real number of ranks.

A directory that holds a config.json alone is enough; with a tokenizer in it prompts are checked too.
"""

import logging
from dataclasses import replace
from pathlib import Path

import torch

from tlt.config import RunConfig, check, read_hf_config
from tlt.config.architecture import supported_rope
from tlt.data.prompts import excluded_questions
from tlt.data.source import parse_source
from tlt.data.tokenizer import has_tokenizer
from tlt.faults import parse_faults
from tlt.footprint.engine import Drafters
from tlt.footprint.table import GIB, Footprint, footprint
from tlt.rollout.vllm.engine_args import parse_engine_args
from tlt.rollout.vllm.speculation import LEARNED, SpecPlan, read_spec_plan
from tlt.rollout.vllm.target_weights import not_at_hand, output_of
from tlt.spec.graph_plan import most_tokens

logger = logging.getLogger(__name__)


def rehearse(config: RunConfig, *, world_size: int, ranks_per_node: int) -> Footprint:
    """Log what the run would take of each GPU; raises ValueError naming the flag or file that would not do."""
    hf_config = read_hf_config(config.model.hf_model)
    check(config, world_size=world_size, ranks_per_node=ranks_per_node, hf_config=hf_config)
    supported_rope(hf_config)
    plan = read_spec_plan(
        config.spec, target_config=hf_config, dtype=torch.bfloat16 if config.model.bf16 else torch.float32,
        tp_size=config.rollout.tensor_parallel_size, is_trained=config.spot.training == "on",
    )  # fmt: skip
    found = footprint(
        config, hf_config, drafters(plan, hf_config, max_num_seqs=config.rollout.max_num_seqs), world_size=world_size,
        ranks_per_node=ranks_per_node, device_bytes=device_bytes(config.training.dry_run_gpu_gib),
    )  # fmt: skip
    for line in (*shape(config, world_size=world_size, ranks_per_node=ranks_per_node), *str(found).splitlines()):
        logger.info("%s", line)
    found.require_fit()
    if has_tokenizer(Path(config.model.hf_model)):
        from tlt.build import Inputs

        Inputs(config, world_size=world_size, ranks_per_node=ranks_per_node)
    else:
        check_inputs(config, world_size=world_size)
        logger.warning("not checked: prompts and their lengths (no tokenizer in --hf-model %s)", config.model.hf_model)
    return found


def check_inputs(config: RunConfig, *, world_size: int) -> None:
    """What `Inputs` checks that needs no tokenizer. Raises ValueError naming the flag or file."""
    for flag, specs in (("--data-train", config.data.train), ("--eval-sources", config.eval.sources or ())):
        for spec in specs:
            parse_source(spec, flag, seed=config.training.seed, max_rejected=config.data.max_rejected)
    excluded_questions(config.data.exclude or ())
    parse_engine_args(config.rollout.engine_args)
    parse_faults(config.training.fault or (), world_size=world_size)


def drafters(plan: SpecPlan, hf_config: dict, *, max_num_seqs: int) -> Drafters:
    """What the heads of a plan, and those who learn from hidden states, keep."""
    vocabulary = hf_config["vocab_size"]
    sizes = {name: sum(each.numel() for each in head.parameters()) for name, head in plan.heads.items()}
    drafted = [head.draft_token_ids for head in plan.heads.values()]
    found = Drafters(
        head_parameters=sum(sizes.values()), num_heads=len(plan.heads), states=plan.kept_states(),
        verified_tokens=most_tokens(plan.policy, range(1, max_num_seqs + 1)),
        draft_probs=plan.policy.max_draft_tokens * max_num_seqs
        * sum(vocabulary if ids is None else len(ids) for ids in drafted),
    )  # fmt: skip
    if not plan.is_trained:
        return found
    ids = plan.heads[LEARNED].draft_token_ids
    output = output_of(is_tied=hf_config.get("tie_word_embeddings", False))
    copies = not_at_hand(output, tp_size=plan.tp_size, on_cpu=False, reads_output=ids is None)
    return replace(
        found, trained_parameters=sizes[LEARNED], trained_rows=vocabulary if ids is None else len(ids),
        copied_rows=len(copies) * vocabulary,
    )  # fmt: skip


def device_bytes(gpu_gib: float | None) -> int | None:
    """Memory of the GPU that is asked for, else of this machine's first one; None without any."""
    if gpu_gib is not None:
        return int(gpu_gib * GIB)
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def shape(config: RunConfig, *, world_size: int, ranks_per_node: int) -> list[str]:
    """The iteration in words, for the eye."""
    rl, rollout = config.rl, config.rollout
    num_replicas = world_size // rollout.tensor_parallel_size
    responses = rl.prompts_per_iteration * rl.group_size
    return [
        f"{world_size} ranks on {-(-world_size // ranks_per_node)} nodes: {num_replicas} rollout replicas, "
        f"{responses} responses an iteration, {responses / num_replicas:.1f} a replica "
        f"({rollout.max_num_seqs} decode at a time), {rl.optimizer_steps} optimizer steps"
    ]

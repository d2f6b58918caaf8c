"""Hugging Face directory -> Megatron checkpoint (torch_dist), which loads at any tensor and pipeline parallel size."""

import argparse
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs from any folder
from tools.single_process import layout_flags, start_layout  # noqa: E402


def convert(hf_model: Path, save: Path, *, tp: int, pp: int) -> None:
    """Write <save>/iter_0000000 with the model's weights. Collective over all ranks; all must call."""
    from megatron.core import dist_checkpointing

    from tlt.config import read_hf_config, require
    from tlt.policy.checkpoint import stored_tensors
    from tlt.policy.model import build_policy_model, uses_transformer_engine
    from tlt.run_state import TRACKER
    from tlt.weight_sync.gather import PolicyWeights

    hf_config = read_hf_config(str(hf_model))
    final = save / "iter_0000000"
    require(not final.exists(), "--save", str(save), "a folder without a checkpoint (iter_0000000)")
    parallel, model = start_layout(hf_model, hf_config, tp=tp, pp=pp)
    stage = build_policy_model(hf_config, model, parallel)
    PolicyWeights(stage, hf_config, parallel, transformer_engine=uses_transformer_engine(model)).load(hf_model)
    partial = final.with_suffix(".tmp")
    if parallel.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    parallel.barrier()
    dist_checkpointing.save({"model": stored_tensors(stage)}, str(partial))
    parallel.barrier()
    if parallel.rank == 0:
        partial.rename(final)
        (save / TRACKER).write_text("0\n")
        print(f"wrote {final}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hf-model", type=Path, required=True, help="Hugging Face directory to read")
    parser.add_argument("--save", type=Path, required=True, help="folder to write iter_0000000 into")
    layout_flags(parser)
    args = parser.parse_args()
    try:
        convert(args.hf_model, args.save, tp=args.tensor_model_parallel_size, pp=args.pipeline_model_parallel_size)
    except ValueError as error:
        print(f"convert_hf_to_mcore.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

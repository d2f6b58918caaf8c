"""Megatron checkpoint (torch_dist, written at any parallel layout) -> Hugging Face directory.

One process is enough for any model: a layer and one output file are in memory at a time.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs from any folder
from tools.single_process import dtype_of  # noqa: E402


def find_checkpoint(load: Path) -> Path:
    """The folder itself, or a run's newest checkpoint. Raises ValueError where there is none."""
    if (load / "metadata.json").is_file():
        return load
    found = sorted(path for path in load.glob("iter_*") if (path / "metadata.json").is_file() and not path.suffix)
    if not found:
        raise ValueError(f"--load must be a checkpoint or a run folder with iter_* in it, got {load}")
    return found[-1]


def convert(load: Path, hf_model: Path, out: Path) -> None:
    """Write `out` with the weights of the checkpoint and the config and tokenizer of `hf_model`."""
    from tlt.config import read_hf_config, require
    from tlt.policy.metadata import check_metadata
    from tlt.weight_sync.hf_directory import write_directory
    from tlt.weight_sync.stored import StoredWeights

    hf_config = read_hf_config(str(hf_model))
    require(not out.exists(), "--out", str(out), "a folder that does not exist yet")
    checkpoint = find_checkpoint(load)
    check_metadata(checkpoint)
    write_directory(out, StoredWeights(checkpoint, hf_config, dtype=dtype_of(hf_config)).hf_tensors(), like=hf_model)
    print(f"wrote {out} from {checkpoint}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--load", type=Path, required=True, help="checkpoint (iter_*) or run folder (its newest)")
    parser.add_argument("--hf-model", type=Path, required=True, help="directory whose config and tokenizer to take")
    parser.add_argument("--out", type=Path, required=True, help="Hugging Face directory to write")
    args = parser.parse_args()
    try:
        convert(args.load, args.hf_model, args.out)
    except ValueError as error:
        print(f"convert_mcore_to_hf.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

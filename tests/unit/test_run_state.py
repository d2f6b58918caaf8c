"""A run's folder belongs to one run at a time."""

import pytest

from tlt.run_state import claim


def test_a_folder_is_claimed_until_its_holder_ends(tmp_path):
    held = claim(tmp_path / "run")
    with pytest.raises(RuntimeError, match="in use by another run"):
        claim(tmp_path / "run")
    held.close()
    claim(tmp_path / "run").close()

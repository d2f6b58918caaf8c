"""What torch pickles in a checkpoint is read without running anything."""

import os
import pickle

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorProperties, TensorStorageMetadata

from tlt.policy.metadata import METADATA, check_metadata


class Call:
    """Pickles to a call."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def index(**changes) -> Metadata:
    properties = TensorProperties(dtype=torch.bfloat16)
    tensor = TensorStorageMetadata(properties=properties, size=torch.Size([2, 3]), chunks=[])
    return Metadata(state_dict_metadata={"weight": tensor} | changes)


def test_an_index_is_read(tmp_path):
    (tmp_path / METADATA).write_bytes(pickle.dumps(index()))
    check_metadata(tmp_path)


@pytest.mark.parametrize(
    "function", [os.system, eval, exec, __import__, open, getattr, pickle.loads, torch.load, torch.hub.load]
)
def test_a_call_is_refused_and_not_made(tmp_path, function):
    made = tmp_path / "made"
    for protocol in range(5):
        (tmp_path / METADATA).write_bytes(pickle.dumps(index(x=Call(function, f"touch {made}")), protocol=protocol))
        with pytest.raises(ValueError, match=r"\.metadata is no index of a checkpoint's tensors: it names"):
            check_metadata(tmp_path)
    assert not made.exists()


@pytest.mark.parametrize(
    "module", ["torch.distributed.checkpoint.filesystem", "torch.distributed.checkpoint.metadata"]
)
@pytest.mark.parametrize(
    "name", ["os", "io", "pickle", "pickle.loads", "Path", "os.system", "torch.load", "__builtins__"]
)
def test_what_modules_of_an_index_import_is_refused(tmp_path, module, name):
    encoded = [text.encode() for text in (module, name)]
    short = b"".join(b"\x8c" + bytes([len(text)]) + text for text in encoded)
    (tmp_path / METADATA).write_bytes(b"\x80\x04" + short + b"\x93.")
    with pytest.raises(ValueError, match="no index of a checkpoint"):
        check_metadata(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x80", b"\x80\x04.", b"not a pickle", bytes(100), b"\x80\x04K\x01"])
def test_rubbish_is_refused(tmp_path, content):
    (tmp_path / METADATA).write_bytes(content)
    with pytest.raises(ValueError, match="no index of a checkpoint"):
        check_metadata(tmp_path)
    (tmp_path / METADATA).unlink()
    with pytest.raises(ValueError, match="no index of a checkpoint"):
        check_metadata(tmp_path)

"""Tiny models shared by all tests of a session."""

from pathlib import Path

import pytest

from tests.tiny_models import EXPERTS, KINDS, write_tiny_model, write_tokenizer


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory) -> dict[str, Path]:
    """Folder of a random fp32 model by kind."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in (*KINDS, EXPERTS)}
    return {kind: write_tiny_model(kind, folder) for kind, folder in folders.items()}


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)

"""Checksums of a folder's files, so that what is read is what was written.

They find truncation, lost files and flipped bits; they are no signature: who can write the folder can write them too.
"""

import hashlib
import json
from pathlib import Path

MANIFEST = "manifest.json"
Digests = dict[str, list]
"""[bytes, SHA-256 in hex] by path inside the folder."""


NONE: Digests = {}


def digests(folder: Path, *, rank: int = 0, world_size: int = 1, known: Digests = NONE) -> Digests:
    """Of every `world_size`-th file of the folder, from number `rank` on: ranks share the work of reading. Those whose
    digests are known already are not read again."""
    paths = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    paths.pop(MANIFEST, None)
    names = list(paths)[rank::world_size]
    return {name: known.get(name) or [paths[name].stat().st_size, _sha256(paths[name])] for name in names}


def write_manifest(folder: Path, files: Digests) -> None:
    """Last of all files of the folder: one without it was never finished."""
    (folder / MANIFEST).write_text(json.dumps(files, indent=1, sort_keys=True) + "\n")


def damage(folder: Path) -> str | None:
    """What is wrong with the folder's files, None where they are what the manifest says. Sizes are looked at first."""
    try:
        files = json.loads((folder / MANIFEST).read_text())
        expected = {name: (int(size), str(digest)) for name, (size, digest) in files.items()}
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (ValueError, TypeError, AttributeError) as error:
        return f"{MANIFEST} is not readable ({error})"
    for name, (size, _) in expected.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
    for name, (_, digest) in expected.items():
        if _sha256(folder / name) != digest:
            return f"{name} has another content than was written (SHA-256)"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""What a run keeps for later ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from parity import cache


def test_compiled_code_is_kept_where_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARITY_CACHE", str(tmp_path / "named"))
    folder = cache.cache_folder()
    assert folder is not None
    assert folder.parent == tmp_path / "named"
    assert folder.is_dir()
    monkeypatch.delenv("PARITY_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_folder() == tmp_path / "xdg" / "omni-parity" / "jax" / folder.name
    monkeypatch.setenv("PARITY_CACHE", "")
    assert cache.cache_folder() is None
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PARITY_CACHE", str(tmp_path / "file" / "below"))
    assert cache.cache_folder() is None, "an unwritable cache is no cache, not an error"


def test_arrays_are_made_once_for_what_they_are_made_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARITY_CACHE", str(tmp_path))
    monkeypatch.setattr(cache, "_KEEPS", False)
    made: list[str] = []

    def arrays(made_of: str) -> dict[str, np.ndarray]:
        def make() -> dict[str, np.ndarray]:
            made.append(made_of)
            return {"blocks.0.norm1.weight": np.arange(3, dtype=np.float32) * len(made)}

        return cache.kept_arrays("trained", made_of, make)

    arrays("one")
    assert list(tmp_path.rglob("*.npz")) == [], "nothing is kept unless a command asks for it"
    cache.keep_arrays()
    first = arrays("one")
    again = arrays("one")
    arrays("another")
    assert made == ["one", "one", "another"]
    assert list(again) == ["blocks.0.norm1.weight"]
    np.testing.assert_array_equal(again["blocks.0.norm1.weight"], first["blocks.0.norm1.weight"])
    assert again["blocks.0.norm1.weight"].dtype == np.float32


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04", b"no archive at all"])
def test_a_damaged_file_is_made_anew(damage: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARITY_CACHE", str(tmp_path))
    monkeypatch.setattr(cache, "_KEEPS", True)
    made = {"x": np.ones(2)}
    cache.kept_arrays("x", "it", lambda: made)
    (file,) = tmp_path.rglob("*.npz")
    file.write_bytes(damage)
    assert cache.kept_arrays("x", "it", lambda: {"x": np.zeros(2)})["x"].tolist() == [0.0, 0.0]
    assert cache.kept_arrays("x", "it", lambda: made)["x"].tolist() == [0.0, 0.0]

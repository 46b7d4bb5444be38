"""API keys: which are accepted, where they come from, and that nothing of them stays readable."""

from __future__ import annotations

import pytest

from fedpt_secure.errors import ConfigError
from fedpt_secure.serving.keys import ApiKeys, read_keys

KEY, OTHER = "k" * 24, "another-key-of-24-chars-"


def test_only_a_key_that_is_ours_has_a_digest():
    keys = ApiKeys([KEY, OTHER])
    assert keys.digest(KEY.encode()) is not None
    assert keys.digest(KEY.encode()) == keys.digest(KEY.encode()) != keys.digest(OTHER.encode())
    for wrong in (KEY[:-1], KEY + "k", "", KEY.upper(), "é" * 16):
        assert keys.digest(wrong.encode()) is None
    assert ApiKeys().digest(KEY.encode()) is None


def test_a_key_is_not_kept_and_its_hash_differs_from_process_to_process():
    keys = ApiKeys([KEY])
    assert KEY not in repr(keys)
    assert KEY not in repr(vars(keys))
    assert keys.digest(KEY.encode()) != ApiKeys([KEY]).digest(KEY.encode())


def test_every_key_is_compared_whichever_is_right(monkeypatch):
    import hmac

    compared = []
    real = hmac.compare_digest
    monkeypatch.setattr("hmac.compare_digest", lambda a, b: compared.append(1) or real(a, b))
    keys = ApiKeys([KEY, OTHER, "x" * 20])
    for presented in (KEY, OTHER, "wrong" * 5):
        compared.clear()
        keys.digest(presented.encode())
        assert len(compared) == 3


@pytest.mark.parametrize("bad", ["short", "with blank in the middle", "t" * 513, "umlaut-äöü-umlaut-äöü"])
def test_an_unacceptable_key_is_named_by_its_place_only(bad):
    with pytest.raises(ConfigError, match="number 2") as caught:
        ApiKeys([KEY, bad])
    assert bad not in caught.value.message


def test_keys_come_from_a_file_and_from_the_environment(tmp_path):
    file = tmp_path / "keys"
    file.write_text(f"# for the clinic\n{KEY}\n\n")
    file.chmod(0o600)
    keys = read_keys(file, {"FEDPT_API_KEYS": f"{OTHER}, "})
    assert len(keys) == 2
    assert len(read_keys(None, {})) == 0


def test_a_key_file_that_others_may_read_is_refused(tmp_path):
    file = tmp_path / "keys"
    file.write_text(KEY)
    for mode in (0o640, 0o604, 0o620):
        file.chmod(mode)
        with pytest.raises(ConfigError, match="other users"):
            read_keys(file, {})


@pytest.mark.parametrize("content", [b"", b"# nothing\n", b"\xff\xfe\xff\xfe"])
def test_a_key_file_without_a_key_is_refused(tmp_path, content):
    """An empty file must not mean that nobody is asked for a key."""
    file = tmp_path / "keys"
    file.write_bytes(content)
    file.chmod(0o600)
    with pytest.raises(ConfigError, match="API key"):
        read_keys(file, {})
    with pytest.raises(ConfigError, match="cannot read"):
        read_keys(tmp_path / "missing", {})

"""`fedpt-secure keys`: what is printed, what is written, and how each refusal ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedpt_secure.cli import app
from fedpt_secure.crypto import Roster

RUNNER = CliRunner()
WORDS = "correct horse battery"


def invoke(*arguments, **more):
    return RUNNER.invoke(app, ["keys", *(str(argument) for argument in arguments)], **more)


def new(client_id, directory):
    result = invoke("new", client_id, "--out", directory, "--no-passphrase", "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture
def clinics(tmp_path):
    return [new(name, tmp_path / name) for name in ("clinic-a", "clinic-b", "clinic-c")]


@pytest.fixture
def roster(clinics, tmp_path):
    path = tmp_path / "roster.json"
    result = invoke("roster", *(clinic["public_file"] for clinic in clinics), "--out", path, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_three_clinics_make_a_roster_and_each_finds_itself_in_it(clinics, roster):
    assert roster["clients"] == ["clinic-a", "clinic-b", "clinic-c"]
    for clinic in clinics:
        result = invoke(
            *("verify", "--roster", roster["roster"], "--digest", roster["digest"]),
            *("--identity", clinic["secret_file"], "--json"),
        )
        assert result.exit_code == 0, result.output
        answer = json.loads(result.stdout)
        assert (answer["digest_compared"], answer["own_id"]) == (True, clinic["id"])


def test_the_digest_that_people_read_out_is_the_one_the_protocol_signs(roster):
    shown = invoke("verify", "--roster", roster["roster"])
    assert shown.exit_code == 0, shown.output
    spoken = "".join(shown.stdout.split("in person:\n")[1].split())
    assert spoken == roster["digest"] == Roster.load(roster["roster"]).digest.hex()
    again = invoke("verify", "--roster", roster["roster"], "--digest", " ".join(spoken.upper()))
    assert again.exit_code == 0
    assert "The digest is the expected one." in again.stdout


def test_no_secret_is_printed(tmp_path):
    made = invoke("new", "a", "--out", tmp_path, "--no-passphrase")
    assert made.exit_code == 0
    secret = json.loads((tmp_path / "a.secret.json").read_text())["seed"]
    shown = invoke("verify", "--roster", tmp_path / "a.secret.json")
    assert shown.exit_code == 11
    assert secret not in made.output + shown.output + repr(shown.exception.__context__)


def test_a_sealed_identity_asks_for_its_passphrase_and_never_takes_it_as_an_argument(tmp_path):
    made = invoke("new", "a", "--out", tmp_path, "--json", input=f"{WORDS}\n{WORDS}\n")
    assert made.exit_code == 0, made.output
    assert json.loads(made.stdout)["sealed"] is True
    assert WORDS not in made.output
    assert 'seed"' not in (tmp_path / "a.secret.json").read_text().replace("sealed_seed", "")
    roster = tmp_path / "roster.json"
    assert invoke("roster", tmp_path / "a.public.json", "--out", roster).exit_code == 0
    check = ("verify", "--roster", roster, "--identity", tmp_path / "a.secret.json")
    assert invoke(*check, input=f"{WORDS}\n").exit_code == 0
    wrong = invoke(*check, input="another passphrase\n")
    assert wrong.exit_code == 11
    assert "passphrase is wrong" in wrong.stderr
    assert "another passphrase" not in wrong.output
    assert invoke("new", "b", "--out", tmp_path, "--passphrase", WORDS).exit_code == 2


def test_two_passphrases_that_differ_or_a_short_one_make_no_key(tmp_path):
    assert invoke("new", "a", "--out", tmp_path / "keys", input=f"{WORDS}\nother words here\n").exit_code == 1
    short = invoke("new", "a", "--out", tmp_path / "keys", input="short\nshort\n")
    assert short.exit_code == 11
    assert "hint:" in short.stderr
    assert not (tmp_path / "keys").exists()


def test_no_file_is_ever_replaced(clinics, roster, tmp_path):
    again = invoke("new", "clinic-a", "--out", tmp_path / "clinic-a", "--no-passphrase")
    assert again.exit_code == 10
    assert "never replaced" in again.stderr
    repeated = invoke("roster", clinics[0]["public_file"], "--out", roster["roster"])
    assert repeated.exit_code == 10


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda text: text.replace("clinic-b", "clinic-a"), "called 'clinic-a'"),
        (lambda text: text.replace("identity v1", "identity v9"), "identity v9"),
        (lambda text: text.replace('"id"', '"role": "admin",\n  "id"'), "unknown field"),
        (lambda text: text.replace("\n", "\r\n"), "canonical"),
        (lambda text: text[:-70] + "0" * 64 + text[-6:], ""),
        (lambda text: "hello", "no JSON"),
    ],
    ids=["same id", "version", "field", "line ends", "no point", "text"],
)
def test_a_bad_public_file_is_one_line_that_names_it_and_no_roster(clinics, tmp_path, spoil, said):
    bad = Path(clinics[1]["public_file"])
    bad.write_bytes(spoil(bad.read_text()).encode())
    result = invoke("roster", *(clinic["public_file"] for clinic in clinics), "--out", tmp_path / "roster.json")
    assert result.exit_code == 11, result.output
    assert result.stderr.count("error:") == 1
    assert said in result.stderr
    assert not (tmp_path / "roster.json").exists()


def test_one_key_under_two_names_makes_no_roster(clinics, tmp_path):
    copy = tmp_path / "copy.json"
    with open(clinics[0]["public_file"]) as original:
        copy.write_text(original.read().replace("clinic-a", "clinic-x"))
    result = invoke("roster", clinics[0]["public_file"], copy, "--out", tmp_path / "roster.json")
    assert result.exit_code == 11
    assert "same key" in result.stderr


def test_another_roster_another_digest_or_another_key_is_refused(clinics, roster, tmp_path):
    other = tmp_path / "other.json"
    assert invoke("roster", *(clinic["public_file"] for clinic in clinics[:2]), "--out", other).exit_code == 0
    swapped = invoke("verify", "--roster", other, "--digest", roster["digest"])
    assert swapped.exit_code == 11
    assert "another roster" in swapped.stderr
    assert invoke("verify", "--roster", roster["roster"], "--digest", roster["digest"][:16]).exit_code == 11
    missing = invoke("verify", "--roster", other, "--identity", clinics[2]["secret_file"])
    assert missing.exit_code == 11
    assert "does not name client 'clinic-c'" in missing.stderr
    replaced = new("clinic-a", tmp_path / "elsewhere")
    result = invoke("verify", "--roster", other, "--identity", replaced["secret_file"])
    assert result.exit_code == 11
    assert "another key for client 'clinic-a'" in result.stderr


def test_a_file_that_is_not_there_is_said_to_be_so(tmp_path):
    result = invoke("verify", "--roster", tmp_path / "none.json")
    assert result.exit_code == 11
    assert "cannot be read: No such file" in result.stderr

"""Clients and servers that are slow, wedged, confused, full, strangers or cut off, on real processes."""

from __future__ import annotations

import resource
import time

import pytest

from fedpt_secure.crypto import Identity, Roster
from fedpt_secure.errors import ConfigError, IdentityError
from fedpt_secure.federation import ClientWorker, RunDirectory
from fedpt_secure.network import service
from fedpt_secure.network.folder import ClientSettings, Patience, write_settings
from fedpt_secure.network.service import ClientService
from fedpt_secure.network.status import read_status
from fedpt_secure.network.transport import Reply, Request
from fedpt_secure.privacy import Ledger
from fedpt_secure.progress import SILENT

from .conftest import NAMES, die, local_adapter, wait_for

SHORT = Patience(gather_seconds=1, give_up_seconds=120, phase_seconds=6, training_seconds=10)
"""For those who wait for somebody wedged; long enough for everybody else on a busy machine."""
VICTIM, OTHER = NAMES[0], NAMES[1]


def _wrap(owner, name, change):
    original = getattr(owner, name)
    setattr(owner, name, lambda self, *args, **rest: change(original, self, *args, **rest))


def _asleep(original, self, *args, **rest):
    time.sleep(600)


def _slow(original, self, *args, **rest):
    answer = original(self, *args, **rest)
    time.sleep(9)
    return answer


def _garbage(original, self, *args, **rest):
    original(self, *args, **rest)
    return b"\x00garbage" * 20


def _first_rounds_bytes(original, self, *args, **rest):
    """Always what it answered the first time."""
    if not hasattr(self, "first"):
        self.first = original(self, *args, **rest)
        return self.first
    original(self, *args, **rest)
    return self.first


def _full_disk(original, self, *args, **rest):
    """From here on no file of this process can grow."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    return original(self, *args, **rest)


# (what is wrong with the client, the phase in which that shows, how the server names it)
FAULTS = {
    "wedged while it trains": (ClientWorker, "train_and_mask", _asleep, "mask: no answer in time"),
    "wedged while it confirms": (ClientWorker, "confirm", _asleep, "confirm: no answer in time"),
    "slower than the deadline": (ClientWorker, "share_keys", _slow, "share_keys: no answer in time"),
    "sends garbage for keys": (ClientWorker, "announce", _garbage, "advertise: its message was refused"),
    "sends garbage for a vector": (ClientWorker, "train_and_mask", _garbage, "mask: its message was refused"),
    "sends garbage for shares": (ClientWorker, "unmask", _garbage, "unmask: its message was refused"),
    "has a full disk": (Ledger, "release", _full_disk, "mask: silent (ledger)"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_client_drops_out_and_the_others_sum_is_exact(fault, make_network, tmp_path):
    owner, method, change, shown = FAULTS[fault]
    patience = SHORT if change in (_asleep, _slow) else None
    network = make_network({"federation": {"rounds": 1, "cohort": 9}}, patience=patience)
    network.start_clients(*NAMES[1:])
    network.start_clients(VICTIM, before=lambda: _wrap(owner, method, change))
    assert network.finish(network.start_server()) == 0
    directory = RunDirectory.open(network.server.run)
    (line,) = directory.read_log("transcript")
    assert line["dropped"] == {VICTIM: shown}
    assert line["aborted"] == ""
    phase = shown.split(":")[0]
    assert (VICTIM in line["survivors"]) == (phase in ("confirm", "unmask"))
    theirs = local_adapter(network, tmp_path / "local", {0: {VICTIM: phase}})
    assert (directory.load_checkpoint().tensors["adapter"] == theirs.tensors["adapter"]).all()


def test_another_rounds_bytes_are_refused_and_the_client_is_welcome_once_it_is_well(make_network):
    network = make_network({"federation": {"rounds": 3, "cohort": 9}})
    network.start_clients(*NAMES[1:])
    network.start_clients(VICTIM, before=lambda: _wrap(ClientWorker, "announce", _first_rounds_bytes))
    assert network.finish(network.start_server()) == 0
    lines = RunDirectory.open(network.server.run).read_log("transcript")
    assert [line["dropped"] for line in lines] == [{}, *[{VICTIM: "advertise: its message was refused"}] * 2]
    assert all("belongs to session" in line["rejected"][0] for line in lines[1:])


def test_a_client_with_another_model_is_refused_in_every_round(make_network):
    """Its weights hash to something else, so its session is another one."""
    network = make_network({"federation": {"rounds": 2, "cohort": 9}})

    def other_weights():
        network.models.small.weights_digest = lambda vector: b"\x07" * 32

    network.start_clients(*NAMES[1:])
    network.start_clients(VICTIM, before=other_weights)
    assert network.finish(network.start_server()) == 0
    lines = RunDirectory.open(network.server.run).read_log("transcript")
    assert [line["dropped"] for line in lines] == [{VICTIM: "advertise: its message was refused"}] * 2
    assert [line["aborted"] for line in lines] == ["", ""]
    # It has released nothing.
    assert Ledger(network.clients[VICTIM].ledger).history() == ()


@pytest.mark.parametrize("hours", [-24 * 365, 24 * 365])
def test_a_wrong_clock_changes_nothing(hours, make_network, tmp_path):
    def wrong_clock():
        now = time.time
        time.time = lambda: now() + hours * 3600

    network = make_network({"federation": {"rounds": 1, "cohort": 9}})
    network.start_clients(*NAMES[1:])
    network.start_clients(VICTIM, before=wrong_clock)
    assert network.finish(network.start_server()) == 0
    directory = RunDirectory.open(network.server.run)
    assert directory.read_log("transcript")[0]["dropped"] == {}
    theirs = local_adapter(network, tmp_path / "local")
    assert (directory.load_checkpoint().tensors["adapter"] == theirs.tensors["adapter"]).all()


def test_a_client_whose_key_is_not_on_the_roster_does_not_start(make_network):
    network = make_network()
    folder = network.clients[VICTIM]
    keys = dict(network.roster) | {VICTIM: Identity.generate().verify_key_bytes}
    (folder.path / "roster.json").unlink()
    Roster(keys).save(folder.path / "roster.json")
    with pytest.raises(IdentityError, match="another key for client"):
        service.open_service(folder, ask_passphrase=str, progress=SILENT)
    del keys[VICTIM]
    (folder.path / "roster.json").unlink()
    Roster(keys).save(folder.path / "roster.json")
    with pytest.raises(IdentityError, match="does not name client"):
        service.open_service(folder, ask_passphrase=str, progress=SILENT)


def test_a_server_with_a_changed_key_in_its_roster_gets_no_answer_from_anybody(make_network):
    """The roster is the clients' PKI: with one key exchanged it is another roster, and every client stays silent."""
    network = make_network({"federation": {"rounds": 1}}, patience=SHORT.model_copy(update={"give_up_seconds": 2.0}))
    network.start_clients()
    keys = dict(network.roster) | {VICTIM: Identity.generate().verify_key_bytes}
    (network.server.path / "roster.json").unlink()
    Roster(keys).save(network.server.path / "roster.json")
    assert network.finish(network.start_server()) == 7
    status = read_status(network.server.status)
    assert status.state == "failed"
    assert status.why.startswith("0 of the 8 clients of round 0 are there")
    assert not any(folder.joined.exists() for folder in network.clients.values())
    assert all(Ledger(folder.ledger).history() == () for folder in network.clients.values())


def test_a_server_with_other_settings_gets_no_answer(make_network):
    from fedpt_secure import config as configuration

    network = make_network({"federation": {"rounds": 2}}, patience=SHORT.model_copy(update={"give_up_seconds": 2.0}))
    network.start_clients()
    other = network.server.config()
    privacy = other.privacy.model_copy(update={"clip_norm": other.privacy.clip_norm * 10})
    configuration.save(other.model_copy(update={"privacy": privacy}), network.server.path / "config.toml")
    assert network.finish(network.start_server()) == 7
    assert not any(folder.joined.exists() for folder in network.clients.values())


def test_a_client_takes_part_in_one_run_only(make_network):
    """A second run on the same folders, with a run directory of its own, is answered by nobody."""
    network = make_network({"federation": {"rounds": 1}}, patience=SHORT.model_copy(update={"give_up_seconds": 2.0}))
    network.start_clients()
    assert network.finish(network.start_server()) == 0
    network.server.run.rename(network.server.path / "first")
    spent = {name: Ledger(folder.ledger).history() for name, folder in network.clients.items()}
    assert network.finish(network.start_server()) == 7
    assert {name: Ledger(folder.ledger).history() for name, folder in network.clients.items()} == spent


def test_a_partition_that_heals_costs_the_rounds_it_lasts(make_network):
    """Two clients cannot be reached from the second round on, and can again in the fourth."""
    network = make_network({"federation": {"rounds": 6, "cohort": 9}}, patience=SHORT)
    network.start_clients()
    server = network.start_server()
    sockets = [network.clients[name].socket for name in (VICTIM, OTHER)]

    def at_round(number):
        return lambda: network.server.status.exists() and read_status(network.server.status).round_index >= number

    wait_for(at_round(1), "the second round")
    for path in sockets:
        path.rename(path.with_suffix(".cut"))
    wait_for(at_round(3), "the fourth round")
    for path in sockets:
        path.with_suffix(".cut").rename(path)
    assert network.finish(server) == 0
    lines = RunDirectory.open(network.server.run).read_log("transcript")
    assert [line["aborted"] for line in lines] == [""] * 6
    cut = [sorted(line["dropped"]) for line in lines]
    assert cut[0] == []
    assert cut[2] == [VICTIM, OTHER]
    assert cut[5] == []


def test_a_client_over_its_owners_budget_declines_with_one_word(make_network):
    network = make_network({"insecure_deterministic": False, "federation": {"rounds": 1, "cohort": 9}})
    folder = network.clients[VICTIM]
    ledger = Ledger(folder.ledger)
    from fedpt_secure.privacy import Budget

    ledger.set_budget(Budget(0.001, 1e-5, "record"))
    network.start_clients()
    assert network.finish(network.start_server()) == 0
    (line,) = RunDirectory.open(network.server.run).read_log("transcript")
    assert line["declined"] == {VICTIM: "budget"}
    assert line["dropped"] == {VICTIM: "advertise: declined (budget)"}
    # What it has spent tells of other runs: nothing of it reached the server.
    assert "0.001" not in str([line["aborted"], line["dropped"], line["declined"], line["rejected"]])
    assert "epsilon" not in network.server.log.read_text()


def test_settings_that_only_a_simulation_has_are_refused(make_network):
    for changes in (
        {"federation": {"dropout": 0.1}},
        {"federation": {"ledgers": "/somewhere"}},
        {"audit": {"canaries": 3}},
        {"audit": {"record_server_view": True}},
    ):
        with pytest.raises(ConfigError, match="not in a federation of machines"):
            make_network(changes)


def test_a_client_that_never_gets_a_hello_is_in_no_round(make_network):
    network = make_network()
    opened = service.open_service(network.clients[VICTIM], ask_passphrase=str, progress=SILENT)
    assert isinstance(opened, ClientService)
    for phase in ("advertise", "share_keys", "mask", "confirm", "unmask", "settle", "surprise"):
        reply = Reply.from_bytes(opened.answer(Request(phase, b"x").to_bytes()))
        assert (reply.kind, reply.code, reply.body) == ("silent", "round", b"")
    assert Reply.from_bytes(opened.answer(b"\xff")).code == "request"


def test_more_records_than_everybody_is_said_to_have_are_refused(make_network):
    from fedpt_secure.errors import PrivacyError

    network = make_network({"insecure_deterministic": False})
    folder = network.clients[VICTIM]
    write_settings(folder.path, ClientSettings(client_id=VICTIM, records_at_most=3))
    with pytest.raises(PrivacyError, match="records_at_most"):
        service.open_service(folder, ask_passphrase=str, progress=SILENT)


def test_a_server_with_another_bound_of_records_gets_no_answer(make_network):
    network = make_network({"federation": {"rounds": 1}}, patience=SHORT.model_copy(update={"give_up_seconds": 2.0}))
    network.start_clients()
    settings = network.server.settings()
    write_settings(network.server.path, settings.model_copy(update={"records_at_most": 500}))
    assert network.finish(network.start_server()) == 7
    assert not any(folder.joined.exists() for folder in network.clients.values())


def test_a_round_whose_clients_have_left_for_good_is_skipped_where_the_settings_say_so(make_network):
    """Of nine clients three are gone: rounds that ask too many of them are aborted, the others complete."""
    patience = SHORT.model_copy(update={"gather_seconds": 1.0, "give_up_seconds": 2.0, "then": "skip"})
    network = make_network({"federation": {"rounds": 9, "cohort": 4, "minimum_survivors": 3}}, patience=patience)
    gone = set(NAMES[:3])
    network.start_clients(*[name for name in NAMES if name not in gone])
    assert network.finish(network.start_server()) == 0
    lines = RunDirectory.open(network.server.run).read_log("transcript")
    aborted = [bool(line["aborted"]) for line in lines]
    assert aborted == [len(gone & set(line["cohort"])) > 1 for line in lines]
    assert set(aborted) == {True, False}


def test_a_run_is_not_gone_on_with_by_a_program_that_counts_otherwise(make_network):
    network = make_network({"federation": {"rounds": 2}})
    network.start_clients()

    def killed_after_a_round():
        from fedpt_secure.network.observer import Observer

        Observer.round_over = lambda self, transcript: die()

    assert network.finish(network.start_server(killed_after_a_round)) == -9

    def other_noise():
        from fedpt_secure.network import coordinator

        original = coordinator.calibrate
        coordinator.calibrate = lambda config, schedule: original(config, schedule) * 1.01

    assert network.finish(network.start_server(other_noise)) == 8
    assert "cost its clients" in read_status(network.server.status).why
    assert network.finish(network.start_server()) == 0

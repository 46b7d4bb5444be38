"""A client's worker: the only process with its records, its keys and its bare update. It answers one at a time.

What a round needs is in this process's memory and nowhere else: killed, it drops out of the round, and its ledger has
counted what may have left. Its last answer of each phase is kept, so that a server that was killed before it had
written the answer down can ask for the same bytes again; a second, different request in one phase is not answered.
"""

from __future__ import annotations

import hashlib
import os
import threading
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

from fedpt_secure.config import RunConfig
from fedpt_secure.crypto import CryptoError, Hello, MessageError, OwnIdentity, Presence, Roster, load_identity
from fedpt_secure.data import Cache, ClientText, load_federated_text
from fedpt_secure.errors import (
    AlreadyReleased,
    BudgetExceeded,
    ConfigError,
    DataError,
    IdentityError,
    LedgerError,
    PrivacyError,
    RoundError,
)
from fedpt_secure.federation import ClientWorker
from fedpt_secure.federation.announcement import Announcement
from fedpt_secure.federation.prepared_text import client_examples
from fedpt_secure.federation.schedule import cohort_schedule
from fedpt_secure.federation.setup import load_training_models
from fedpt_secure.federation.terms import agreed_terms, calibrate, client_randomness
from fedpt_secure.federation.tiers import require_memory
from fedpt_secure.federation.transcript import PHASES
from fedpt_secure.lm.small import SmallLM
from fedpt_secure.network.event_log import EventLog
from fedpt_secure.network.folder import ClientFolder, ClientSettings
from fedpt_secure.network.joined_run import join_run, joined_run, mark_ledger, require_not_older
from fedpt_secure.network.local_socket import LocalServer, OneThread
from fedpt_secure.network.status import StatusFile, new_status
from fedpt_secure.network.terms import network_config, network_digest, require_meaningful
from fedpt_secure.network.transport import HELLO, LARGEST_BODY, SETTLE, Reply, Request, Settle
from fedpt_secure.privacy import Ledger, SmallExample
from fedpt_secure.progress import Progress

_COUNTED = ("advertise", "mask", "confirm", "unmask")
"""Phases after which the ledger has more entries."""


class ClientService:
    """Answers a server's requests for one client.

    **Guarantees** Nothing leaves but the protocol's bytes, the client's id signed, and single words. No request makes
    it train twice in a round, release more than its terms and its owner's budget allow, or take part in a second run.

    Args:
        folder: the client's.
        config: the run's, settled for the roster's clients.
        identity, roster: who it is, and who everybody is.
        examples: its training records.
        small: the model it trains.
        ledger: what its records were used for.
    """

    def __init__(
        self,
        folder: ClientFolder,
        config: RunConfig,
        *,
        identity: OwnIdentity,
        roster: Roster,
        examples: tuple[SmallExample, ...],
        small: SmallLM,
        ledger: Ledger,
    ) -> None:
        self._folder, self._config = folder, config
        self._records_at_most = folder.settings().records_at_most
        self._identity, self._roster = identity, roster
        self._examples, self._small, self._ledger = examples, small, ledger
        self._schedule = cohort_schedule(
            tuple(roster), rounds=config.federation.rounds, cohort=config.federation.agreed_cohort, seed=config.seed
        )
        self._noise_multiplier = calibrate(config, self._schedule)
        self._turn = threading.Lock()
        self._worker: ClientWorker | None = None
        self._run_id: bytes | None = None
        self._answers: dict[str, tuple[bytes, Reply]] = {}
        self._log = EventLog(folder.log)
        status = new_status("client")
        status.rounds = config.federation.rounds
        self._status = StatusFile(folder.status, status)
        if (run_id := joined_run(folder.joined)) is not None:
            self._take_part(run_id)

    @property
    def client_id(self) -> str:
        """Who it is."""
        return self._identity.client_id

    def answer(self, content: bytes) -> bytes:
        """The bytes of the reply to a request's bytes. Never raises for what a request says."""
        with self._turn:
            try:
                request = Request.from_bytes(content)
            except RoundError as error:
                self._log.write("refused", code="request", why=error.message[:200])
                return Reply("silent", code="request").to_bytes()
            reply = self._reply(request)
            self._note(request.phase, reply)
            return reply.to_bytes()

    def stopped(self, *, failed: bool = False) -> None:
        """Say in the status that the worker ends."""
        self._status.status.state = "failed" if failed else "stopped"
        self._status.write(now=True)

    def _reply(self, request: Request) -> Reply:
        # Each way out is one word; the sentence stays here.
        try:
            return self._answered(request)
        except BudgetExceeded as error:
            return self._out("declined", error.decline_code, error.message)
        except AlreadyReleased as error:
            return self._out("silent", "released", error.message)
        except LedgerError as error:
            return self._out("silent", "ledger", error.message)
        except (RoundError, MessageError) as error:
            return self._out("silent", "round", error.message)
        except OSError as error:
            return self._out("silent", "disk", error.strerror or "")
        except Exception as error:
            # A message of an unknown exception may quote records; where it came from does not.
            place = traceback.extract_tb(error.__traceback__)[-1]
            return self._out("silent", "error", f"{type(error).__name__} at {place.filename}:{place.lineno}")

    def _out(self, kind: str, code: str, why: str) -> Reply:
        self._log.write("no_answer", code=code, why=why)
        return Reply("declined" if kind == "declined" else "silent", code=code)

    def _answered(self, request: Request) -> Reply:
        if request.phase == HELLO:
            return Reply("answer", self._present(request.body))
        if request.phase == SETTLE:
            self._settle(request.body)
            return Reply("answer")
        if request.phase not in PHASES:
            raise RoundError(f"no such phase: {request.phase[:40]!r}")
        asked = hashlib.sha256(request.body).digest()
        before = self._answers.get(request.phase)
        if before is not None and before[0] == asked:
            return before[1]
        if before is not None and request.phase != PHASES[0]:
            raise RoundError(f"a second, different request in phase {request.phase}")
        body = self._phase(request.phase, request.body)
        if request.phase in _COUNTED:
            mark_ledger(self._folder.ledger_mark, self._ledger.entries())
        reply = Reply("answer", body)
        self._answers[request.phase] = (asked, reply)
        return reply

    def _phase(self, phase: str, body: bytes) -> bytes:
        worker = self._worker
        if worker is None:
            raise RoundError("this client has not joined a run: no hello yet")
        if phase == "advertise":
            self._answers.clear()
            worker.discard()
            announcement = Announcement.from_bytes(body)
            if announcement.run_id == self._run_id and 0 <= announcement.round_index < self._config.federation.rounds:
                # The server begins a round once those before it are durable.
                worker.settle(announcement.round_index)
                self._status.status.round_index = announcement.round_index
            return worker.announce(body, self._small)
        if phase == "mask":
            return worker.train_and_mask(body, self._small)
        steps: Mapping[str, Callable[[bytes], bytes]] = {
            "share_keys": worker.share_keys,
            "confirm": worker.confirm,
            "unmask": worker.unmask,
        }
        return steps[phase](body)

    def _present(self, body: bytes) -> bytes:
        hello = Hello.from_bytes(body)
        if hello.roster_digest != self._roster.digest:
            raise RoundError("the server has another roster than this client")
        bound = joined_run(self._folder.joined)
        if bound is not None and bound != hello.run_id:
            raise RoundError("the server asks for another run than the one this folder belongs to")
        worker = self._terms_of(hello.run_id)
        if hello.config_digest != worker[1]:
            raise RoundError("the server runs with other settings than this client's config.toml")
        if self._worker is None:
            join_run(self._folder.joined, hello.run_id)
            self._run_id, self._worker = hello.run_id, worker[0]
        return Presence.sign(hello, self.client_id, self._identity.identity).to_bytes()

    def _settle(self, body: bytes) -> None:
        settle = Settle.from_bytes(body)
        if self._worker is None or settle.run_id != self._run_id:
            raise RoundError("a settle of another run")
        if not 0 <= settle.rounds_done <= self._config.federation.rounds:
            raise RoundError(f"a settle of {settle.rounds_done} rounds")
        self._worker.discard()
        self._answers.clear()
        self._worker.settle(settle.rounds_done)

    def _take_part(self, run_id: bytes) -> None:
        self._run_id, self._worker = run_id, self._terms_of(run_id)[0]

    def _terms_of(self, run_id: bytes) -> tuple[ClientWorker, bytes]:
        """A worker for a run, and the digest of its terms."""
        terms = agreed_terms(
            self._config,
            tuple(self._roster),
            self._schedule,
            run_id=run_id,
            small=self._small,
            noise_multiplier=self._noise_multiplier,
        )
        digest = network_digest(terms, self._records_at_most)
        if self._worker is not None and self._run_id == run_id:
            return self._worker, digest
        worker = ClientWorker(
            self.client_id,
            self._examples,
            terms=terms,
            identity=self._identity.identity,
            roster=self._roster,
            ledger=self._ledger,
            randomness=client_randomness(self._config, self.client_id),
        )
        return worker, digest

    def _note(self, phase: str, reply: Reply) -> None:
        status = self._status.status
        self._log.write(
            "answered",
            phase=phase if phase in (*PHASES, HELLO, SETTLE) else "unknown",
            round=status.round_index,
            outcome=reply.kind,
            code=reply.code,
            size=len(reply.body),
        )
        if phase in PHASES:
            status.state, status.phase, status.why = "round", phase, reply.code
        self._status.write(now=True)


def open_service(folder: ClientFolder, *, ask_passphrase: Callable[[], str], progress: Progress) -> ClientService:
    """Read and check everything a client needs; whatever can fail, fails before the server is told that it is there.

    Raises:
        FedptError: settings, roster, identity, records, models, ledger or promise that do not fit.
    """
    settings, roster = folder.settings(), folder.roster()
    config = network_config(folder.config(), clients=len(roster))
    identity = _identity(folder.identity, settings, roster, ask_passphrase)
    text = own_text(settings, config, progress)
    _require_meaningful(settings, config, text, clients=len(roster))
    ledger = Ledger(folder.ledger)
    require_not_older(folder.ledger_mark, ledger.entries())
    models = load_training_models(config, cache=Cache(), progress=progress)
    require_memory(config, models.small)
    return ClientService(
        folder,
        config,
        identity=identity,
        roster=roster,
        examples=tuple(client_examples(text, models, config)),
        small=models.small,
        ledger=ledger,
    )


def serve_client(
    folder: ClientFolder,
    *,
    ask_passphrase: Callable[[], str],
    progress: Progress,
    stop: threading.Event,
    ready: Callable[[], None] = lambda: None,
) -> None:
    """Load everything, listen on the folder's socket, answer until `stop`.

    Args:
        ready: called once requests are answered.

    Raises:
        FedptError: as `open_service`; or another worker listens there.
    """
    place = folder.socket
    service = open_service(folder, ask_passphrase=ask_passphrase, progress=progress)
    log = EventLog(folder.log)
    log.write("listening", client=service.client_id, pid=os.getpid())
    server = LocalServer(
        place,
        OneThread(service.answer),
        largest=LARGEST_BODY,
        failed=lambda error: log.write("refused", code="connection", why=type(error).__name__),
    )
    try:
        ready()
        stop.wait()
    finally:
        server.close()
        service.stopped()
        log.write("stopped", client=service.client_id, pid=os.getpid())


def own_text(settings: ClientSettings, config: RunConfig, progress: Progress) -> ClientText:
    """This client's records.

    Raises:
        DataError: they cannot be read, or the run's source has none of this client.
    """
    if settings.data is not None:
        data = settings.data.model_copy(update={"partition": "equal", "clients": 1})
        text = load_federated_text(data, seed=config.seed, cache=Cache(), progress=progress)
        only = text.clients[0]
        return ClientText(settings.client_id, only.train, only.held_out)
    text = load_federated_text(config.data, seed=config.seed, cache=Cache(), progress=progress)
    for client in text.clients:
        if client.client_id == settings.client_id:
            return client
    raise DataError(
        f"{text.name} has no records of client {settings.client_id!r}",
        hint="its own records: [data] source in the client's federation.toml",
    )


def _identity(path: Path, settings: ClientSettings, roster: Roster, ask: Callable[[], str]) -> OwnIdentity:
    try:
        identity = load_identity(path, ask_passphrase=ask)
        identity.check_roster(roster)
    except CryptoError as error:
        raise IdentityError(f"{path}: {error.message}", hint=error.hint) from error
    except OSError as error:
        raise IdentityError(f"{path} cannot be read: {error.strerror or error}") from error
    if identity.client_id != settings.client_id:
        raise ConfigError(
            f"{path} is the identity of {identity.client_id!r}, federation.toml says {settings.client_id!r}",
            hint="client_id in federation.toml",
        )
    return identity


def _require_meaningful(settings: ClientSettings, config: RunConfig, text: ClientText, *, clients: int) -> None:
    """Delta against what this client knows: its own records, and public bounds of everybody's."""
    own = len(text.train)
    if own > settings.records_at_most:
        raise PrivacyError(
            "this client has more training records than records_at_most says all clients have together",
            hint="records_at_most in federation.toml, the same bound at every client",
        )
    require_meaningful(config, records_at_most=settings.records_at_most, clients=clients, own=own)

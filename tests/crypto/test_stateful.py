"""Any interleaving of silence, duplicates, replays, mix-ups and corrupted bytes: the exact sum, or a typed abort."""

import pytest
from hypothesis import event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from fedpt_secure.crypto import BelowThreshold, ClientState, CryptoError, MessageError, ProtocolStateError, ServerState

PHASES = ["advertise", "share", "mask", "confirm", "unmask"]
SIZE = 7
CLIENTS = st.integers(0, SIZE - 1)
COMPLETE = {"threshold": 4}
SPARSE = {"degree": 4, "threshold": 4, "minimum_survivors": 6}


def machine_for(cohort, parameters):
    """The state machine over a cohort; a factory, because Hypothesis makes instances itself."""
    context = cohort.context(**parameters)
    enough = max(context.threshold, context.minimum_survivors)  # for every phase; in a sparse graph, whoever is missing
    earlier = cohort.round(cohort.context(**parameters, attempt=7))
    for phase in PHASES:
        getattr(earlier, phase)()

    class Interleaving(RuleBasedStateMachine):
        """Clients act and messages arrive in any order; whoever is deceived or silent drops out."""

        @initialize(doomed=st.sets(CLIENTS, max_size=SIZE - enough + 1))
        def start(self, doomed):
            self.doomed = doomed  # clients that may be deceived or give up; one more than the round can bear
            self.round = cohort.round(context)
            self.phase = 0
            self.said = {}  # (phase, client) -> genuine message
            self.arrived = set()  # clients heard in this phase

        @property
        def running(self):
            return self.phase < len(PHASES)

        def name(self, client):
            return cohort.ids[client]

        @precondition(lambda self: self.running)
        @rule(client=CLIENTS)
        def client_answers(self, client):
            phase, name = PHASES[self.phase], self.name(client)
            try:
                answer = self.round.answer(phase, name, self.round.server_message(phase, name))
            except CryptoError:
                return
            self.said[phase, client] = answer

        @precondition(lambda self: self.running)
        @rule(client=CLIENTS)
        def message_arrives(self, client):
            phase = PHASES[self.phase]
            if (phase, client) in self.said:
                try:
                    self.round.hand_in(phase, self.name(client), self.said[phase, client])
                except MessageError:
                    return
                assert client not in self.arrived
                self.arrived.add(client)

        @precondition(lambda self: self.running)
        @rule()
        def rest_of_the_phase_goes_well(self):
            for client in range(SIZE):
                self.client_answers(client)
                self.message_arrives(client)
            self.phase_closes(hasty=1)

        @precondition(lambda self: self.running)
        @rule(client=CLIENTS, position=st.integers(0, 10_000), octet=st.integers(1, 255))
        def corrupted_message_arrives(self, client, position, octet):
            phase = PHASES[self.phase]
            message = bytearray(self.said.get((phase, client), b"\x00"))
            message[position % len(message)] ^= octet
            self.refused(phase, client, bytes(message))

        @precondition(lambda self: self.running)
        @rule(client=CLIENTS, other=CLIENTS, phase=st.sampled_from(PHASES), old=st.booleans())
        def misplaced_message_arrives(self, client, other, phase, old):
            """A message of another round, another phase or another client."""
            now = PHASES[self.phase]
            if old:
                self.refused(now, client, earlier.sent[phase][self.name(other)])
            elif (phase, other) in self.said and (phase, other) != (now, client):
                self.refused(now, client, self.said[phase, other])

        def refused(self, phase, client, message):
            try:
                self.round.hand_in(phase, self.name(client), message)
            except MessageError:
                return
            raise AssertionError("a message was accepted that nobody sent")

        @precondition(lambda self: 0 < self.phase < len(PHASES))
        @rule(client=CLIENTS, position=st.integers(0, 10_000), octet=st.integers(1, 255))
        def client_is_told_corrupted_bytes(self, client, position, octet):
            if client not in self.doomed:
                return
            phase, name = PHASES[self.phase], self.name(client)
            message = bytearray(self.round.server_message(phase, name) or b"\x00")
            message[position % len(message)] ^= octet
            try:
                answer = self.round.answer(phase, name, bytes(message))
            except CryptoError:
                return
            # It passed as another claim about who takes part; then the answer must be of no use.
            self.refused(phase, client, answer)

        @precondition(lambda self: self.running)
        @rule(client=CLIENTS)
        def client_gives_up(self, client):
            if client in self.doomed:
                self.round.clients[self.name(client)].discard()

        @precondition(lambda self: self.running)
        @rule(hasty=st.integers(0, 9))
        def phase_closes(self, hasty):
            if len(self.arrived) < enough and hasty:
                return
            heard, self.arrived = self.arrived, set()
            phase = PHASES[self.phase]
            self.phase += 1
            try:
                if phase == "unmask":
                    self.the_sum_is_exact(self.round.server.aggregate())
                else:
                    self.round.close(phase)
            except BelowThreshold:
                assert len(heard) < enough
                assert self.round.server.state is ServerState.ABORTED
                event("aborted")
                self.phase = len(PHASES)

        @precondition(lambda self: not self.running)
        @rule(client=CLIENTS, phase=st.sampled_from(PHASES))
        def nothing_works_afterwards(self, client, phase):
            try:
                self.round.hand_in(phase, self.name(client), self.said.get((phase, client), b""))
            except ProtocolStateError:
                pass
            else:
                raise AssertionError("a finished server took a message")

        def the_sum_is_exact(self, total):
            survivors = self.round.server.survivors
            assert len(survivors) >= enough
            assert (total == self.round.plain_sum(survivors)).all()
            event("summed")

        def teardown(self):
            for client in self.round.clients.values():
                if client.state in (ClientState.FINISHED, ClientState.ABORTED):
                    assert not client._held_shares

    return Interleaving


@pytest.mark.parametrize("parameters", [COMPLETE, SPARSE], ids=["complete graph", "sparse graph"])
def test_any_interleaving_gives_the_exact_sum_or_a_typed_abort(make_cohort, parameters):
    run_state_machine_as_test(
        machine_for(make_cohort(SIZE), parameters),
        settings=settings(deadline=None, max_examples=80, stateful_step_count=40),
    )

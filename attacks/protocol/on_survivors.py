"""What a malicious server tries with survivor lists. Each attack returns whether it had what it wants."""

from __future__ import annotations

from collections.abc import Iterable

from fedpt_secure.attacks.protocol.adversary import Adversary
from fedpt_secure.attacks.protocol.cohort import Cohort, Cohorts, Round
from fedpt_secure.attacks.protocol.forging import (
    confirmation_list,
    signed_entry,
    statement_on,
    survivor_list,
    with_entry,
)
from fedpt_secure.crypto import ClientPolicy, Identity, RoundContext
from fedpt_secure.crypto import messages as m
from fedpt_secure.crypto.directory import Directory
from fedpt_secure.crypto.key_agreement import KeyPair


def called_lost(make_cohort: Cohorts) -> object:
    """The victim is asked to sign that its own vector never came. Wanted: its signature."""
    cohort = make_cohort(5)
    a_round = cohort.round(cohort.context(threshold=4)).advertise().share().mask()
    return a_round.clients[cohort.ids[0]].confirm(survivor_list(a_round, range(1, 5)))


def survivors_that_never_shared(make_cohort: Cohorts) -> object:
    """Wanted: a signature on a list that names a client whose shares nobody holds."""
    cohort = make_cohort(6)
    a_round = cohort.round(cohort.context(threshold=4)).advertise().share(cohort.ids[:5]).mask(cohort.ids[:5])
    return a_round.clients[cohort.ids[0]].confirm(survivor_list(a_round, range(6)))


def more_dropouts_than_allowed(make_cohort: Cohorts) -> object:
    """Three of six are called lost, where one may be. Wanted: a signature on the list of the rest."""
    cohort = make_cohort(6)
    a_round = cohort.round(cohort.context(threshold=2, minimum_survivors=5), policy=_LAX).advertise().share().mask()
    return a_round.clients[cohort.ids[0]].confirm(survivor_list(a_round, range(3)))


def more_lost_holders_than_allowed(make_cohort: Cohorts) -> object:
    """Fewer holders survive than the threshold. Wanted: a signature on the list of the rest."""
    cohort = make_cohort(6)
    a_round = cohort.round(cohort.context(threshold=5)).advertise().share().mask()
    return a_round.clients[cohort.ids[0]].confirm(survivor_list(a_round, range(4)))


class _Lax(ClientPolicy):
    """A policy that lets weak rounds begin, so that the checks of later phases can be seen."""

    def check(self, context: RoundContext) -> None:
        pass


_LAX = _Lax()


def _confirmed(a_round: Round, cohort: Cohort, who: Iterable[int]) -> dict[int, bytes]:
    """All clients are shown everybody as survivors; the signatures of `who` are collected."""
    everybody = survivor_list(a_round, range(len(cohort.ids)))
    signatures = {}
    for position, name in enumerate(cohort.ids):
        answer = m.decode(a_round.clients[name].confirm(everybody), m.Confirmation, a_round.context)
        if position in who:
            signatures[position] = answer.signature
    return signatures


def unsigned_list(make_cohort: Cohorts) -> object:
    """Confirmations that nobody made. Wanted: the client's shares."""
    cohort = make_cohort(4)
    a_round = cohort.round().advertise().share().mask()
    signatures = _confirmed(a_round, cohort, range(4)) | dict.fromkeys(range(1, 4), bytes(64))
    return a_round.clients[cohort.ids[0]].unmask(confirmation_list(a_round, signatures))


def signatures_from_outside(make_cohort: Cohorts) -> object:
    """An accomplice that is not on the list signs it, to make up the number. Wanted: the client's shares."""
    cohort = make_cohort(6)
    a_round = cohort.round(cohort.context(threshold=4)).advertise().share().mask()
    shown = survivor_list(a_round, range(4))
    signatures = {}
    for position in range(3):
        answer = a_round.clients[cohort.ids[position]].confirm(shown)
        signatures[position] = m.decode(answer, m.Confirmation, a_round.context).signature
    statement = statement_on(a_round, cohort, sharers=range(6), survivors=range(4))
    signatures[5] = cohort.identities[cohort.ids[5]].sign(statement)
    return a_round.clients[cohort.ids[0]].unmask(confirmation_list(a_round, signatures))


def too_few_confirmations(make_cohort: Cohorts) -> object:
    """One region of a sparse graph has signed, with all holders of the client's shares. Wanted: its shares."""
    cohort = make_cohort(16)
    context = cohort.context(degree=4, threshold=4, minimum_survivors=9)
    a_round = cohort.round(context).advertise().share().mask()
    graph = Directory.from_bytes(a_round.directory, context, cohort.roster).graph
    return a_round.clients[cohort.ids[0]].unmask(
        confirmation_list(a_round, _confirmed(a_round, cohort, graph.holders(0)))
    )


def confirmations_from_far_away(make_cohort: Cohorts) -> object:
    """A quorum has signed, but hardly anybody that holds shares of the client's. Wanted: its shares."""
    cohort = make_cohort(16)
    context = cohort.context(degree=4, threshold=5, minimum_survivors=9)
    a_round = cohort.round(context).advertise().share().mask()
    graph = Directory.from_bytes(a_round.directory, context, cohort.roster).graph
    far = [position for position in range(16) if position not in graph.neighbours(0)]
    signatures = _confirmed(a_round, cohort, far)
    return a_round.clients[cohort.ids[0]].unmask(confirmation_list(a_round, signatures))


def second_call(make_cohort: Cohorts) -> object:
    """The client is asked for its shares again. Wanted: a second answer."""
    cohort = make_cohort(3)
    a_round = cohort.round().advertise().share().mask().confirm().unmask()
    return a_round.clients[cohort.ids[0]].unmask(a_round.confirmations)


def different_survivor_lists(make_cohort: Cohorts) -> object:
    """Every client is shown another list of four of six. Wanted: the sum of three, where every client insists on four.

    No list is shown twice, so that the mask keys of the first three and the seeds of the last three are released four
    times each.
    """
    cohort = make_cohort(6)
    a_round = cohort.round(cohort.context(threshold=4, minimum_survivors=4)).advertise().share().mask()
    ids, adversary = cohort.ids, Adversary(a_round, cohort.roster)
    left_out = {0: (1, 2), 1: (0, 2), 2: (0, 1), 3: (0, 1), 4: (1, 2), 5: (0, 2)}
    lists = {
        ids[viewer]: [name for position, name in enumerate(ids) if position not in out]
        for viewer, out in left_out.items()
    }
    signatures = {name: adversary.confirm(name, shown) for name, shown in lists.items()}
    for name, shown in lists.items():
        adversary.unmask(name, shown, {other: signatures[other] for other in shown})
    return (adversary.open(ids[3:]) == a_round.plain_sum(ids[3:])).all()


def both_shares_of_a_peer(make_cohort: Cohorts) -> object:
    """First a list with everybody, then lists without each of the victim's peers. Wanted: the victim's vector."""
    cohort = make_cohort(4)
    a_round = cohort.round(cohort.context(threshold=3)).advertise().share().mask()
    adversary, victim = Adversary(a_round, cohort.roster), cohort.ids[0]
    for left_out in (None, *cohort.ids[1:]):
        names = [name for name in cohort.ids if name != left_out]
        signatures = {name: adversary.confirm(name, names) for name in names}
        for name in names:
            adversary.unmask(name, names, signatures)
    return (adversary.open([victim]) == a_round.vectors[victim]).all()


def keys_swapped(make_cohort: Cohorts) -> object:
    """The server signs keys of its own in a client's name. Wanted: shares that were meant for that client."""
    cohort = make_cohort(4)
    a_round = cohort.round().advertise()
    own = KeyPair(bytearray(b"c" * 32))
    entry = signed_entry(a_round.context, Identity.generate(), 1, channel=own.public)
    return a_round.clients[cohort.ids[0]].share_keys(with_entry(a_round, 1, entry))


def planted_weights(make_cohort: Cohorts) -> object:
    """One client is given other weights than the rest (Pasquini et al. 2022). Wanted: that it shares keys with them."""
    cohort = make_cohort(4)
    deceived = cohort.client(cohort.ids[0], cohort.context(model_digest=b"planted weights".ljust(32)))
    deceived.advertise()
    return deceived.share_keys(cohort.round().advertise().directory)

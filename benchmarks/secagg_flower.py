"""The same masking and unmasking by Flower's own SecAgg+ functions, beside ours.

Flower's code is called, not copied: `_setup`, `_share_keys`, `_collect_masked_vectors` and `_unmask` of its client mod,
`SecAggPlusWorkflow.unmask_stage` of its server with a stand-in for the transport, and, for the masks alone, the calls
that its client mod makes. Both sides have the same float32 vector, the same neighbours (everybody), threshold and
dropouts. Each uses the machine as it can: ours expands masks on all threads, Flower's masks have one, and its Shamir
starts threads of its own.

Flower's masks come from `flwr.common.secure_aggregation.secaggplus_utils.pseudo_rand_gen` (read in flwr 1.41): the
32-byte seed is folded into 32 bits by exclusive or, which seed NumPy's Mersenne Twister. That is no cryptographic
generator: 2^32 seeds can be tried, and 624 outputs give the state. Ours is AES-256. So a ratio compares a secure mask
with an insecure one.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from secagg_protocol import Cohort
from secagg_timing import WrongSum, check_sum, interleaved, timed

from fedpt_secure.crypto import RingVector, SecAggClient, SecAggServer
from fedpt_secure.crypto.directory import Directory
from fedpt_secure.crypto.masks import pair_mask, self_mask
from fedpt_secure.crypto.prg import SignedKey, apply_masks

_MODULUS = 1 << 32
_LEVELS = 1 << 22  # Flower's defaults for these two and the next two
_CLIP = 8.0
_WEIGHT = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowerComparison:
    """The best seconds of the runs; ratios are Flower's seconds over ours.

    Attributes:
        n: clients; everybody is everybody's neighbour.
        elements: of the vector.
        dropouts: clients lost after they shared their keys.
        threads: that ours may use for masks.
        client_ratio: all masks of one client: key agreement with every neighbour, generation, addition; ours on one
            thread or on all, whichever is faster.
        client_ratio_one_thread: the same with ours on one thread.
        client_step_ratio: one client's whole step: shares opened, rounding, masks, the message; ours also hashes and
            signs.
        server_ratio: the server's last step: secrets rebuilt, self masks of survivors and pairwise masks of dropouts
            removed, the sum decoded.
    """

    n: int
    elements: int
    dropouts: int
    threads: int
    client_ratio: float
    client_ratio_one_thread: float
    client_step_ratio: float
    server_ratio: float
    client_seconds: float
    flower_client_seconds: float
    server_seconds: float
    flower_server_seconds: float


def flower_is_missing() -> str | None:
    """Why the comparison has to be left out, or None."""
    if importlib.util.find_spec("flwr") is None:
        return "flwr is not installed (pip install 'fedpt-secure[bench]')"
    return None


def flower_version() -> str | None:
    """The installed version of flwr."""
    return None if flower_is_missing() else importlib.metadata.version("flwr")


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"flwr.{name}")


class FlowerCohort:
    """Clients of Flower's protocol that have shared their keys."""

    def __init__(self, n: int, threshold: int, advance: Callable[[], None]) -> None:
        # flwr reports its use unless it is told not to before it is imported.
        os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
        self._mod = _module("client.mod.secure_aggregation.secaggplus_mod")
        self._workflow = _module("server.workflow.secure_aggregation.secaggplus_workflow")
        self._record = _module("app").ConfigRecord
        logging.getLogger("flwr").setLevel(logging.WARNING)
        self.threshold = threshold
        self.nodes = tuple(range(1, n + 1))
        self._states = {node: self._mod.SecAggPlusState() for node in self.nodes}
        settings = {
            "sample_num": n,
            "share_num": n,
            "threshold": threshold,
            "clipping_range": _CLIP,
            "target_range": _LEVELS,
            "mod_range": _MODULUS,
            "max_weight": float(_WEIGHT),
        }
        self._keys = {}
        for node, state in self._states.items():
            state.nid = node
            keys = self._mod._setup(state, self._record(settings))
            self._keys[node] = [keys["pk1"], keys["pk2"]]
        self._inboxes: dict[int, dict[int, bytes]] = {node: {} for node in self.nodes}
        for node, state in self._states.items():
            shared = self._mod._share_keys(state, {str(peer): tuple(keys) for peer, keys in self._keys.items()})
            for receiver, sealed in zip(shared["dsts"], shared["ctxts"], strict=True):
                self._inboxes[receiver][node] = sealed
            advance()
        for node in self.nodes:
            # Flower's client opens its neighbours' shares when it masks: so that all have them, all mask something.
            self.masking(node, np.zeros(1, dtype=np.float32))()

    def masking(self, node: int, values: np.ndarray) -> Callable[[], list[bytes]]:
        """Flower's masking step of one client, ready to run: it gives the arrays that the client sends, serialised."""
        inbox = self._inboxes[node]
        configs = {"ctxts": list(inbox.values()), "srcs": list(inbox)}
        parameters = _module("common").ndarrays_to_parameters([values])
        step = self._mod._collect_masked_vectors
        return lambda: step(self._states[node], configs, _WEIGHT, parameters)["masked_params"]

    def add_masks(self, node: int, parameters: list[np.ndarray]) -> list[np.ndarray]:
        """The masks of one client, by the calls of `_collect_masked_vectors`, in its order, and nothing else of it."""
        mod, state = self._mod, self._states[node]
        shapes = [part.shape for part in parameters]
        masked = mod.parameters_addition(parameters, mod.pseudo_rand_gen(state.rd_seed, _MODULUS, shapes))
        for peer in self._inboxes[node]:
            shared_key = mod.generate_shared_key(
                mod.bytes_to_private_key(state.sk1), mod.bytes_to_public_key(state.public_keys_dict[peer][0])
            )
            mask = mod.pseudo_rand_gen(shared_key, _MODULUS, shapes)
            combine = mod.parameters_addition if node > peer else mod.parameters_subtraction
            masked = combine(masked, mask)
        return mod.parameters_mod(masked, _MODULUS)

    def unmasking(self, total: list[np.ndarray], dropouts: frozenset[int]) -> Callable[[], Any]:
        """Flower's last step of the server, ready to run once, on a sum of masked vectors.

        It gives the mean of the vectors, serialised.
        """
        survivors = [node for node in self.nodes if node not in dropouts]
        replies = []
        for node in self.nodes:
            configs = {"active_nids": survivors, "dead_nids": sorted(dropouts)}
            if node not in dropouts:
                shares = self._mod._unmask(self._states[node], configs)
                replies.append(_reply(node, shares))
        state = self._workflow.WorkflowState(
            sampled_node_ids=set(self.nodes),
            active_node_ids=set(survivors),
            num_shares=len(self.nodes),
            threshold=self.threshold,
            clipping_range=_CLIP,
            quantization_range=_LEVELS,
            mod_range=_MODULUS,
            max_weight=float(_WEIGHT),
            nid_to_neighbours={node: set(self.nodes) for node in self.nodes},
            nid_to_publickeys=self._keys,
            aggregate_ndarrays=total,
        )
        result = SimpleNamespace(parameters=None)
        state.legacy_results = [(None, result)]
        grid = SimpleNamespace(send_and_receive=lambda messages, timeout: replies)
        context = SimpleNamespace(
            state=SimpleNamespace(config_records={"config": {"current_round": 1}}),
            strategy=SimpleNamespace(aggregate_fit=lambda *_: (None, {})),
        )
        workflow = self._workflow.SecAggPlusWorkflow(len(self.nodes), self.threshold)
        # Its requests to clients, which go nowhere here, name what a deployed server would have been told.
        identity = _module("supercore.task_identity").TaskIdentity
        identity.task_id = identity.run_id = identity.node_id = 0

        def run() -> Any:
            if not workflow.unmask_stage(grid, context, state):
                raise WrongSum("Flower gave up the round")
            return result.parameters

        return run


def _reply(node: int, content: dict[str, Any]) -> SimpleNamespace:
    records = SimpleNamespace(config_records={"secaggplus_configs": content})
    return SimpleNamespace(has_error=lambda: False, metadata=SimpleNamespace(src_node_id=node), content=records)


def check_flower(n: int = 5) -> None:
    """Run a small round through `FlowerCohort`, one client lost: what is timed must compute what Flower computes.

    Raises:
        WrongSum: the mean is not that of the survivors' vectors.
    """
    cohort = FlowerCohort(n, threshold=3, advance=lambda: None)
    vectors = {node: np.linspace(-node, node, 50, dtype=np.float32) / n for node in cohort.nodes}
    lost = frozenset({2})
    survivors = [node for node in cohort.nodes if node not in lost]
    common, arithmetic = _module("common"), _module("common.secure_aggregation.ndarrays_arithmetic")
    sent = [[common.bytes_to_ndarray(part) for part in cohort.masking(node, vectors[node])()] for node in survivors]
    total = arithmetic.parameters_mod(functools.reduce(arithmetic.parameters_addition, sent), _MODULUS)
    mean = common.parameters_to_ndarrays(cohort.unmasking(total, lost)())[0]
    expected = np.mean([vectors[node] for node in survivors], axis=0)
    if np.abs(mean - expected).max() > 3 * _CLIP / _LEVELS * n:
        raise WrongSum("Flower's functions, as called here, do not give the mean of the survivors' vectors")


def compare_with_flower(
    flower: FlowerCohort, elements: int, *, threads: int, rounds: int, advance: Callable[[], None]
) -> FlowerComparison:
    """Both sides, in turn. `advance` is called once a surviving client and once for each of three further steps.

    Raises:
        WrongSum: our server's sum is not that of the survivors' vectors.
    """
    cohort = Cohort(len(flower.nodes), elements)
    # A server takes the masks off once in its life, so there are two, which hear the same.
    servers = [SecAggServer(context=cohort.context, roster=cohort.roster, workers=threads) for _ in range(2)]
    clients = {name: cohort.client(name, workers=threads) for name in cohort.ids}

    def tell(method: str, *arguments: Any) -> Any:
        answers = [getattr(server, method)(*arguments) for server in servers]
        return answers[0]

    for name in cohort.ids:
        tell("receive_advertisement", name, clients[name].advertise())
    directory = tell("publish_keys")
    for name in cohort.ids:
        tell("receive_shares", name, clients[name].share_keys(directory))
    inboxes = tell("route_shares")

    expected = np.zeros(elements, dtype=np.uint32)
    step, flower_step = float("inf"), float("inf")
    for turn, name in enumerate(cohort.survivors):
        values = cohort.values(name)
        spent, (vector, message) = timed(_masking_step, cohort, clients[name], inboxes[name], values)
        step = min(step, spent)
        # A client of ours masks once in its life: each round of the timing is another client's turn.
        if turn < rounds:
            flower_step = min(flower_step, timed(flower.masking(flower.nodes[turn], values))[0])
        expected += vector
        tell("receive_masked", name, message)
        advance()
    survivor_list = tell("publish_survivors")
    for name in cohort.survivors:
        tell("receive_confirmation", name, clients[name].confirm(survivor_list))
    confirmations = tell("publish_confirmations")
    for name in cohort.survivors:
        tell("receive_unmasking", name, clients[name].unmask(confirmations))

    add_masks = _adding_masks(cohort, directory)
    levels = [np.zeros(1, dtype=np.int64), np.zeros(elements, dtype=np.int64)]
    many, one, flower_masks = interleaved(
        [lambda: add_masks(threads), lambda: add_masks(1), lambda: flower.add_masks(flower.nodes[0], levels)], rounds
    )
    advance()

    def unmask(server: SecAggServer) -> float:
        spent, total = timed(server.aggregate)
        decoding = timed(lambda: cohort.encoding.decode_sum(total, survivors=len(cohort.survivors)))[0]
        check_sum(total, expected, f"unmasking beside Flower, {len(cohort.ids)} clients, {elements} elements")
        return spent + decoding

    # Which bits are in Flower's sum makes no difference to the time: zeros stand for it, beside its factor.
    lost = frozenset(flower.nodes[cohort.ids.index(name)] for name in cohort.dropouts)
    unmask_flower = flower.unmasking(levels, lost)
    before = unmask(servers[0])
    advance()
    flower_server = timed(unmask_flower)[0]
    server = min(before, unmask(servers[1]))
    advance()
    return FlowerComparison(
        n=len(cohort.ids),
        elements=elements,
        dropouts=len(cohort.dropouts),
        threads=threads,
        client_ratio=flower_masks / min(many, one),
        client_ratio_one_thread=flower_masks / one,
        client_step_ratio=flower_step / step,
        server_ratio=flower_server / server,
        client_seconds=min(many, one),
        flower_client_seconds=flower_masks,
        server_seconds=server,
        flower_server_seconds=flower_server,
    )


def _masking_step(cohort: Cohort, client: SecAggClient, inbox: bytes, values: np.ndarray) -> tuple[RingVector, bytes]:
    vector = cohort.encoding.encode(values)
    return vector, client.mask(inbox, vector)


def _adding_masks(cohort: Cohort, directory_message: bytes) -> Callable[[int], None]:
    """What `SecAggClient.mask` does for its masks and nothing else of it, to be called with a number of threads."""
    context = cohort.context
    directory = Directory.from_bytes(directory_message, context, cohort.roster)
    seed, private = bytearray(os.urandom(32)), bytearray(os.urandom(32))
    vector = np.zeros(context.vector_length, dtype=np.uint32)

    def run(threads: int) -> None:
        masks: list[SignedKey] = [(1, self_mask(seed, owner=0, directory=directory, context=context))]
        for peer in directory.graph.neighbours(0):
            masks.append(pair_mask(private, owner=0, peer=peer, directory=directory, context=context))
        apply_masks(vector, masks, workers=threads)

    return run

"""Calibration, accounting, the DP-SGD step, the client's ledger and the privacy statement."""

from fedpt_secure.privacy.accounting import (
    ACCOUNTANT,
    GaussianSteps,
    calibrate_noise,
    epsilon_spent,
    merge,
    round_up,
)
from fedpt_secure.privacy.adaptive_clipping import QuantileClipping
from fedpt_secure.privacy.budget import UNITS, Budget, Mode, Unit
from fedpt_secure.privacy.client_vectors import clipped_client_update, sampled_gradient_sum
from fedpt_secure.privacy.clipped_sum import ClippedSum, clipped_sum
from fedpt_secure.privacy.dp_sgd import DpSgdSettings, LocalUpdate, train_locally
from fedpt_secure.privacy.examples import SampledPositions, SmallExample, example_loss, example_losses
from fedpt_secure.privacy.ledger import Ledger, Release
from fedpt_secure.privacy.noise import InsecureDeterministicRandom, NoiseSource, SecureRandom
from fedpt_secure.privacy.ring_mechanism import RingMechanism
from fedpt_secure.privacy.statement import Guarantee, PrivacyStatement, local_statement, ring_statement

__all__ = [
    "ACCOUNTANT",
    "UNITS",
    "Budget",
    "ClippedSum",
    "DpSgdSettings",
    "GaussianSteps",
    "Guarantee",
    "InsecureDeterministicRandom",
    "Ledger",
    "LocalUpdate",
    "Mode",
    "NoiseSource",
    "PrivacyStatement",
    "QuantileClipping",
    "Release",
    "RingMechanism",
    "SampledPositions",
    "SecureRandom",
    "SmallExample",
    "Unit",
    "calibrate_noise",
    "clipped_client_update",
    "clipped_sum",
    "epsilon_spent",
    "example_loss",
    "example_losses",
    "local_statement",
    "merge",
    "ring_statement",
    "round_up",
    "sampled_gradient_sum",
    "train_locally",
]

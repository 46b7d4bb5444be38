"""Calibration, accounting, the DP-SGD step, the client's ledger and the privacy statement."""

from fedpt_secure.privacy.accounting import ACCOUNTANT, GaussianSteps, calibrate_noise, epsilon_spent, round_up
from fedpt_secure.privacy.clipped_sum import ClippedSum, clipped_sum
from fedpt_secure.privacy.dp_sgd import DpSgdSettings, LocalUpdate, train_locally
from fedpt_secure.privacy.examples import SmallExample, example_losses
from fedpt_secure.privacy.ledger import Ledger, Release
from fedpt_secure.privacy.noise import InsecureDeterministicRandom, NoiseSource, SecureRandom
from fedpt_secure.privacy.statement import PrivacyStatement, local_statement

__all__ = [
    "ACCOUNTANT",
    "ClippedSum",
    "DpSgdSettings",
    "GaussianSteps",
    "InsecureDeterministicRandom",
    "Ledger",
    "LocalUpdate",
    "NoiseSource",
    "PrivacyStatement",
    "Release",
    "SecureRandom",
    "SmallExample",
    "calibrate_noise",
    "clipped_sum",
    "epsilon_spent",
    "example_losses",
    "local_statement",
    "round_up",
    "train_locally",
]

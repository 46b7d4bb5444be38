"""The large black box and the arithmetic by which a tuned small model steers it."""

from fedpt_secure.proxy.adapter_pair import AdapterPair
from fedpt_secure.proxy.arithmetic import (
    restricted_logprobs,
    shifted_logprobs,
    shifted_token_logprobs,
    spread_logprobs,
    spread_token_logprobs,
    tuning_shift,
)
from fedpt_secure.proxy.biased import generate_biased, shift_bias
from fedpt_secure.proxy.black_box import BlackBoxLM, Capabilities, GuardedBlackBox, Session, guard
from fedpt_secure.proxy.completed import CompletedLM
from fedpt_secure.proxy.connection import black_box_of, connect, usage_document
from fedpt_secure.proxy.continuation_row import EngineCounts, LargeAlone, Request, TokenEvent
from fedpt_secure.proxy.decoding import generate
from fedpt_secure.proxy.distillation import DistillationReport, distil
from fedpt_secure.proxy.engine import DecodingEngine
from fedpt_secure.proxy.http_transport import ApiRefusal, ApiUsage, HttpTransport, TransportSettings
from fedpt_secure.proxy.llama_cpp import LlamaCppSource
from fedpt_secure.proxy.local_transformers import LocalTransformersLM, load_causal_lm
from fedpt_secure.proxy.openai_api import OpenAISource
from fedpt_secure.proxy.public_answers import AnswerCache, AskingCost, PublicAnswers, PublicText, ask_black_box
from fedpt_secure.proxy.restated_session import RestatedSession
from fedpt_secure.proxy.sampling import DecodingSettings, choose_token
from fedpt_secure.proxy.small_pair import SmallPair, SmallSession
from fedpt_secure.proxy.speculation import Speculation
from fedpt_secure.proxy.steering import (
    SteeringRule,
    steered_class_logprobs,
    steered_classes,
    steered_logprobs,
    steered_token_logprobs,
)
from fedpt_secure.proxy.top_logprobs import TopLogprobs
from fedpt_secure.proxy.top_source import RemoteLM, TopSource

__all__ = [
    "AdapterPair",
    "AnswerCache",
    "ApiRefusal",
    "ApiUsage",
    "AskingCost",
    "BlackBoxLM",
    "Capabilities",
    "CompletedLM",
    "DecodingEngine",
    "DecodingSettings",
    "DistillationReport",
    "EngineCounts",
    "GuardedBlackBox",
    "HttpTransport",
    "LargeAlone",
    "LlamaCppSource",
    "LocalTransformersLM",
    "OpenAISource",
    "PublicAnswers",
    "PublicText",
    "RemoteLM",
    "Request",
    "RestatedSession",
    "Session",
    "SmallPair",
    "SmallSession",
    "Speculation",
    "SteeringRule",
    "TokenEvent",
    "TopLogprobs",
    "TopSource",
    "TransportSettings",
    "ask_black_box",
    "black_box_of",
    "choose_token",
    "connect",
    "distil",
    "generate",
    "generate_biased",
    "guard",
    "load_causal_lm",
    "restricted_logprobs",
    "shift_bias",
    "shifted_logprobs",
    "shifted_token_logprobs",
    "spread_logprobs",
    "spread_token_logprobs",
    "steered_class_logprobs",
    "steered_classes",
    "steered_logprobs",
    "steered_token_logprobs",
    "tuning_shift",
    "usage_document",
]

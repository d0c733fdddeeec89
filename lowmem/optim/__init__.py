"""Optimizers and what goes beside them."""

from .adamw8 import AdamW8, Fp8AdamW, state_bytes
from .codec import register_codec
from .groups import lowrank_groups
from .layerwise import Layerwise, layerwise_
from .lora import lora_plus_groups, prox_l1_
from .policy import FisherWindow, OnConverged, OnSimilar
from .presets import FRUGAL, AdaRankGrad, Apollo, ApolloMini, Fira, GaLore, GradNormLoRP, NaturalGaLore, QGaLore
from .proj_adamw import ProjAdamW
from .projected import project_

__all__ = [
    "FRUGAL",
    "AdaRankGrad",
    "AdamW8",
    "Apollo",
    "ApolloMini",
    "Fira",
    "FisherWindow",
    "Fp8AdamW",
    "GaLore",
    "GradNormLoRP",
    "Layerwise",
    "NaturalGaLore",
    "OnConverged",
    "OnSimilar",
    "ProjAdamW",
    "QGaLore",
    "layerwise_",
    "lora_plus_groups",
    "lowrank_groups",
    "project_",
    "prox_l1_",
    "register_codec",
    "state_bytes",
]

"""Where models come from: one file per source."""

from longroll.families.architectures import FAMILIES, Family
from longroll.families.fla_models import model_class
from longroll.families.original_mamba import is_original, load_original, to_state_spaces
from longroll.families.plain import MODEL_TYPE, PlainFamily, PlainModel
from longroll.families.registry import BUILT_IN, family_of, known_family, register_family, register_packages
from longroll.families.rwkv_pth import is_rwkv_file, load_rwkv, to_rwkv

__all__ = [
    "BUILT_IN",
    "FAMILIES",
    "MODEL_TYPE",
    "Family",
    "PlainFamily",
    "PlainModel",
    "family_of",
    "is_original",
    "is_rwkv_file",
    "known_family",
    "load_original",
    "load_rwkv",
    "model_class",
    "register_family",
    "register_packages",
    "to_rwkv",
    "to_state_spaces",
]

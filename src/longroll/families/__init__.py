"""Where models come from: one file per source."""

from longroll.families.architectures import FAMILIES, Family, family_of
from longroll.families.fla_models import model_class
from longroll.families.original_mamba import is_original, load_original
from longroll.families.rwkv_pth import is_rwkv_file, load_rwkv

__all__ = [
    "FAMILIES",
    "Family",
    "family_of",
    "is_original",
    "is_rwkv_file",
    "load_original",
    "load_rwkv",
    "model_class",
]

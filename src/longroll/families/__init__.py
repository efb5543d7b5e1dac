"""Where models come from: one file per source."""

from longroll.families.fla import model_class
from longroll.families.mamba_ssm import is_original, load_original
from longroll.families.rwkv_pth import is_rwkv_file, load_rwkv
from longroll.families.transformers import FAMILIES, Family, family_of

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

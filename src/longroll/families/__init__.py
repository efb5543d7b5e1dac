"""Where models come from: one file per source."""

from longroll.families.mamba_ssm import is_original, load_original
from longroll.families.transformers import FAMILIES, Family, family_of

__all__ = ["FAMILIES", "Family", "family_of", "is_original", "load_original"]

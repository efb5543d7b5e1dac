"""Text: documents from anywhere, tokens, and the three ways they are handed out."""

from .corpus import Corpus
from .documents import read_documents
from .hf_tokenizer import HFTokenizer
from .lanes import Lanes
from .rwkv_tokenizer import RWKVTokenizer
from .sequences import bytes_per_token, long_sequences
from .tokenizers import ByteTokenizer, Tokenizer, check_vocabulary, load_tokenizer
from .windows import Windows

__all__ = [
    "ByteTokenizer",
    "Corpus",
    "HFTokenizer",
    "Lanes",
    "RWKVTokenizer",
    "Tokenizer",
    "Windows",
    "bytes_per_token",
    "check_vocabulary",
    "load_tokenizer",
    "long_sequences",
    "read_documents",
]

"""Text: documents from anywhere, tokens, and the three ways they are handed out."""

from .corpus import Corpus
from .documents import read_documents
from .lanes import Lanes
from .sequences import long_sequences
from .tokenizers import ByteTokenizer, HFTokenizer, Tokenizer, check_vocabulary, load_tokenizer
from .windows import Windows

__all__ = [
    "ByteTokenizer",
    "Corpus",
    "HFTokenizer",
    "Lanes",
    "Tokenizer",
    "Windows",
    "check_vocabulary",
    "load_tokenizer",
    "long_sequences",
    "read_documents",
]

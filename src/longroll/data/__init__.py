"""Text: documents from anywhere, tokens, and the ways they are handed out."""

from ._tokenizers import ByteTokenizer, Tokenizer, check_vocabulary, load_tokenizer
from .chat import ChatCorpus, ChatLanes, ChatWindows, is_chat, read_conversations
from .corpus import Corpus
from .documents import read_documents
from .hf_tokenizer import HFTokenizer
from .lanes import Lanes
from .lengths import DocumentLengths
from .rwkv_tokenizer import RWKVTokenizer
from .sequences import bytes_per_token, long_sequences
from .streaming import StreamingLanes
from .windows import Windows

__all__ = [
    "ByteTokenizer",
    "ChatCorpus",
    "ChatLanes",
    "ChatWindows",
    "Corpus",
    "DocumentLengths",
    "HFTokenizer",
    "Lanes",
    "RWKVTokenizer",
    "StreamingLanes",
    "Tokenizer",
    "Windows",
    "bytes_per_token",
    "check_vocabulary",
    "is_chat",
    "load_tokenizer",
    "long_sequences",
    "read_conversations",
    "read_documents",
]

"""Tokenizers of several kinds, trained on a few lines."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

LINES = [
    "The grass is green. The sky is blue. The sun is yellow. 0123456789",
    "Here we go. There and back again, said the old man.\nWhich secret number was told?",
]


def trained(kind: str, *, bos: str | None = None, add_bos: bool = False, eos: str | None = None):
    """A fast tokenizer: "bytes" (GPT-2's), "prefix space" (RoBERTa's), "sentencepiece" (Llama's), "words"."""
    special = [token for token in (bos, eos) if token]
    if kind == "words":
        tokens = Tokenizer(models.WordLevel(unk_token="?"))
        tokens.pre_tokenizer = pre_tokenizers.Whitespace()
        tokens.train_from_iterator(LINES, trainers.WordLevelTrainer(special_tokens=["?", *special]))
    elif kind == "sentencepiece":
        tokens = Tokenizer(models.BPE(byte_fallback=True))
        tokens.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
        tokens.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=[*special, *bytes_])
        tokens.train_from_iterator(LINES * 3, trainer)
    else:
        tokens = Tokenizer(models.BPE())
        tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind == "prefix space")
        tokens.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=special, initial_alphabet=alphabet)
        tokens.train_from_iterator(LINES * 3, trainer)
    if add_bos:
        tokens.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokens.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokens, bos_token=bos, eos_token=eos)

"""A tokenizer that the tests of this folder build."""

import pytest

TEXT = ["The grass is green. The sky is blue. The sun is yellow.", "Here we go. There and back again."]


@pytest.fixture(scope="session")
def bpe_folder(tmp_path_factory) -> str:
    """A byte-level BPE tokenizer trained on a few lines and saved as transformers saves one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("bpe")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=["<end>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(TEXT * 3, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", model_max_length=8)
    fast.save_pretrained(folder)
    return str(folder)

"""The model type `longroll` of lm-evaluation-harness (lm_eval 0.4): `longroll lm-eval --model longroll`.

Prompts of any length stream through the state and nothing is truncated (lm_eval's `mamba_ssm` cuts at 2048
tokens, its `hf` at what the config says). Requests that begin alike, as few-shot examples and questions about
one document do, read their common beginning once. Scores are those of `hf` wherever that does not truncate.
"""

from __future__ import annotations

import logging
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import simple_parse_args_string
from torch import Tensor
from tqdm import tqdm

from longroll.data import HFTokenizer, load_tokenizer
from longroll.errors import LongrollError
from longroll.harness_arguments import check_generation, check_others, with_defaults
from longroll.measure.roll_out import chunk_tokens, roll_out
from longroll.model import load
from longroll.state import RecurrentState
from longroll.tasks.generate import Prefilled, greedy_decode, prefill

logger = logging.getLogger("longroll")

SHARED = 128
"""Tokens that prompts must have in common to be worth a state of their own."""
MOST_PROMPTS = 64
"""Prompts read together, at most, where the batch size is chosen."""
PROMPT_TOKENS = 256
"""Tokens of each prompt in one forward that make the choice: fewer would keep no device busy."""
LINE_END = 10  # begins a text of bytes, which have no special token for it
_SCORED = 2**24  # numbers of logits that exist at once, 64 MiB

Ids = Sequence[int] | np.ndarray


@register_model("longroll")
class LongrollLM(TemplateLM):
    """A model opened by longroll, for lm_eval.

    Args:
        pretrained: see `longroll.load`.
        tokenizer: default: the model's.
        device, dtype, trust_remote_code, plugin: see `longroll.load`.
        batch_size: prompts read together; "auto": as many as keep the device busy.
        max_batch_size: the most that "auto" chooses.
        add_bos_token: begin prompts with BOS; None: with what the tokenizer adds.
        prefix_token_id: stands before a text scored from its beginning; None: BOS, else EOS.
        chunk_size: tokens of a prompt in one forward; None: by memory.
        think_end_token: text or id that ends reasoning; answers are what follows it.
        enable_thinking, chat_template_args: handed to the chat template.
        others: see `longroll.harness_arguments`.

    Raises:
        LongrollError: for an argument that cannot be honoured, and as `longroll.load` and `load_tokenizer`.
    """

    plugin: str | None = None
    """The plug-in named on longroll's command line."""

    def __init__(
        self,
        pretrained: str | None = None,
        *,
        tokenizer: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        trust_remote_code: bool = False,
        plugin: str | None = None,
        chunk_size: int | None = None,
        think_end_token: str | int | None = None,
        enable_thinking: bool | None = None,
        chat_template_args: dict[str, Any] | None = None,
        **others: Any,
    ) -> None:
        super().__init__()
        check_others(others)
        if pretrained is None:
            raise LongrollError("--model_args pretrained=MODEL is missing: a folder, a hub id or specimen.")
        self.chunk_size = None if chunk_size is None else _positive("chunk_size", chunk_size)
        most = MOST_PROMPTS if max_batch_size is None else _positive("max_batch_size", max_batch_size)
        asked = "auto" if batch_size is None else str(batch_size)
        rows = None if asked.startswith("auto") else _positive("batch_size", batch_size)
        if device == "cuda:0" and not torch.cuda.is_available():
            device = None  # lm_eval's default, which `hf` too takes for the best there is
        self.lm = load(
            pretrained,
            device=device,
            dtype=dtype,
            trust_remote_code=bool(trust_remote_code),
            plugin=plugin or self.plugin,
        )
        built = self.lm.wrapped and not Path(pretrained).exists()  # a name that the plug-in knows
        path = None if pretrained == "specimen" or built else pretrained
        self._tokenizer = load_tokenizer(
            tokenizer,
            model_path=path,
            vocab_size=self.lm.vocab_size,
            bos=add_bos_token,
            trust_remote_code=bool(trust_remote_code),
        )
        self.tokenizer = self._tokenizer.tokenizer if isinstance(self._tokenizer, HFTokenizer) else None
        self.batch_size = rows or max(1, min(most, chunk_tokens(self.lm) // PROMPT_TOKENS))
        self.add_bos_token = add_bos_token
        self._prefix_token_id = prefix_token_id
        self.think_end_token = think_end_token
        if isinstance(think_end_token, str) and think_end_token.isdigit():
            self.think_end_token = int(think_end_token)
        thinking = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        self.chat_template_args = {**(chat_template_args or {}), **thinking}
        self._device = self.lm.device
        if self._tokenizer.separator_id is None and self.tokenizer is not None:
            logger.warning(
                "tokenizer %s has no EOS: what the model writes ends at a stop sequence or at max_gen_toks.",
                self._tokenizer.name,
            )

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> LongrollLM:
        """Make the model of `--model_args` as text; what they name goes before flags of their own."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> LongrollLM:
        """Make the model of `--model_args`; what they name goes before flags of their own."""
        flags = {name: value for name, value in (additional_config or {}).items() if value is not None}
        return cls(**{**flags, **arg_dict})

    @property
    def eot_token_id(self) -> int | None:
        """The token that ends a text; None for a tokenizer without EOS."""
        if self._tokenizer.separator_id is None and self.tokenizer is None:
            return LINE_END
        return self._tokenizer.separator_id

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text that is scored from its beginning.

        Raises:
            LongrollError: the tokenizer has neither BOS nor EOS, and no id was given.
        """
        found = self._prefix_or_none()
        if found is None:
            raise LongrollError(
                f"tokenizer {self._tokenizer.name} has neither BOS nor EOS to stand before a text that is "
                "scored from its beginning: name an id by --model_args prefix_token_id=ID."
            )
        return found

    def _prefix_or_none(self) -> int | None:
        if self._prefix_token_id is not None:
            return self._prefix_token_id
        first = None if self.tokenizer is None else self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else first

    @property
    def tokenizer_name(self) -> str:
        """For lm_eval's caches."""
        return self._tokenizer.name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return token ids, with the tokenizer's special tokens unless an argument says otherwise, as `hf`
        does.
        """
        special = self.add_bos_token if add_special_tokens is None else add_special_tokens
        first = self._prefix_or_none()
        if self.tokenizer is not None and add_special_tokens is None and first is not None:
            special = False if string.startswith(self.tokenizer.decode(first)) else special
        if special is None and self.tokenizer is not None:
            return self.tokenizer.encode(string)
        prefix = [] if special is False else self._tokenizer.prefix_ids
        return [*prefix, *self._tokenizer.encode(string).tolist()]

    def tok_decode(self, ids: Ids) -> str:
        """Return the text of ids without special tokens."""
        if self.tokenizer is None:
            return self._tokenizer.decode(ids)
        return self.tokenizer.decode(np.asarray(ids).tolist(), skip_special_tokens=True)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return the text of a chat."""
        if self.tokenizer is None:
            raise LongrollError(f"--apply_chat_template: {self._tokenizer.name} has no chat template.")
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            **self.chat_template_args,
        )

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return log-likelihood of whole texts, each read once from the beginning token to its end."""
        texts = [(None, [self.prefix_token_id], self.tok_encode(request.args[0])) for request in requests]
        totals = [total for total, _ in self._loglikelihood_tokens(texts, disable_tqdm)]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        """Return log-likelihood of each continuation, and whether greedy decoding would give it."""
        asked: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            asked[tuple(request[1])].append(number)
        contexts = list(asked)
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        bar = tqdm(total=len(requests), disable=disable_tqdm, desc="loglikelihood")

        def score(read: Prefilled, rows: list[int]) -> None:
            # each continuation from a copy of the state of its context; those of like length together
            pairs = [(i, number) for i, row in enumerate(rows) for number in asked[contexts[row]]]
            pairs.sort(key=lambda pair: len(requests[pair[1]][2]))
            for start in range(0, len(pairs), self.batch_size):
                some = pairs[start : start + self.batch_size]
                places = [i for i, _ in some]
                copies = Prefilled(places, read.hidden[places], read.state.rows(places))
                found = self._continue(copies, [requests[number][2] for _, number in some])
                for (_, number), answer in zip(some, found, strict=True):
                    answers[number] = answer
                    self.cache_hook.add_partial("loglikelihood", requests[number][0], answer)
                bar.update(len(some))

        self._read_shared(contexts, score)
        bar.close()
        return answers

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return Greedy continuations up to their stop sequences.

        Raises:
            LongrollError: for a request to sample, and other options than those of greedy decoding.
        """
        written = [""] * len(requests)
        kinds: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            kinds[repr(request.args[1])].append(number)
        bar = tqdm(total=len(requests), disable=disable_tqdm, desc="generate_until")
        for numbers in kinds.values():
            options: dict[str, Any] = dict(normalize_gen_kwargs(requests[numbers[0]].args[1]))
            check_generation(options)
            end = self._tokenizer.separator_id
            eos = None if self.tokenizer is None or end is None else self.tokenizer.decode(end)
            until = handle_stop_sequences(options["until"], eos=eos)

            def stop(ids: np.ndarray, until: list[str] = until, end: int | None = end) -> bool:
                text = self._answer(ids)
                return bool(ids[-1] == end) or any(part in (text or "") for part in until if part)

            def generate(
                read: Prefilled, rows: list[int], numbers=numbers, until=until, end=end, options=options
            ):
                found = greedy_decode(self.lm, read, options["max_gen_toks"], stop=stop)
                for row, ids in zip(rows, found, strict=True):
                    ids = ids[: ids.tolist().index(end)] if end in ids else ids
                    answer = self._answer(ids)
                    whole = self.tok_decode(ids) if answer is None else answer
                    text = postprocess_generated_text(whole, until, None)
                    written[numbers[row]] = text
                    self.cache_hook.add_partial("generate_until", requests[numbers[row]].args, text)
                bar.update(len(rows))

            prompts = [
                self.tok_encode(requests[number].args[0]) or [self.prefix_token_id] for number in numbers
            ]
            self._read_shared([tuple(prompt) for prompt in prompts], generate)
        bar.close()
        return written

    def _answer(self, ids: np.ndarray) -> str | None:
        """Return the text after the reasoning, or all of it without `think_end_token`; None while it
        reasons.
        """
        mark = self.think_end_token
        if mark is None:
            return self.tok_decode(ids)
        if isinstance(mark, int):
            places = np.flatnonzero(np.asarray(ids) == mark)
            return self.tok_decode(ids[places[-1] + 1 :]).lstrip() if len(places) else None
        text = self._tokenizer.decode(ids)  # the mark may be a special token
        return text.split(mark)[-1].lstrip() if mark in text else None

    def _read_shared(
        self, prompts: Sequence[tuple[int, ...]], use: Callable[[Prefilled, list[int]], None]
    ) -> None:
        """Read every prompt, common beginnings once; `use` gets groups of rows and their numbers."""

        def visit(numbers: list[int], start: int, state: RecurrentState | None) -> None:
            # `numbers` are in the order of their prompts, which are alike up to `start`, where `state` is
            first, last = prompts[numbers[0]], prompts[numbers[-1]]
            alike = _alike(first, last, min(len(prompts[number]) for number in numbers) - 1)
            if len(numbers) > 1 and alike - start >= SHARED:
                (read,) = prefill(
                    self.lm, [np.array(first[start:alike])], state=state, chunk_size=self.chunk_size
                )
                start, state = alike, read.state
            families: dict[tuple[int, ...], list[int]] = defaultdict(list)
            for number in numbers:
                families[prompts[number][start : start + SHARED + 1]].append(number)
            single: list[int] = []
            for family in families.values():
                if (
                    len(family) > 1
                    and len(family) < len(numbers)
                    and len(prompts[family[0]]) > start + SHARED
                ):
                    visit(family, start, state)
                else:
                    single += family
            single.sort(key=lambda number: len(prompts[number]))
            for at in range(0, len(single), self.batch_size):
                some = single[at : at + self.batch_size]
                rest = [np.array(prompts[number][start:]) for number in some]
                for read in prefill(self.lm, rest, state=state, chunk_size=self.chunk_size):
                    use(read, [some[row] for row in read.rows])

        if prompts:
            visit(sorted(range(len(prompts)), key=lambda number: prompts[number]), 0, None)

    @torch.no_grad()
    def _continue(self, read: Prefilled, continuations: Sequence[Ids]) -> list[tuple[float, bool]]:
        """Return log-likelihood of a continuation of each row, and whether it is greedy, in constant
        memory.
        """
        longest = max(map(len, continuations))
        # filled up at the end, where nothing is read any more
        ids = torch.from_numpy(np.stack([np.resize(ids, longest) for ids in continuations]).astype(np.int64))
        counted = torch.arange(longest) < torch.tensor([len(ids) for ids in continuations])[:, None]
        total, greedy = self._score(read.hidden[:, None], ids[:, :1], counted[:, :1])
        if longest > 1:
            for chunk in roll_out(self.lm, ids[:, :-1], state=read.state, chunk_size=self.chunk_size):
                start, stop = chunk.start + 1, chunk.start + 1 + chunk.hidden.shape[1]
                more, too = self._score(chunk.hidden, ids[:, start:stop], counted[:, start:stop])
                total, greedy = total + more, greedy & too
        return list(zip(total.tolist(), greedy.tolist(), strict=True))

    def _score(self, hidden: Tensor, targets: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
        """Return log-probabilities of the targets (B, T) that count, summed (B,); whether each is the
        argmax.
        """
        total = torch.zeros(len(hidden), dtype=torch.float64)
        greedy = torch.ones(len(hidden), dtype=torch.bool)
        size = max(1, _SCORED // (hidden.shape[0] * self.lm.vocab_size))
        for h, y, kept in zip(*(t.split(size, dim=1) for t in (hidden, targets, counted)), strict=True):
            logits = self.lm.head(h)
            found = logits.log_softmax(dim=-1).gather(2, y.to(logits.device)[..., None])[..., 0].cpu()
            total += torch.where(kept, found.double(), 0).sum(dim=1)
            greedy &= ((logits.argmax(dim=-1).cpu() == y) | ~kept).all(dim=1)
        return total, greedy


def _positive(name: str, value: Any) -> int:
    """Return a number of `--model_args` that counts something."""
    if isinstance(value, bool) or not str(value).isdigit() or int(value) < 1:
        raise LongrollError(f"--model_args {name}={value}: give a whole number, at least 1.")
    return int(value)


def _alike(one: Ids, other: Ids, most: int) -> int:
    """Return how many tokens two prompts begin with alike, at most `most`."""
    differing = (at for at in range(most) if one[at] != other[at])
    return next(differing, most)


def main(arguments: list[str], *, plugin: str | None = None) -> None:
    """Run lm_eval's own command line with the model type `longroll` there to choose."""
    LongrollLM.plugin = plugin
    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["lm_eval", *with_defaults(arguments)]
    cli_evaluate()

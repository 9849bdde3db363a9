"""lm-eval's harness on a finished trial: our model behind its interface, with the state carried where it can be.

A recurrence reads from left to right, so a batch is padded on the right, where padding cannot reach what is scored; prompts that
are continued share a batch only where they are equally long. A row's score therefore does not depend on its batch. There is no
longest context: what is long is read in pieces, the state carried.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lm_eval.api.model import TemplateLM
from torch import Tensor

from ...recurrences import LanguageModel
from ...recurrences.language_model import LanguageModelState
from ..tasks.tokenizers import TextTokenizer
from ..training import Hardware

PIECE = 2048
"""Tokens that are read at a time."""
DEFAULT_NEW_TOKENS = 256


class TrialModel(TemplateLM):  # type: ignore[misc]
    """A trial's model as lm-eval sees it."""

    def __init__(self, model: LanguageModel, tokenizer: TextTokenizer, hardware: Hardware, batch: int = 8) -> None:
        super().__init__()
        self.model, self.text, self.hardware, self.batch = model, tokenizer, hardware, batch

    @property
    def eot_token_id(self) -> int:
        return self.text.eos

    @property
    def tokenizer_name(self) -> str:
        return type(self.text).__name__

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The tokens of a text; none is added."""
        return self.text.encode(string)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, each after the token that ends a document; the state runs through."""
        pairs = [(("", ""), [self.eot_token_id], self.text.encode(request.args[0])) for request in requests]
        return [total for total, _ in self._loglikelihood_tokens(pairs, disable_tqdm)]

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy decoding gives it) of each continuation after its context."""
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        # Rows of like length together: little padding.
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        for some in _progress(_blocks(order, self.batch), len(order), self.batch, "scoring", disable_tqdm):
            rows = [requests[i][1] + requests[i][2] for i in some]
            starts = [len(requests[i][1]) for i in some]
            for i, outcome in zip(some, self._score(rows, starts), strict=True):
                found[i] = outcome
        return found

    def _score(self, rows: list[list[int]], starts: list[int]) -> list[tuple[float, bool]]:
        """Each row's tokens from its start on, given those before."""
        width = max(len(row) for row in rows) - 1
        tokens = torch.full((len(rows), width + 1), self.eot_token_id)
        scored = torch.zeros(len(rows), width, dtype=torch.bool)
        for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
            tokens[i, : len(row)] = torch.tensor(row)
            scored[i, start - 1 : len(row) - 1] = True
        sums, greedy = torch.zeros(len(rows), dtype=torch.float64), torch.ones(len(rows), dtype=torch.bool)
        state = self.model.initial_state(len(rows))
        for start in range(0, width, PIECE):
            part = slice(start, min(start + PIECE, width))
            hidden, state = self._hidden(tokens[:, part], state)
            where, answers = scored[:, part], tokens[:, 1:][:, part]
            row_of = where.nonzero()[:, 0]
            logits = self._logits(hidden[where.to(hidden.device)])
            wanted = answers[where].to(logits.device)
            sums.index_add_(0, row_of, -F.cross_entropy(logits, wanted, reduction="none").double().cpu())
            wrong = (logits.argmax(-1) != wanted).cpu()
            greedy[row_of[wrong]] = False
        return [(float(total), bool(same)) for total, same in zip(sums, greedy, strict=True)]

    @torch.no_grad()
    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to a stop text (left out) or to as many tokens as are allowed, decoded with the state carried."""
        prompts = [self.text.encode(request.args[0]) or [self.eot_token_id] for request in requests]
        groups: dict[tuple[Any, ...], list[int]] = {}
        for i, (prompt, request) in enumerate(zip(prompts, requests, strict=True)):
            groups.setdefault((-len(prompt), *_settings(request.args[1])), []).append(i)
        found = [""] * len(requests)
        blocks = [(key, some) for key, members in sorted(groups.items()) for some in _blocks(members, self.batch)]
        for (_, until, most, temperature), some in _progress(blocks, len(blocks), 1, "generating", disable_tqdm):
            texts = self._continue([prompts[i] for i in some], until, most, temperature)
            for i, text in zip(some, texts, strict=True):
                found[i] = text
        return found

    def _continue(self, prompts: list[list[int]], until: tuple[str, ...], most: int, temperature: float) -> list[str]:
        """Prompts of one length, continued together until every one of them has stopped."""
        tokens = torch.tensor(prompts)
        state = self.model.initial_state(len(prompts))
        hidden = torch.empty(0)
        for start in range(0, tokens.shape[1], PIECE):
            hidden, state = self._hidden(tokens[:, start : start + PIECE], state)
        # Each row draws from its own prompt's seed: neither the batch nor what was drawn before matters.
        generators = [torch.Generator().manual_seed(hash(tuple(prompt)) % 2**63) for prompt in prompts]
        made: list[list[int]] = [[] for _ in prompts]
        going = [True] * len(prompts)
        for _ in range(most):
            chosen = _choose(self._logits(hidden[:, -1]).cpu(), temperature, generators)
            for i, token in enumerate(chosen.tolist()):
                if going[i] and token != self.eot_token_id:
                    made[i].append(token)
                    going[i] = not _stops(self.text.decode(made[i]), until)
                else:
                    going[i] = False
            if not any(going):
                break
            hidden, state = self._hidden(chosen[:, None], state)
        return [_cut(self.text.decode(one), until) for one in made]

    def _hidden(self, tokens: Tensor, state: LanguageModelState) -> tuple[Tensor, LanguageModelState]:
        with self.hardware.autocast():
            return self.model.hidden(tokens.to(self.hardware.device), state)

    def _logits(self, hidden: Tensor) -> Tensor:
        with self.hardware.autocast():
            return self.model.logits(hidden).float()


def _settings(arguments: dict[str, Any]) -> tuple[tuple[str, ...], int, float]:
    """(stop texts, most new tokens, temperature; 0: the likeliest)."""
    until = arguments.get("until") or []
    until = [until] if isinstance(until, str) else list(until)
    temperature = float(arguments.get("temperature", 0.0) or 0.0) if arguments.get("do_sample") else 0.0
    return tuple(until), int(arguments.get("max_gen_toks", DEFAULT_NEW_TOKENS)), temperature


def _choose(logits: Tensor, temperature: float, generators: Sequence[torch.Generator]) -> Tensor:
    if temperature <= 0:
        return logits.argmax(-1)
    shares = torch.softmax(logits / temperature, dim=-1)
    return torch.cat([torch.multinomial(row, 1, generator=own) for row, own in zip(shares, generators, strict=True)])


def _stops(text: str, until: tuple[str, ...]) -> bool:
    return any(stop in text for stop in until if stop)


def _cut(text: str, until: tuple[str, ...]) -> str:
    """The text before the first stop."""
    places = [text.index(stop) for stop in until if stop and stop in text]
    return text[: min(places)] if places else text


def _blocks(members: Sequence[int], size: int) -> list[list[int]]:
    return [list(members[start : start + size]) for start in range(0, len(members), size)]


def _progress(blocks: Sequence[Any], total: int, size: int, words: str, silent: bool) -> Iterator[Any]:
    """The blocks, with a bar that counts what is in them."""
    from tqdm import tqdm

    with tqdm(total=total, desc=words, disable=silent, leave=False) as bar:
        for block in blocks:
            yield block
            bar.update(size)

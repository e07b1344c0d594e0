"""lm-eval's transformers model, which here counts what it cuts, refuses NaN and shows one progress bar per row."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import Collator
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LogitsProcessor, LogitsProcessorList

from .processes import Team

# Where configurations keep the longest input, in the order in which they are asked.
LENGTH_NAMES = (
    "max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "max_seq_len", "model_max_length",
)  # fmt: skip
UNLIMITED = 10**9  # tokenizers say a huge number where they know of no limit


class NonFiniteLogits(ArithmeticError):
    """The model gave NaN: its scores would be those of an arbitrary choice."""


class CausalLM(HFLM):
    """HFLM that never cuts a prompt silently.

    Attributes:
        counts: "tokens" through the model, "prompts_cut" from the left because they exceed the context, and
            "answers_short" for which less room than the token limit was left. Cleared by the driver before a row.
        batch_sizes_found: with batch size "auto". Likewise.
    """

    def __init__(self, model, tokenizer, max_length: int, batch_size: int | str):
        self.counts: Counter[str] = Counter()
        self.expect = None  # told how many requests come, by the progress bar
        self.batch_sizes_found: list[int] = []
        self._room = 0
        super().__init__(
            pretrained=model, tokenizer=tokenizer, backend="causal", max_length=max_length, batch_size=batch_size
        )

    @property
    def max_length(self) -> int:
        # lm-eval cuts prompts so that the token limit always fits, and fails where that leaves nothing. While answers
        # are generated, let it see as much more room as it will ask for: prompts stay whole, answers get what is left.
        return self._max_length + self._room

    @property
    def prefix_token_id(self) -> int:
        # What stands before an empty context; a tokenizer may have neither begin nor end token.
        return next(
            token
            for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, self.tokenizer.pad_token_id)
            if token is not None
        )

    def tok_decode(self, tokens, skip_special_tokens=True):
        # lm-eval decodes the end token to stop at it; a tokenizer may have none.
        return None if tokens is None else super().tok_decode(tokens, skip_special_tokens=skip_special_tokens)

    def generate_until(self, requests, disable_tqdm=False):
        limits = {request.args[1].get("max_gen_toks", self.max_gen_toks) for request in requests}
        for request in requests:
            length = len(self.tok_encode(request.args[0]))
            limit = request.args[1].get("max_gen_toks", self.max_gen_toks)
            self.counts["prompts_cut"] += length > self._max_length - 1
            self.counts["answers_short"] += length + limit > self._max_length
        if len(limits) > 1:
            raise ValueError(f"a row must have one token limit, got {sorted(limits)}")
        if self.expect:
            self.expect(len(requests))
        self._room = max(limits, default=1) - 1
        try:
            return super().generate_until(requests, disable_tqdm=True)
        finally:
            self._room = 0

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None):
        for _, context, continuation in requests:
            if len(continuation) > self._max_length:
                raise ValueError(
                    f"an answer to be scored has {len(continuation)} tokens, more than the context of "
                    f"{self._max_length}: pass a larger --max-length, or leave the row out"
                )
            self.counts["prompts_cut"] += len(context) + len(continuation) > self._max_length + 1
        if self.expect:
            self.expect(len(requests))
        return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)

    def _detect_batch_size(self, requests=None, pos=0):
        tokens = self.counts["tokens"]
        found = super()._detect_batch_size(requests, pos)
        self.counts["tokens"] = tokens  # trials answer nothing
        self.batch_sizes_found.append(found)
        return found

    def _model_call(self, inps, attn_mask=None, labels=None):
        logits = super()._model_call(inps, attn_mask=attn_mask, labels=labels)
        self.counts["tokens"] += inps.numel()
        return _without_nan(logits)

    def _model_generate(self, context, max_length, stop, **generation_kwargs):
        max_length = min(max_length, self._max_length)
        with _plain_greedy(self.model):
            output = super()._model_generate(
                context, max_length, stop, logits_processor=LogitsProcessorList([_RefuseNaN()]), **generation_kwargs
            )
        self.counts["tokens"] += output.numel()
        return output


@dataclass(frozen=True)
class Request:
    """What the model needs of lm-eval's request."""

    args: tuple


class LeadingLM(CausalLM):
    """The first of several processes: deals out the batches that it would make alone, and puts the answers together.

    The same batches, because the last bits of a score depend on what else is in a batch.
    """

    def __init__(self, team: Team, *args):
        super().__init__(*args)
        self._team = team

    def generate_until(self, requests, disable_tqdm=False):
        def order(item):
            _, (context, _) = item
            return -len(self.tok_encode(context)), context

        items = list(enumerate(request.args for request in requests))
        groups = Collator.group(items, fn=lambda item: item[1][1], group_by="gen_kwargs").values()
        batches = [
            [number for number, _ in batch] for group in groups for batch in self._batches(sorted(group, key=order))
        ]
        return self._share("generate_until", [Request(args) for _, args in items], batches)

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None):
        def order(group):
            _, (_, context, continuation) = max(group, key=lambda item: len(item[1][2]))
            tokens = context + continuation
            return -len(tokens), tuple(tokens)

        # Continuations of one token after the same context take one pass through the model: they stay together.
        groups = Collator.group(enumerate(requests), fn=_shared_pass, group_by="contexts").values()
        batches = [
            [number for group in batch for number, _ in group] for batch in self._batches(sorted(groups, key=order))
        ]
        return self._share("_loglikelihood_tokens", requests, batches)

    def _batches(self, ordered: list) -> list[list]:
        size = 1 if self.batch_size == "auto" else self.batch_size
        return [ordered[start : start + size] for start in range(0, len(ordered), size)]

    def _share(self, method: str, items: list, batches: list[list[int]]) -> list:
        shares = [sorted(chain(*batches[rank :: self._team.size])) for rank in range(self._team.size)]
        work = [(method, [items[number] for number in share]) for share in shares]
        replies = self._team.call("answer", work, lambda own: (_answers(self, *own), Counter(), []))
        answers = [None] * len(items)
        for share, (given, counts, sizes) in zip(shares, replies, strict=True):
            for number, each in zip(share, given, strict=True):
                answers[number] = each
            self.counts.update(counts)
            self.batch_sizes_found += sizes
        return answers


@contextmanager
def _plain_greedy(model) -> Iterator[None]:
    """Only the token ids of the checkpoint's generation_config: the rest would bend the greedy answers of one model.

    do_sample=False leaves its beams, penalties and suppressed tokens in force, and what is passed as
    `generation_config=` is filled up from it. Changed in place, because wrappers (PEFT) share the object.
    """
    config = model.generation_config
    own = dict(vars(config))
    neutral = GenerationConfig(**{name: own[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")})
    vars(config).clear()
    vars(config).update(vars(neutral))
    try:
        yield
    finally:
        vars(config).clear()
        vars(config).update(own)


class _RefuseNaN(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return _without_nan(scores)


def _without_nan(logits):
    if torch.isnan(logits).any():
        raise NonFiniteLogits("the model's logits are NaN")
    return logits


def _shared_pass(item: tuple) -> list[int]:
    _, (_, context, continuation) = item
    return context + continuation[:-1]


def load_tokenizer(source: str, trust_remote_code: bool):
    """The tokenizer of a checkpoint, with a padding token.

    Raises:
        ValueError: there is none.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
        usable = len(tokenizer) > 0
    except Exception as error:  # damaged files can fail anywhere in transformers
        raise ValueError(
            f"{source}: no tokenizer can be loaded from it ({_line(error)}). Name one with --tokenizer."
        ) from None
    if not usable:
        raise ValueError(f"{source}: its tokenizer has no tokens. Name one with --tokenizer.")
    return with_padding(tokenizer)


def with_padding(tokenizer):
    """A token to pad with: masked wherever it is used, so any will do, and no embedding has to be added for it."""
    if tokenizer.pad_token_id is None:
        for other in (tokenizer.eos_token, tokenizer.unk_token, tokenizer.bos_token):
            if other is not None:
                tokenizer.pad_token = other
                break
        else:
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def load_model(folder: str, dtype: str, device_map, trust_remote_code: bool, device: str):
    """A causal LM by transformers; on one device unless there is a device map."""
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, device_map=device_map, trust_remote_code=trust_remote_code, output_loading_info=True
        )
    except Exception as error:  # a damaged checkpoint can fail anywhere in transformers
        raise ValueError(f"{folder}: transformers cannot load it as a causal language model ({_line(error)})") from None
    if found["missing_keys"]:
        missing = sorted(found["missing_keys"])
        raise ValueError(
            f"{folder}: its weight files lack {len(missing)} tensors of a {type(model).__name__}, as {missing[0]}; "
            "transformers made them up, so nothing is evaluated. Check the files, and model_type in config.json."
        )
    return (model if device_map else model.to(device)).eval()


def check_device(name: str) -> None:
    """Says before hours of hashing and loading that a device is not there.

    Raises:
        ValueError: so it is, and why.
    """
    try:
        torch.empty(1, device=name)
    except Exception as error:  # each backend has its own
        raise ValueError(f"--device {name}: torch cannot use it ({_line(error)}); such as cpu or cuda:0") from None


def context_length(config, tokenizer, given: int | None, name: str) -> int:
    """Tokens that fit: as given, as the configuration or one nested in it says, or as the tokenizer says.

    lm-eval falls back to 2048 where it finds nothing; a long prompt would then be cut although the model could read it.
    """
    if given:
        return given
    text = config.get_text_config()
    nested = [getattr(config, key, None) for key in getattr(config, "sub_configs", {})]
    for place in [text, config, *nested]:
        for key in LENGTH_NAMES:
            value = getattr(place, key, None)
            if isinstance(value, int) and value > 0:
                return value
    length = getattr(tokenizer, "model_max_length", None)
    if length and length < UNLIMITED:
        return int(length)
    raise ValueError(f"{name}: neither configuration nor tokenizer says how long an input may be. Pass --max-length.")


def wrap(model, tokenizer, max_length: int, batch_size: int | str, team: Team | None = None) -> CausalLM:
    """The model for lm-eval; the one that leads, or one that follows, where several processes share the work."""
    if team is None or team.rank != 0:
        return CausalLM(model, tokenizer, max_length, batch_size)
    return LeadingLM(team, model, tokenizer, max_length, batch_size)


def answer(lm: CausalLM, work: tuple[str, list]) -> tuple[list, Counter, list[int]]:
    """A share's answers, with what was counted and found meanwhile."""
    method, items = work
    lm.counts.clear()
    lm.batch_sizes_found.clear()
    return _answers(lm, method, items), Counter(lm.counts), list(lm.batch_sizes_found)


def _answers(lm: CausalLM, method: str, items: list) -> list:
    return getattr(CausalLM, method)(lm, items) if items else []


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
